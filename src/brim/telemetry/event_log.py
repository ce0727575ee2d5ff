"""The events of a server: the newest kept in memory, everyone who listens told, and a sink.

One thread, the event loop's, records and listens.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Iterator

from brim.core.event import Event

NUM_KEPT = 1000
"""Days of a quiet server, and the whole of any bad hour."""

NUM_PENDING = 256
"""A listener that is this far behind has gone or hangs; it is told these and no more."""


class Listener:
    """Everything that is recorded while somebody listens; `EventLog.listening` gives one."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Event] = asyncio.Queue(NUM_PENDING)
        self._is_behind = False

    def hear(self, event: Event) -> None:
        """Take an event in; the first for which there is no room, and all after it, are lost."""
        if self._is_behind or self._queue.full():
            self._is_behind = True
        else:
            self._queue.put_nowait(event)

    async def next(self) -> Event | None:
        """The next event, oldest first; None where events behind it were lost."""
        if self._is_behind and self._queue.empty():
            return None
        return await self._queue.get()


class EventLog:
    """Records events and hands them on.

    Args:
        sink: Told of each event as well, such as a file that outlives the server.
    """

    def __init__(self, sink: Callable[[Event], None] | None = None) -> None:
        self._sink = sink
        self._events: deque[Event] = deque(maxlen=NUM_KEPT)
        self._listeners: set[Listener] = set()

    def record(self, event: Event) -> None:
        """Keep an event and tell everyone; never blocks."""
        self._events.append(event)
        if self._sink is not None:
            self._sink(event)
        for listener in self._listeners:
            listener.hear(event)

    def events(self) -> list[Event]:
        """The newest ones, oldest first."""
        return list(self._events)

    @contextlib.contextmanager
    def listening(self) -> Iterator[Listener]:
        """Hear what is recorded from this moment on, without a gap behind `events()`."""
        listener = Listener()
        self._listeners.add(listener)
        try:
            yield listener
        finally:
            self._listeners.discard(listener)
