"""uvicorn's HTTP protocol with bounds: on headers, on how long they take, and on connections.

httptools gives a header when it is complete, so one without an end shows only in the bytes that
came; many short ones show only in what it gave.  Both are counted.
"""

import asyncio
from http import HTTPStatus
from typing import Any, cast

from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from brim.errors import Busy, InvalidRequest
from brim.server.connection import ABORT
from brim.server.failure import error_json, error_response
from brim.server.limits import HEADERS_WITHIN_S, MAX_HEADER_BYTES, MAX_HEADERS

_NUM_SEPARATOR_BYTES = len(b": \r\n")


class HeadersTooLarge(Exception):
    """Ends parsing; httptools turns whatever a callback raises into its own error."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection; `bounded` makes the class for a server."""

    max_connections: int
    max_header_bytes: int = MAX_HEADER_BYTES
    headers_within_s: float = HEADERS_WITHIN_S

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._app = self.app
        self._in_headers = True
        self._has_completed = False
        self._num_parsed_bytes = 0
        self._num_headers = 0
        self._num_waiting_bytes = 0
        self._headers_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock: a client that connects has something to say."""
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse, and refuse a header that has grown too long without an end."""
        was_in_headers = self._in_headers
        if was_in_headers and self._headers_timer is None:
            self._start_timer()
        self._has_completed = False
        super().data_received(data)
        # Bytes that ended another request cannot be told from those that began this one.
        if was_in_headers and self._in_headers and not self._has_completed:
            self._num_waiting_bytes += len(data)
            if self._num_waiting_bytes > self.max_header_bytes:
                self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

    def on_message_begin(self) -> None:
        """A new request on this connection."""
        super().on_message_begin()
        self._num_parsed_bytes = self._num_headers = 0
        cast("Scope", self.scope)[ABORT] = self.transport.abort

    def on_url(self, url: bytes) -> None:
        """The request line counts too."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer after a chunked body."""
        self._num_headers += 1
        self._count(len(name) + len(value) + _NUM_SEPARATOR_BYTES)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Start answering, or refuse where too many connections are open."""
        self._in_headers = False
        self._num_waiting_bytes = 0
        self._stop_timer()
        is_full = len(self.connections) > self.max_connections
        self.app = _refuse_connection if is_full else self._app
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """What comes next is another request's."""
        super().on_message_complete()
        self._in_headers = self._has_completed = True

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls when parsing ended; in the shape of every other error."""
        too_large = self._is_too_large()
        status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE if too_large else HTTPStatus.BAD_REQUEST
        self._refuse(status)

    def _count(self, num_bytes: int) -> None:
        self._num_parsed_bytes += num_bytes
        if self._is_too_large():
            raise HeadersTooLarge

    def _is_too_large(self) -> bool:
        return self._num_parsed_bytes > self.max_header_bytes or self._num_headers > MAX_HEADERS

    def _start_timer(self) -> None:
        self._headers_timer = self.loop.call_later(self.headers_within_s, self._on_slow_headers)

    def _on_slow_headers(self) -> None:
        if self._is_answering():
            self._start_timer()  # the next request may take its time while this one is answered
        else:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT)

    def _is_answering(self) -> bool:
        cycle = cast("RequestResponseCycle | None", self.cycle)  # None before the first request
        return cycle is not None and not cycle.response_complete

    def _stop_timer(self) -> None:
        if self._headers_timer is not None:
            self._headers_timer.cancel()
            self._headers_timer = None

    def _refuse(self, status: HTTPStatus) -> None:
        """Answer outside the app, and close."""
        self._stop_timer()
        if self.transport.is_closing():
            return
        if self._is_answering():  # it would stand in the middle of another answer
            self.transport.close()
            return
        body = error_json(InvalidRequest(self._reason(status)))
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _reason(self, status: HTTPStatus) -> str:
        if status is HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE:
            return (
                f"there are more than {MAX_HEADERS} headers, or more than {self.max_header_bytes} "
                "bytes of them; send fewer"
            )
        if status is HTTPStatus.REQUEST_TIMEOUT:
            return f"the headers were not complete after {self.headers_within_s:g} s"
        return "this is not HTTP/1.1; call the server with http:// and an HTTP client"


async def _refuse_connection(scope: Scope, receive: Receive, send: Send) -> None:
    response = error_response(Busy("too many connections are open; ask again", retry_after_s=1))
    response.headers["connection"] = "close"
    await response(scope, receive, send)


def bounded(max_connections: int) -> type[BoundedProtocol]:
    """The protocol of a server that answers on that many connections at once."""
    return type("BoundedProtocol", (BoundedProtocol,), {"max_connections": max_connections})
