"""Listening: a socket that is bound before anything is loaded, and uvicorn behind it.

Order of a start: `listen` (fails at once on a bad address), load models, `HttpServer.run`.
Order of a stop: the caller drains the runtime, so that new requests get 503 while running answers
end, then calls `stop`, which closes the socket and gives connections their last seconds.  Signals
are the caller's business; uvicorn would install handlers of its own and is kept from it.
"""

import asyncio
import contextlib
import errno
import itertools
import socket
from collections.abc import Callable, Iterator
from typing import cast

import uvicorn
from starlette.types import ASGIApp

from brim.errors import ConfigError
from brim.machine.heap import keep_heap_compact
from brim.server.limits import MAX_CONNECTIONS
from brim.server.protocol import bounded

BACKLOG = 256
"""Connections that the kernel holds while the loop is busy: a burst of every client at once."""

KEEP_ALIVE_S = 30
"""Longer than the 5 s after which common client libraries drop an idle connection: a server that
closes first makes them fail on a request that was already on its way."""

FINISH_WITHIN_S = 30.0
"""Seconds that running responses get after `stop`, unless the caller says otherwise."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 lets the system pick one.

    Raises:
        ConfigError: The address is none of this machine's, or the port is taken or not allowed.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"port {port} does not exist; choose one from 1 to 65535", param="port")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise ConfigError(
            f"'{host}' is neither an address nor a name that can be found; use 127.0.0.1 for this "
            f"machine alone, or 0.0.0.0 for every network",
            param="host",
        ) from None
    # "localhost" is ::1 first on some systems, and half of all clients try 127.0.0.1 alone.
    found.sort(key=lambda info: info[0] != socket.AF_INET)
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        # Without it, a restart fails for a minute while old connections are in TIME_WAIT.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # Only listening tells a port in use from one that another program merely bound.
        listener.listen(BACKLOG)
    except OSError as exc:
        listener.close()
        raise _cannot_listen(host, port, exc) from None
    listener.setblocking(False)
    return listener


def _cannot_listen(host: str, port: int, exc: OSError) -> ConfigError:
    if exc.errno == errno.EADDRINUSE:
        return ConfigError(
            f"port {port} on {host} is in use; stop the program that has it or choose another "
            f"with --port",
            param="port",
        )
    if exc.errno in (errno.EACCES, errno.EPERM):
        return ConfigError(
            f"port {port} is reserved for the system; choose one above 1023 with --port",
            param="port",
        )
    if exc.errno == errno.EADDRNOTAVAIL:
        return ConfigError(
            f"{host} is not an address of this machine; use 127.0.0.1 for this machine alone, or "
            f"0.0.0.0 for every network",
            param="host",
        )
    return ConfigError(f"cannot listen on {host} port {port}: {exc.strerror}", param="host")


def url_of(listener: socket.socket) -> str:
    """The base URL under which the socket is reached, with the port that was really bound."""
    host, port = cast("tuple[str, int]", listener.getsockname()[:2])
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def new_event_loop() -> asyncio.AbstractEventLoop:
    """A uvloop where it is installed, asyncio's own otherwise; for `asyncio.Runner`."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return cast("asyncio.AbstractEventLoop", uvloop.new_event_loop())


class HttpServer:
    """One app on one socket, until `stop`.

    Args:
        app: The ASGI app.
        listener: From `listen`; closed when the server ends.
        finish_within_s: Seconds that running responses get after `stop`; then they are cut.
        max_connections: On more than these, requests are answered with 503.
    """

    def __init__(
        self,
        app: ASGIApp,
        listener: socket.socket,
        *,
        finish_within_s: float = FINISH_WITHIN_S,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        self._listener = listener
        config = uvicorn.Config(
            app,
            # uvicorn's own `limit_concurrency` answers in plain text, without Retry-After.
            http=bounded(max_connections),
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            proxy_headers=False,  # nobody stands between; a header must not rename the client
            server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
        # Declared an int, but only handed to asyncio.wait_for.
        config.timeout_graceful_shutdown = cast("int", finish_within_s)
        self._server = _Server(config)

    async def run(self, on_started: Callable[[str], None] | None = None) -> None:
        """Serve until `stop`, then return when every connection is closed.

        Args:
            on_started: Called with the base URL once requests are accepted.
        """
        # Before any thread has decoded a large body: six threads that did so at once left 55 MiB in
        # six heaps of their own.
        keep_heap_compact()
        if on_started is not None:
            self._server.on_started = lambda: on_started(url_of(self._listener))
        try:
            await self._server.serve(sockets=[self._listener])
        finally:
            self._listener.close()

    def stop(self) -> None:
        """Accept no more connections and let `run` end; safe at any time and more than once.

        To be called on the event loop's thread.
        """
        self._server.stop()


_TICKS_PER_SECOND = 10
"""How uvicorn counts: every tenth tick renews the date header."""


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers, and with a word when it has started."""

    on_started: Callable[[], None] | None = None

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        self.should_exit = True
        self._stopping.set()

    async def main_loop(self) -> None:
        # uvicorn looks ten times a second whether it should end, which beside a large model costs
        # as much CPU as two tokens; here only the date header needs a look, once a second.
        seconds = itertools.count()
        while not await self.on_tick(_TICKS_PER_SECOND * next(seconds)):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), 1.0)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self.on_started is not None:
            self.on_started()
