"""Events as they happen: told by the stream of the server that runs, and read from its file.

The stream says that something has happened, and the file what: its places rise, so that no event is
shown twice or left out where one server ends and the next begins.  Where no server can be listened
to, the file is looked at a few times a second.
"""

import contextlib
import http.client
import time
import urllib.parse
from collections import deque
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import msgspec

from brim.cli.neighbours import operator_headers
from brim.cli.state import ServerState, live_servers
from brim.core.event import Event, EventKind
from brim.server.stream import HEARTBEAT_S
from brim.telemetry.event_store import StoredEvent

POLL_S = 0.25
"""Between two looks at the file while no server is listened to: at once for a person."""

WRITE_POLL_S = 0.02
WRITE_LIMIT_S = 1.0
"""For what was heard to be in the file, where it is a few milliseconds after it was recorded; a
disk that takes longer is full or hangs, and the event is shown as it was heard."""

OVERLAP_S = 5.0
"""Before the beginning of a stream, that it repeats: what the file did not have yet."""

NUM_RECENT = 1000
"""Events that are known to have been shown: all that a stream can repeat."""

SILENCE_LIMIT_S = 3 * HEARTBEAT_S
"""A server that says nothing for so long hangs."""

Read = Callable[..., list[StoredEvent]]
"""`EventStore.read`, with what is asked for."""


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """Which events are asked for; all of them where nothing is."""

    kinds: Collection[EventKind] = ()
    model: str | None = None
    app: str | None = None

    def takes(self, event: Event) -> bool:
        """Whether an event is among them.

        Example:
            >>> Wanted(model="a").takes(Event(at_unix_s=0, kind=EventKind.MODEL_LOADED, model="b"))
            False
        """
        return (
            (not self.kinds or event.kind in self.kinds)
            and self.model in (None, event.model)
            and self.app in (None, event.app)
        )


class Follower:
    """Shows what is kept, and then what happens.

    Args:
        directory: The state directory.
        read: Reads its file.
        wanted: What is asked for; `read` gives no other events either.
        show: Told of each event once.
        wait: Waits so many seconds.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        directory: Path,
        read: Read,
        wanted: Wanted,
        show: Callable[[Event], None],
        *,
        wait: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = directory
        self._read = read
        self._wanted = wanted
        self._show = show
        self._wait = wait
        self._clock = clock
        self._place = 0
        self._shown: deque[Event] = deque(maxlen=NUM_RECENT)
        self._only_heard: deque[Event] = deque(maxlen=NUM_RECENT)
        """Shown without being in the file."""

    def run(self, limit: int) -> None:
        """Show the newest `limit` events, and go on until somebody ends it."""
        found = self._read(max(limit, NUM_RECENT))
        for number, stored in enumerate(found, start=1):
            self._take(stored, shows=number > len(found) - limit)
        while True:
            for server in live_servers():
                if Path(server.state_directory) == self._directory:
                    self._listen(server)
            self._wait(POLL_S)
            self._catch_up()

    def _listen(self, server: ServerState) -> None:
        for event in listen(server, since_unix_s=time.time() - OVERLAP_S):
            self._catch_up()
            if event is not None and self._wanted.takes(event):
                self._expect(event)

    def _expect(self, event: Event) -> None:
        """Show an event that was heard: from the file, or as it is where it does not come."""
        deadline_s = self._clock() + WRITE_LIMIT_S
        while event not in self._shown:
            if self._clock() >= deadline_s:
                self._shown.append(event)
                self._only_heard.append(event)
                self._show(event)
                return
            self._wait(WRITE_POLL_S)
            self._catch_up()

    def _catch_up(self) -> None:
        """Show what the file has beyond the last place."""
        for stored in self._read(after_place=self._place):
            is_late = stored.event in self._only_heard
            if is_late:  # it was written after all
                self._only_heard.remove(stored.event)
            self._take(stored, shows=not is_late)

    def _take(self, stored: StoredEvent, *, shows: bool) -> None:
        self._place = max(self._place, stored.place)
        self._shown.append(stored.event)
        if shows:
            self._show(stored.event)


def listen(server: ServerState, *, since_unix_s: float) -> Iterator[Event | None]:
    """Events of a server as they happen; None, at first at once, where it says that it is there.

    Ends where the server stops or hangs, or has no place for one more reader.

    Args:
        server: The server.
        since_unix_s: Events that are older are not repeated.
    """
    address = urllib.parse.urlsplit(server.url)
    connection = http.client.HTTPConnection(
        address.hostname or "", address.port, timeout=SILENCE_LIMIT_S
    )
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        path = f"/brim/events?since={since_unix_s:.3f}"
        connection.request("GET", path, headers=operator_headers(server))
        response = connection.getresponse()
        if response.status != http.HTTPStatus.OK:
            return
        while line := response.readline():
            if line.startswith(b"data:"):
                yield _event(line.removeprefix(b"data:"))
            elif line.startswith(b":"):
                yield None


def _event(data: bytes) -> Event | None:
    """None where it is of a kind that only another version knows."""
    with contextlib.suppress(msgspec.MsgspecError):
        return msgspec.json.decode(data, type=Event)
    return None
