"""Following events: the file and the stream together, with every event shown once."""

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import msgspec
import pytest

from brim.cli import event_follow
from brim.cli.event_follow import Follower, Wanted, listen
from brim.cli.state import ServerState
from brim.core.event import Event, EventKind
from brim.telemetry.event_store import StoredEvent

LOADED, DIED = EventKind.MODEL_LOADED, EventKind.WORKER_DIED


def happened(at_unix_s: float, kind: EventKind = LOADED, model: str = "a") -> Event:
    return Event(at_unix_s=at_unix_s, kind=kind, model=model)


class Ended(Exception):
    """In place of a reader who has seen enough."""


class File:
    """An event file, as far as it was written; what is asked for is `wanted`."""

    def __init__(self, *events: Event, wanted: Wanted) -> None:
        self.events = list(events)
        self._wanted = wanted

    def read(self, limit: int | None = None, *, after_place: int = 0) -> list[StoredEvent]:
        found = [
            StoredEvent(place, event)
            for place, event in enumerate(self.events, start=1)
            if place > after_place and self._wanted.takes(event)
        ]
        return found if limit is None else found[len(found) - limit :] if limit else []


def followed(
    monkeypatch: pytest.MonkeyPatch,
    file: File,
    heard: Callable[[File], Iterator[Event | None]],
    *,
    wanted: Wanted,
    limit: int = 50,
    num_streams: int = 1,
) -> list[float]:
    """The times of all events that are shown when streams say this; waiting takes a second."""
    shown: list[float] = []
    now_s = [0.0]
    server = ServerState(
        pid=1, started_unix_s=0, host="127.0.0.1", port=1, drain_limit_s=0, state_directory="/s"
    )

    def wait(seconds: float) -> None:
        now_s[0] += 1.0
        if seconds == event_follow.POLL_S and now_s[0] > 100:
            raise Ended

    monkeypatch.setattr(event_follow, "live_servers", lambda: [server] if now_s[0] < 50 else [])
    streams = iter([heard(file) for _ in range(num_streams)])
    empty: Iterator[Event | None] = iter(())
    monkeypatch.setattr(event_follow, "listen", lambda server, since_unix_s: next(streams, empty))
    follower = Follower(
        Path("/s"),
        file.read,
        wanted,
        lambda event: shown.append(event.at_unix_s),
        wait=wait,
        clock=lambda: now_s[0],
    )
    with pytest.raises(Ended):
        follower.run(limit)
    return shown


@pytest.mark.parametrize(("limit", "first"), [(50, [1, 2]), (1, [2]), (0, [])])
def test_what_a_stream_repeats_is_shown_once(
    monkeypatch: pytest.MonkeyPatch, limit: int, first: list[float]
) -> None:
    """Before and behind the seam, whether it is in the file earlier or later than it is heard."""

    def heard(file: File) -> Iterator[Event | None]:
        yield None
        yield happened(2)
        file.events += [happened(3), happened(4)]
        yield happened(3)
        yield happened(4)

    file = File(happened(1), happened(2), wanted=Wanted())
    shown = followed(monkeypatch, file, heard, wanted=Wanted(), limit=limit)
    assert shown == [*first, 3, 4]


def test_what_the_file_does_not_take_is_shown_as_it_was_heard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And not again where it is written late; nothing behind it is lost."""

    def heard(file: File) -> Iterator[Event | None]:
        yield happened(1)
        file.events += [happened(1), happened(2)]
        yield happened(2)

    shown = followed(monkeypatch, File(wanted=Wanted()), heard, wanted=Wanted())
    assert shown == [1, 2]


def test_what_nobody_asked_for_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not from the file, and not where it is only heard."""
    wanted = Wanted(kinds=[DIED], model="a")

    def heard(file: File) -> Iterator[Event | None]:
        yield happened(1)
        yield happened(2, DIED, model="b")
        yield happened(3, DIED)

    assert followed(monkeypatch, File(wanted=wanted), heard, wanted=wanted) == [3]


def test_what_comes_without_a_stream_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that ends leaves the file, which is looked at until there is another one."""

    def heard(file: File) -> Iterator[Event | None]:
        yield None
        file.events.append(happened(len(file.events)))

    shown = followed(monkeypatch, File(wanted=Wanted()), heard, wanted=Wanted(), num_streams=3)
    assert shown == [0, 1, 2]


@pytest.fixture
def stream() -> Iterator[tuple[ServerState, list[str]]]:
    """A server with an event stream, and the requests that it was sent."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(f"{self.path} {self.headers['Authorization']}")
            if len(asked) > 1:
                self.send_error(429)
                return
            self.send_response(200)
            self.end_headers()
            data = msgspec.json.encode(happened(7)).decode()
            newer = '{"at_unix_s": 8, "kind": "model sold"}'
            self.wfile.write(f": nothing new\n\ndata: {data}\n\ndata: {newer}\n\n".encode())

        def log_message(self, format: str, *args: object) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        state = ServerState(
            pid=1, started_unix_s=0, host="127.0.0.1", port=server.server_port, drain_limit_s=0,
            operator_token="secret",
        )  # fmt: skip
        yield state, asked
        server.shutdown()
        thread.join()


def test_a_stream_is_listened_to_as_the_operator(stream: tuple[ServerState, list[str]]) -> None:
    """Comments and kinds of another version say that something is there; a refusal ends it."""
    server, asked = stream
    assert list(listen(server, since_unix_s=1.5)) == [None, happened(7), None]
    assert asked == ["/brim/events?since=1.500 Bearer secret"]
    assert list(listen(server, since_unix_s=1.5)) == []
    gone = msgspec.structs.replace(server, port=1)
    assert list(listen(gone, since_unix_s=0)) == []
