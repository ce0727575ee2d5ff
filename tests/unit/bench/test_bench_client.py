"""The measuring client, over real sockets."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import pytest

from brim.bench.client import Connection, Endpoint, Reply
from brim.errors import ConfigError

Scripted = Callable[..., AbstractAsyncContextManager[Endpoint]]

PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def exchange(scripted: Scripted, *scripts: list[bytes]) -> list[Reply]:
    """POST once for each script over one connection."""
    left = list(scripts)

    async def main() -> list[Reply]:
        async with scripted(lambda _path, _body: left.pop(0)) as endpoint:
            connection = Connection(endpoint)
            try:
                return [await connection.post("/x", b"{}") for _ in scripts]
            finally:
                connection.close()

    return asyncio.run(main())


def test_a_chunked_body_is_joined_wherever_it_was_cut(scripted: Scripted) -> None:
    """Chunk framing split at any byte gives the same body and never its framing."""
    whole = CHUNKED + b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n"
    cuts = [[whole[:n], whole[n:]] for n in range(len(CHUNKED) - 3, len(whole))]
    for reply in exchange(scripted, *cuts):
        assert (reply.status, reply.failure, reply.body) == (200, None, b"hello world")


def test_one_connection_serves_many_requests(scripted: Scripted, connections: list[int]) -> None:
    """A kept-alive connection gives each request its own reply, in order."""
    replies = exchange(scripted, [PLAIN], [PLAIN.replace(b"hi", b"ho")])
    assert [reply.body for reply in replies] == [b"hi", b"ho"]
    assert len(connections) == 1


def test_an_announced_close_is_believed(scripted: Scripted, connections: list[int]) -> None:
    """After `Connection: close` the next request opens a connection, closed already or not."""
    closing = PLAIN.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    replies = exchange(scripted, [closing], [closing, b""], [PLAIN])
    assert [reply.failure for reply in replies] == [None, None, None]
    assert len(connections) == 3


def test_a_connection_that_was_closed_silently_costs_one_more_attempt(scripted: Scripted) -> None:
    """A server that closes after an answer without announcing it still gets the next request."""
    replies = exchange(scripted, [PLAIN, b""], [PLAIN])
    assert [(reply.failure, reply.body) for reply in replies] == [(None, b"hi")] * 2


def test_a_fresh_connection_that_breaks_is_not_tried_again(scripted: Scripted) -> None:
    """A server that dies on a request is not sent the same one twice."""
    asked: list[bytes] = []

    def script(_path: str, body: bytes) -> list[bytes]:
        asked.append(body)
        return [b""]

    async def main() -> Reply:
        async with scripted(script) as endpoint:
            return await Connection(endpoint).post("/x", b"1")

    assert "broke off" in str(asyncio.run(main()).failure)
    assert asked == [b"1"]


def test_a_body_without_a_length_ends_with_the_connection(scripted: Scripted) -> None:
    """HTTP/1.0 servers that stream and then close are read to the end."""
    (reply,) = exchange(scripted, [b"HTTP/1.0 200 OK\r\n\r\nda", b"ta", b""])
    assert (reply.failure, reply.body) == (None, b"data")


def test_a_body_that_breaks_off_is_a_failure(scripted: Scripted) -> None:
    """Fewer bytes than announced is not taken for an answer."""
    (reply,) = exchange(scripted, [b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhi", b""])
    assert "broke off" in str(reply.failure)


def test_bytes_that_are_not_http_are_a_failure(scripted: Scripted) -> None:
    """A port that speaks something else is reported, not waited for."""
    (reply,) = exchange(scripted, [b"\x00\x01nonsense\r\n\r\n"])
    assert "not an HTTP response" in str(reply.failure)


def test_a_cancelled_wait_drops_the_connection(scripted: Scripted) -> None:
    """After a cancelled request the next one starts on a fresh connection."""

    async def main() -> Reply:
        asked = asyncio.Event()

        def script(_path: str, body: bytes) -> list[bytes]:
            asked.set()
            return [CHUNKED] if body == b"1" else [PLAIN]

        async with scripted(script) as endpoint:
            connection = Connection(endpoint)
            waiting = asyncio.create_task(connection.post("/x", b"1"))
            await asked.wait()
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            try:
                return await connection.post("/x", b"2")
            finally:
                connection.close()

    assert asyncio.run(main()).body == b"hi"


def test_events_are_cut_at_blank_lines_wherever_the_parts_end() -> None:
    """An event spread over parts takes the arrival time of its last byte; comments are skipped."""
    reply = Reply(
        start_s=0.0,
        parts=[(1.0, b'data: {"a'), (2.0, b'":1}\r\n\r'), (3.0, b"\n: ping\n\ndata: x\n\n")],
    )
    assert reply.events() == [(3.0, b'{"a":1}'), (3.0, b"x")]


@pytest.mark.parametrize(
    "text", ["noname", "a=ftp://h:1", "a=http://", "=http://h:1", "a=http://h:99999999", "a=h:80"]
)
def test_an_endpoint_that_is_not_one_is_refused(text: str) -> None:
    """The message shows the form that is wanted."""
    with pytest.raises(ConfigError, match="NAME=http://HOST:PORT"):
        Endpoint.parse(text)


def test_an_endpoint_keeps_its_path_and_model() -> None:
    """A URL's path is kept, its fragment names the model, and /v1 stands in for no path."""
    full = Endpoint.parse("a=http://h:81/api/v3/#some/model")
    assert (full.name, full.host, full.port) == ("a", "h", 81)
    assert (full.base_path, full.model) == ("/api/v3", "some/model")
    assert Endpoint.parse("a=http://h").base_path == "/v1"


def test_a_port_where_nobody_listens_is_named(scripted: Scripted) -> None:
    """A wrong URL gives one sentence with host, port and what to do."""

    async def main() -> None:
        async with scripted(lambda _path, _body: []) as endpoint:
            pass
        await Connection(endpoint).get("/models")

    with pytest.raises(ConfigError, match=r"nothing answers at 127\.0\.0\.1:\d+"):
        asyncio.run(main())
