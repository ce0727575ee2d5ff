"""The events of a server: the newest kept in memory, everyone who listens told, and a sink.

One thread, the event loop's, records and listens.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable

from brim.core.event import Event

NUM_KEPT = 1000
"""Days of a quiet server, and the whole of any bad hour."""

NUM_PENDING = 256
"""A listener that is this far behind has gone or hangs; it is told no more than these."""


class EventLog:
    """Records events and hands them on.

    Args:
        sink: Told of each event as well, such as a file that outlives the server.
    """

    def __init__(self, sink: Callable[[Event], None] | None = None) -> None:
        self._sink = sink
        self._events: deque[Event] = deque(maxlen=NUM_KEPT)
        self._listeners: set[asyncio.Queue[Event]] = set()

    def record(self, event: Event) -> None:
        """Keep an event and tell everyone; never blocks."""
        self._events.append(event)
        if self._sink is not None:
            self._sink(event)
        for listener in self._listeners:
            if not listener.full():
                listener.put_nowait(event)

    def events(self) -> list[Event]:
        """The newest ones, oldest first."""
        return list(self._events)

    async def listen(self) -> AsyncIterator[Event]:
        """Every event from now on, until the caller stops asking."""
        queue: asyncio.Queue[Event] = asyncio.Queue(NUM_PENDING)
        self._listeners.add(queue)
        try:
            while True:
                yield await queue.get()
        finally:
            self._listeners.discard(queue)
