"""The gateway's end of a worker's socket: bytes in, frames out, on the event loop."""

import asyncio
from collections.abc import Callable
from typing import cast

from brim.errors import EngineError
from brim.worker import protocol


class Connection(asyncio.Protocol):
    """Decodes what one worker sends, until the socket ends or something else comes than frames.

    Args:
        on_frame: Called with each frame, in order; must not block.
        on_lost: Called once, with what was wrong with the worker's bytes, or None where the socket
            just ended.
    """

    def __init__(
        self,
        on_frame: Callable[[protocol.WorkerFrame], None],
        on_lost: Callable[[str | None], None],
    ) -> None:
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._frames = protocol.worker_frames()
        self._transport: asyncio.Transport | None = None
        self._violation: str | None = None

    def send(self, frame: protocol.GatewayFrame) -> None:
        """Hand a frame to the event loop; what the socket does not take now goes out later."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(protocol.encode(frame))

    def abort(self) -> None:
        """Close at once; `on_lost` follows."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        # Not an isinstance check: uvloop's transports have the methods and not the base class.
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        try:
            for frame in self._frames.feed(data):
                self._on_frame(frame)
        except EngineError as error:
            # After one bad frame nothing tells where the next begins.
            self._violation = error.message
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the event loop."""
        self._on_lost(self._violation)
