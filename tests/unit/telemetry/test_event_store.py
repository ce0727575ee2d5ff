"""Events outlive the server that recorded them, and never fail it."""

import sqlite3
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from brim.core.event import Event, EventKind
from brim.errors import ConfigError
from brim.telemetry.event_store import MAX_PENDING, EventStore


def event(
    at_s: float,
    kind: EventKind = EventKind.MODEL_LOADED,
    *,
    model: str = "",
    app: str = "",
    cause: str = "",
) -> Event:
    return Event(at_unix_s=at_s, kind=kind, model=model, app=app, cause=cause)


def written(path: Path, *events: Event, max_events: int = 100) -> EventStore:
    """A store that recorded these and was closed."""
    store = EventStore(path, max_events=max_events)
    for each in events:
        store.record(each)
    store.close()
    return store


def times(store: EventStore, limit: int | None = None, **conditions: object) -> list[float]:
    found = store.read(limit, **conditions)  # type: ignore[arg-type]
    return [stored.event.at_unix_s for stored in found]


def test_an_event_is_read_as_it_was_recorded(tmp_path: Path) -> None:
    """Every field of an event comes back, from another store on the same file."""
    full = Event(
        at_unix_s=1795312929.996664,
        kind=EventKind.IDLE_KV_DROPPED,
        cause="the system reports warning pressure\n",
        model="m",
        app="mail",
        before_bytes=2**40,
        after_bytes=0,
        before_watts=18.25,
        after_watts=None,
        took_s=0.125,
        detail={"tokens": 512, "why": "ü"},
        is_simulated=True,
    )
    written(tmp_path / "e.sqlite", full)
    assert [stored.event for stored in EventStore(tmp_path / "e.sqlite").read()] == [full]


def test_the_newest_are_kept(tmp_path: Path) -> None:
    """Of more events than are kept the oldest go, also over several servers."""
    path = tmp_path / "e.sqlite"
    written(path, *(event(n) for n in range(7)), max_events=5)
    assert times(written(path, event(7), max_events=5)) == [3, 4, 5, 6, 7]


def test_events_are_found_by_what_they_are(tmp_path: Path) -> None:
    """Kind, model, app, time and place narrow the list, together; the newest are taken."""
    store = written(
        tmp_path / "e.sqlite",
        event(1, model="a"),
        event(2, EventKind.MODEL_UNLOADED, model="a"),
        event(3, model="b", app="mail"),
        event(4, EventKind.KV_SHRUNK, model="a"),
    )
    assert times(store, 2) == [3, 4]
    assert times(store, 0) == []
    assert times(store, kinds=[EventKind.MODEL_UNLOADED, EventKind.KV_SHRUNK]) == [2, 4]
    assert times(store, model="a", since_unix_s=2) == [2, 4]
    assert times(store, app="mail") == [3]
    assert times(store, model="a", kinds=[EventKind.MODEL_LOADED]) == [1]
    place = store.read(1)[0].place
    assert times(store, after_place=place - 1) == [4]
    assert times(store, after_place=place) == []


def test_no_file_is_no_events(tmp_path: Path) -> None:
    """Where no server ever ran there is nothing to read, and reading makes no file."""
    assert EventStore(tmp_path / "none" / "e.sqlite").read() == []
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    """Who uses what is nobody else's business: no other user may read it or its journals."""
    path = tmp_path / "state" / "e.sqlite"
    store = EventStore(path)
    store.record(event(1))
    store.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_closed_store_loses_events_and_says_how_many(tmp_path: Path) -> None:
    """After the end nothing is written, and closing again does nothing."""
    store = written(tmp_path / "e.sqlite", event(1))
    store.record(event(2))
    store.close()
    assert (times(store), store.num_lost) == ([1], 1)


def test_a_store_that_cannot_write_says_so_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A disk that takes nothing costs events and one line, never an exception."""
    (tmp_path / "file").write_text("no directory")
    store = written(tmp_path / "file" / "e.sqlite", event(1), event(2), event(3))
    assert store.num_lost == 3
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "event_store_failed" in err


def test_a_full_disk_loses_what_does_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite's own answer to a full disk is counted, said once, and over with the next success."""
    connect = sqlite3.connect

    def small(path: Path | str, **options: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(path, **options)
        connection.execute("PRAGMA max_page_count = 12")
        return connection

    monkeypatch.setattr(sqlite3, "connect", small)
    large = event(1, cause="x" * 60_000)
    store = written(tmp_path / "e.sqlite", event(0), large, large, event(2))
    assert (times(store), store.num_lost) == ([0, 2], 2)
    err = capsys.readouterr().err
    assert "database or disk is full" in err
    assert err.count("event_store_failed") == 1


def no_database(path: Path) -> None:
    path.write_bytes(b"not a database, but longer than the head of one" * 100)


def other_database(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE event (x)")
    connection.close()


@pytest.mark.parametrize("damage", [no_database, other_database])
def test_a_damaged_file_is_put_aside(
    tmp_path: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """New events are worth more than a file that cannot be read, which stays under another name."""
    path = tmp_path / "e.sqlite"
    damage(path)
    store = written(path, event(1), event(2))
    assert (times(store), store.num_lost) == ([1, 2], 0)
    kept = (tmp_path / "e.sqlite.damaged").read_bytes()
    assert b"not a database" in kept or b"CREATE TABLE event (x)" in kept
    assert capsys.readouterr().err.count("event_store_damaged") == 1


def test_a_damaged_file_cannot_be_read(tmp_path: Path) -> None:
    """Reading a damaged file says what to do, and leaves it as it is."""
    path = tmp_path / "e.sqlite"
    no_database(path)
    with pytest.raises(ConfigError, match=r"e\.sqlite cannot be read .*move it away"):
        EventStore(path).read()
    assert [entry.name for entry in tmp_path.iterdir()] == ["e.sqlite"]


def test_a_newer_file_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The events of a newer brim are neither written, nor read, nor moved."""
    path = tmp_path / "e.sqlite"
    written(path, event(1))
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 2")
    connection.close()
    store = written(path, event(2))
    assert store.num_lost == 1
    assert "is of a newer brim (format 2, this one knows 1)" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="newer brim"):
        store.read()
    assert not (tmp_path / "e.sqlite.damaged").exists()


def test_an_event_of_an_unknown_kind_is_left_out(tmp_path: Path) -> None:
    """What a newer version records under this format is skipped by one that does not know it."""
    path = tmp_path / "e.sqlite"
    store = written(path, event(1), event(2))
    with sqlite3.connect(path) as connection:
        connection.execute(
            """UPDATE event SET json = '{"at_unix_s":1,"kind":"moved house"}' WHERE id = 1"""
        )
    connection.close()
    assert times(store) == [2]


def test_a_reader_sees_events_while_the_server_runs(tmp_path: Path) -> None:
    """An event can be read by others before the server ends: a crash takes none of them."""
    path = tmp_path / "e.sqlite"
    store = EventStore(path)
    for number in range(3):
        store.record(event(number))
    while len(found := times(EventStore(path))) < 3:
        assert store.num_lost == 0
    assert found == [0, 1, 2]
    store.close()


def test_recording_never_waits_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the disk hangs events queue up to a bound, and those beyond it are lost and counted."""
    import threading

    hangs = threading.Event()
    insert = EventStore._insert

    def slow(self: EventStore, each: Event) -> None:
        hangs.wait(30)
        insert(self, each)

    monkeypatch.setattr(EventStore, "_insert", slow)
    store = EventStore(tmp_path / "e.sqlite", max_events=5)
    for number in range(MAX_PENDING + 50):
        store.record(event(number))
    assert 49 <= store.num_lost <= 50
    monkeypatch.setattr(EventStore, "_insert", lambda self, each: None)
    hangs.set()
    store.close()
