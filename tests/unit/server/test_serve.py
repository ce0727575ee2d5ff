"""Sockets: bad addresses fail before anything loads, and a stop lets answers finish."""

import asyncio
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest
from starlette.types import ASGIApp
from support.scripted import ScriptedAnswer, ScriptedRuntime, chat_body

from brim.errors import ConfigError
from brim.server.app import build_app
from brim.server.serve import HttpServer, listen, url_of

pytestmark = pytest.mark.anyio


def test_a_port_in_use_is_one_sentence() -> None:
    """A second server on the same port says so, and how to choose another."""
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 is in use") as caught:
            listen("127.0.0.1", port)
    assert "--port" in caught.value.message


@pytest.mark.parametrize(
    ("host", "port", "words"),
    [
        ("256.0.0.1", 0, "neither an address nor a name"),
        ("x" * 70, 0, "neither an address nor a name"),
        ("192.0.2.1", 0, "not an address of this machine"),
        ("127.0.0.1", 65536, "does not exist"),
        ("127.0.0.1", -1, "does not exist"),
    ],
)
def test_a_bad_address_is_one_sentence(host: str, port: int, words: str) -> None:
    """Hosts that are nobody's or someone else's, and ports that do not exist, are ConfigError."""
    with pytest.raises(ConfigError, match=words):
        listen(host, port)


def test_the_url_has_the_port_that_was_bound() -> None:
    """Port 0 is resolved, and IPv6 addresses are in brackets."""
    with listen("localhost", 0) as listener:
        port = listener.getsockname()[1]
        assert url_of(listener) == f"http://127.0.0.1:{port}"
        assert listener.family == socket.AF_INET


@asynccontextmanager
async def serving(
    app: ASGIApp, finish_within_s: float = 10, max_connections: int = 1024
) -> AsyncIterator[tuple[HttpServer, int]]:
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    server = HttpServer(
        app, listener, finish_within_s=finish_within_s, max_connections=max_connections
    )
    started: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    running = asyncio.create_task(server.run(started.set_result))
    assert await started == f"http://127.0.0.1:{port}"
    try:
        yield server, port
    finally:
        server.stop()
        await running
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)


async def ask(port: int, **fields: object) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = msgspec.json.encode(chat_body(**fields))
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        b"Content-Length: %d\r\n\r\n" % len(data) + data
    )
    return reader, writer


async def test_a_running_stream_finishes_after_stop(runtime: ScriptedRuntime) -> None:
    """`stop` closes the socket for new clients while the answer that runs reaches `[DONE]`."""
    may_finish = asyncio.Event()

    async def gate(answer: ScriptedAnswer, position: int) -> None:
        if position == 2:
            await may_finish.wait()

    runtime.gate = gate
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    async with serving(build_app(runtime), finish_within_s=10) as (server, port):
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
        reader, writer = await ask(port, stream=True)
        head = await reader.readuntil(b'"content":" "')
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        server.stop()
        may_finish.set()
        rest = await reader.read()
        writer.close()
    assert rest.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert runtime.answers[0].is_finished


async def test_a_client_that_closes_its_socket_cancels_its_answer(
    runtime: ScriptedRuntime,
) -> None:
    """A real connection that ends in mid-stream frees the answer behind it."""
    cancelled = asyncio.Event()

    async def gate(answer: ScriptedAnswer, position: int) -> None:
        if position == 2:
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

    runtime.gate = gate
    async with serving(build_app(runtime), finish_within_s=10) as (_, port):
        reader, writer = await ask(port, stream=True)
        await reader.readuntil(b'"content":" "')
        writer.close()
        await cancelled.wait()
        await writer.wait_closed()
    assert runtime.answers[0].is_cancelled


async def reply_to(port: int, *parts: bytes) -> bytes:
    """Everything a server says to raw bytes, until it closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for part in parts:
        writer.write(part)
    try:
        return await reader.read()
    finally:
        writer.close()


GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.parametrize(
    "parts",
    [
        (GET, b"X-Long: " + b"x" * 66_000),
        (GET, b"x: y\r\n" * 12_000, b"Connection: close\r\n\r\n"),
        (b"GET /" + b"x" * 66_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",),
        (
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked"
            b"\r\n\r\n1\r\nx\r\n0\r\n",
            b"x: y\r\n" * 12_000,
        ),
    ],
    ids=["one without end", "many", "request line", "trailers"],
)
async def test_endless_headers_are_refused(runtime: ScriptedRuntime, parts: list[bytes]) -> None:
    """Over 64 KiB of request line, headers or trailers end the connection, with 431 if it can."""
    async with serving(build_app(runtime)) as (_, port):
        answer = await reply_to(port, *parts)
    assert answer.startswith(b"HTTP/1.1 431 ") or (b"chunked" in parts[0] and answer == b"")
    assert runtime.answers == []


async def test_large_headers_within_the_bound_are_taken(runtime: ScriptedRuntime) -> None:
    """60 KB of headers, and a large body in the same packets, are an ordinary request."""
    async with serving(build_app(runtime)) as (_, port):
        header = b"X-Long: " + b"x" * 60_000 + b"\r\nConnection: close\r\n\r\n"
        assert (await reply_to(port, GET, header)).startswith(b"HTTP/1.1 200 ")
        reader, writer = await ask(port, user="x" * 200_000)
        assert (await reader.readline()) == b"HTTP/1.1 200 OK\r\n"
        writer.close()


@pytest.mark.parametrize("parts", [(), (GET,)])
async def test_headers_that_stall_are_given_up(
    runtime: ScriptedRuntime, monkeypatch: pytest.MonkeyPatch, parts: list[bytes]
) -> None:
    """A connection that says nothing, or half a request, gets 408 and is closed."""
    monkeypatch.setattr("brim.server.protocol.BoundedProtocol.headers_within_s", 0.01)
    async with serving(build_app(runtime)) as (_, port):
        assert (await reply_to(port, *parts)).startswith(b"HTTP/1.1 408 ")


async def test_bytes_that_are_not_http_are_told_in_the_usual_shape(
    runtime: ScriptedRuntime,
) -> None:
    """Whoever speaks TLS to the port gets 400 as JSON."""
    async with serving(build_app(runtime)) as (_, port):
        answer = await reply_to(port, b"\x16\x03\x01\x02\x00\x01\x00\x01")
    head, _, content = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert msgspec.json.decode(content)["error"]["code"] == "invalid_request"


async def test_more_connections_than_the_bound_are_busy(runtime: ScriptedRuntime) -> None:
    """A request on one connection too many is 503 with Retry-After, and is disconnected."""
    async with serving(build_app(runtime), max_connections=1) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GET + b"\r\n")
        assert (await reader.readline()) == b"HTTP/1.1 200 OK\r\n"
        answer = await reply_to(port, GET + b"\r\n")
        writer.close()
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"retry-after: 1\r\n" in answer
    assert b'"code":"busy"' in answer


@pytest.mark.parametrize(("num_headers", "status"), [(98, b"200"), (101, b"431")])
async def test_headers_are_counted(
    runtime: ScriptedRuntime, num_headers: int, status: bytes
) -> None:
    """A hundred headers are taken, however short, and one more is not."""
    async with serving(build_app(runtime)) as (_, port):
        answer = await reply_to(port, GET, b"x: y\r\n" * num_headers, b"Connection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 " + status)
