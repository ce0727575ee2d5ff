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
async def serving(app: ASGIApp, finish_within_s: float) -> AsyncIterator[tuple[HttpServer, int]]:
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    server = HttpServer(app, listener, finish_within_s=finish_within_s)
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
