"""The file of usage: each request counted once, whatever ends the server."""

import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from brim.apps.usage import (
    KEEP_DAYS,
    Reservation,
    Spent,
    UsageStore,
    _Batch,
    read_reserved,
    read_usage,
)
from brim.errors import ConfigError

DAY = "2027-01-15"
NOON = 1_800_014_400.0
MAIL = Reservation(app="mail", day=DAY, model="m", num_prompt_tokens=100, max_completion_tokens=50)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "usage.sqlite"


@pytest.fixture
def store(path: Path) -> Iterator[UsageStore]:
    store = UsageStore(path, now=lambda: NOON)
    yield store
    store.close()


def in_file(path: Path) -> dict[tuple[str, str], Spent]:
    return {(line.app, line.model): line.spent for line in read_usage(path, since_day=DAY)}


ENDED = Spent(num_requests=1, num_prompt_tokens=100, num_cached_tokens=80, num_completion_tokens=20)


def test_a_request_that_ends_is_counted(store: UsageStore, path: Path) -> None:
    """Its reservation stands in the file while it runs, and what it used after."""
    number = store.begin(MAIL)
    store.flush()
    assert read_reserved(path) == {("mail", DAY): 150}
    assert in_file(path) == {}
    store.end(number, MAIL, ENDED)
    store.flush()
    assert read_reserved(path) == {}
    assert in_file(path) == {("mail", "m"): ENDED}
    assert store.spent("mail", DAY) == ENDED


def test_counts_add_up(store: UsageStore, path: Path) -> None:
    """Requests of one model are one line, those of another and what has no model are others."""
    for model in ("m", "m", "n"):
        reservation = Reservation(
            app="mail", day=DAY, model=model, num_prompt_tokens=100, max_completion_tokens=50
        )
        store.end(store.begin(reservation), reservation, ENDED)
    store.note("mail", DAY, Spent(energy_j=1.5))
    store.note("mail", DAY, Spent(energy_j=2.0, ssd_write_bytes=7, num_refused=1))
    store.note("chat", DAY, Spent(num_refused=1))
    store.flush()
    assert in_file(path) == {
        ("mail", "m"): ENDED + ENDED,
        ("mail", "n"): ENDED,
        ("mail", ""): Spent(energy_j=3.5, ssd_write_bytes=7, num_refused=1),
        ("chat", ""): Spent(num_refused=1),
    }
    assert store.spent("mail", DAY).num_requests == 3
    assert store.spent("chat", "2027-01-14") == Spent()


def test_what_a_crash_cut_counts_in_full(store: UsageStore, path: Path) -> None:
    """Prompt and bound, in the day of its begin, once, however often servers start."""
    store.begin(MAIL)
    ended = store.begin(MAIL)
    store.end(ended, MAIL, ENDED)
    store.flush()
    for _ in range(3):
        UsageStore(path, now=lambda: NOON).close()
    lost = Spent(num_requests=1, num_prompt_tokens=100, num_lost_tokens=50)
    assert in_file(path) == {("mail", "m"): ENDED + lost}
    assert (ENDED + lost).num_tokens == 120 + 150
    assert read_reserved(path) == {}


def test_an_end_that_was_not_written_counts_as_a_crash(
    store: UsageStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either the reservation or the use is in the file, never both and never neither."""
    number = store.begin(MAIL)
    store.flush()
    monkeypatch.setattr(store, "_commit", lambda batch: sqlite3.OperationalError("disk full"))
    store.end(number, MAIL, ENDED)
    store.flush()
    UsageStore(path, now=lambda: NOON).close()
    assert in_file(path)["mail", "m"].num_tokens == 150


def test_a_disk_that_fails_loses_nothing_of_a_running_server(
    store: UsageStore,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """What could not be written is tried again, in any order of begins and ends; said once."""
    monkeypatch.setattr("brim.apps.usage.RETRY_PERIOD_S", 0.0)
    real, fails = store._commit, threading.Event()
    fails.set()
    monkeypatch.setattr(
        store,
        "_commit",
        lambda batch: sqlite3.OperationalError("disk full") if fails.is_set() else real(batch),
    )
    first, second = store.begin(MAIL), store.begin(MAIL)
    store.flush()
    store.end(first, MAIL, ENDED)
    store.flush()
    third = store.begin(MAIL)
    store.end(third, MAIL, ENDED)
    assert store.num_failures >= 2
    fails.clear()
    store.flush()
    while store._batch:
        store.flush()
    assert in_file(path) == {("mail", "m"): ENDED + ENDED}
    assert read_reserved(path) == {("mail", DAY): 150}
    store.end(second, MAIL, ENDED)
    store.flush()
    assert in_file(path)["mail", "m"].num_requests == 3
    assert capfd.readouterr().err.count("usage_failed") == 1


def test_what_could_not_be_written_takes_in_what_came_later() -> None:
    """A request that began and ended meanwhile needs no line; one that began later has its own."""
    unwritten, later = _Batch(), _Batch()
    unwritten.begun = {1: MAIL, 2: MAIL}
    unwritten.ended = {7}
    unwritten.count(("mail", DAY, "m"), ENDED)
    later.end(2)
    later.end(8)
    later.begun[3] = MAIL
    later.count(("mail", DAY, "m"), ENDED)
    unwritten.absorb(later)
    assert unwritten.begun == {1: MAIL, 3: MAIL}
    assert unwritten.ended == {7, 8}
    assert unwritten.spent == {("mail", DAY, "m"): ENDED + ENDED}


def test_close_writes_what_is_left(path: Path) -> None:
    """Nothing waits for the next second when a server stops."""
    store = UsageStore(path, now=lambda: NOON)
    store.note("mail", DAY, Spent(energy_j=1.0))
    store.close()
    store.close()
    assert in_file(path) == {("mail", ""): Spent(energy_j=1.0)}


def test_old_days_are_forgotten(store: UsageStore, path: Path) -> None:
    """Usage is kept for 400 days from the start of a server."""
    store.note("mail", DAY, Spent(energy_j=1.0))
    store.flush()
    UsageStore(path, now=lambda: NOON + KEEP_DAYS * 86_400).close()
    assert in_file(path) != {}
    UsageStore(path, now=lambda: NOON + (KEEP_DAYS + 1) * 86_400).close()
    assert in_file(path) == {}


def test_reading_makes_and_changes_nothing(store: UsageStore, path: Path, tmp_path: Path) -> None:
    """A command beside the server leaves its reservations, and no file where there is none."""
    store.begin(MAIL)
    store.flush()
    read_usage(path, since_day=DAY)
    assert read_reserved(path) == {("mail", DAY): 150}
    assert read_usage(tmp_path / "none.sqlite", since_day=DAY) == []
    assert not (tmp_path / "none.sqlite").exists()


def test_lines_are_newest_first_and_of_one_app_where_asked(store: UsageStore, path: Path) -> None:
    """Days before the first that is asked for are left out."""
    for app, day in (("b", "2027-01-13"), ("a", "2027-01-14"), ("b", DAY), ("a", DAY)):
        store.note(app, day, Spent(num_refused=1))
    store.flush()
    lines = read_usage(path, since_day="2027-01-14")
    assert [(line.day, line.app) for line in lines] == [
        (DAY, "a"), (DAY, "b"), ("2027-01-14", "a"),
    ]  # fmt: skip
    assert [line.day for line in read_usage(path, since_day="2027-01-01", app="b")] == [
        DAY, "2027-01-13",
    ]  # fmt: skip


def test_a_damaged_file_is_refused(path: Path) -> None:
    """Budgets are in it, so it is not begun anew behind the operator's back."""
    path.write_bytes(b"x" * 5000)
    for use in (lambda: UsageStore(path), lambda: read_usage(path, since_day=DAY)):
        with pytest.raises(ConfigError, match=r"is damaged .*what apps used"):
            use()
