"""A small HTTP/1.1 client for measuring: it stamps what arrives and parses it afterwards.

One `Connection` is kept alive over requests, as real clients do.  While an answer streams, nothing
is decoded but HTTP framing, so that the client takes as little as possible of a machine that it
shares with the server it measures.  It speaks plain HTTP to hosts by name and is no general client.
"""

import asyncio
import time
from urllib.parse import urlsplit

import httptools
import msgspec

from brim.errors import ConfigError

CONNECT_TIMEOUT_S = 10.0
"""A server that is up accepts at once; a wrong port should not cost a long wait."""


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """An OpenAI-compatible server, named for the tables."""

    name: str
    host: str
    port: int
    base_path: str
    """What comes before `/chat/completions`, usually `/v1`."""
    model: str | None = None
    """None: the first one that the server lists."""

    @classmethod
    def parse(cls, text: str) -> "Endpoint":
        """From `NAME=URL` or `NAME=URL#MODEL`; `/v1` is added to a URL without a path.

        Raises:
            ConfigError: It is not of that form, or not plain HTTP.

        Example:
            >>> Endpoint.parse("brim=http://127.0.0.1:2746").base_path
            '/v1'
        """
        name, _, url = text.partition("=")
        parts = urlsplit(url)
        try:
            port = parts.port or 80
        except ValueError:
            port = 0
        if not name or parts.scheme != "http" or not parts.hostname or not port:
            raise ConfigError(f"'{text}' is not an endpoint; write NAME=http://HOST:PORT")
        return cls(
            name=name,
            host=parts.hostname,
            port=port,
            base_path=parts.path.rstrip("/") or "/v1",
            model=parts.fragment or None,
        )


class Reply(msgspec.Struct, kw_only=True):
    """One response as it came."""

    start_s: float
    """`time.perf_counter()` when the request was handed to the socket."""
    status: int = 0
    parts: list[tuple[float, bytes]] = []
    """(arrival time, body bytes) of each piece that the parser gave."""
    end_s: float = 0.0
    failure: str | None = None
    """Why the response is incomplete, where it is."""

    @property
    def body(self) -> bytes:
        """All of the body."""
        return b"".join(data for _, data in self.parts)

    def events(self) -> list[tuple[float, bytes]]:
        """(arrival time, data) of each server-sent event; the time is that of its last byte."""
        found: list[tuple[float, bytes]] = []
        rest = b""
        for arrival_s, data in self.parts:
            *blocks, rest = (rest + data).replace(b"\r\n", b"\n").split(b"\n\n")
            for block in blocks:
                lines = [line[5:].strip() for line in block.split(b"\n") if line[:5] == b"data:"]
                if lines:
                    found.append((arrival_s, b"\n".join(lines)))
        return found


class _Receiver(asyncio.Protocol):
    """Feeds the parser and fills the current reply; httptools calls the `on_` methods."""

    def __init__(self) -> None:
        self.reply: Reply | None = None
        self.done: asyncio.Future[None] | None = None
        self.is_open = True
        self._new_parser()

    def _new_parser(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._is_delimited = False
        self._ends_with_connection = False

    def expect(self, reply: Reply) -> "asyncio.Future[None]":
        self.reply = reply
        self.done = asyncio.get_running_loop().create_future()
        self._new_parser()
        return self.done

    def data_received(self, data: bytes) -> None:
        self._arrival_s = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as exc:
            self._end(f"not an HTTP response: {exc}")

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        # HTTP/1.0 servers end a streamed body by closing the connection.
        is_complete = self._ends_with_connection and exc is None
        self._end(None if is_complete else f"the connection broke off: {exc or 'end of file'}")

    def on_header(self, name: bytes, _value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._is_delimited = True

    def on_headers_complete(self) -> None:
        self._ends_with_connection = not self._is_delimited
        if self.reply is not None:
            self.reply.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self.reply is not None:
            self.reply.parts.append((self._arrival_s, body))

    def on_message_complete(self) -> None:
        self.is_open = self.is_open and self._parser.should_keep_alive()
        self._end(None)

    def _end(self, failure: str | None) -> None:
        if self.reply is None or self.done is None:
            return
        self.reply.end_s = time.perf_counter()
        self.reply.failure = failure
        self.reply = None
        if not self.done.done():
            self.done.set_result(None)


class Connection:
    """One connection to one endpoint, reused while the server keeps it; one request at a time."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._transport: asyncio.Transport | None = None
        self._receiver: _Receiver | None = None
        self.reply: Reply | None = None
        """The response to the last request, as far as it has come."""

    async def get(self, path: str) -> Reply:
        """GET `base_path` + `path`.

        Raises:
            ConfigError: Nothing listens there.
        """
        return await self._exchange("GET", path, b"")

    async def post(self, path: str, body: bytes) -> Reply:
        """POST a JSON body to `base_path` + `path` and wait for the whole response.

        Raises:
            ConfigError: Nothing listens there.
        """
        return await self._exchange("POST", path, body)

    def close(self) -> None:
        """Drop the connection; a request in flight ends with a failure."""
        if self._transport is not None:
            self._transport.abort()
            self._transport = self._receiver = None

    async def _exchange(self, method: str, path: str, body: bytes) -> Reply:
        where = self.endpoint
        head = (
            f"{method} {where.base_path}{path} HTTP/1.1\r\nHost: {where.host}:{where.port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        is_reused = self._transport is not None
        reply = await self._send(head.encode() + body)
        if is_reused and reply.failure and not reply.status:
            # Some servers close after a stream without saying so, and the next request crosses
            # the close on its way: ask once more, and count the time since the first attempt.
            start_s = reply.start_s
            self.close()
            reply = await self._send(head.encode() + body)
            reply.start_s = start_s
        return reply

    async def _send(self, request: bytes) -> Reply:
        transport, receiver = await self._connected()
        reply = self.reply = Reply(start_s=time.perf_counter(), parts=[])
        done = receiver.expect(reply)
        transport.write(request)
        try:
            await done
        except asyncio.CancelledError:
            self.close()
            raise
        return reply

    async def _connected(self) -> tuple[asyncio.Transport, _Receiver]:
        if self._transport is not None and self._receiver is not None and self._receiver.is_open:
            return self._transport, self._receiver
        self.close()
        where = self.endpoint
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                (
                    self._transport,
                    self._receiver,
                ) = await asyncio.get_running_loop().create_connection(
                    _Receiver, where.host, where.port
                )
        except (OSError, TimeoutError) as exc:
            raise ConfigError(
                f"nothing answers at {where.host}:{where.port} for '{where.name}' ({exc}); "
                "start that server or correct its URL"
            ) from exc
        return self._transport, self._receiver
