"""What was planned and what was measured, load by load, in one SQLite file.

The figures behind the published error of the forecasts, and behind their correction.  A store that
cannot be read or written never fails a load or a request: it is counted, said once, and a damaged
file is put aside and begun anew.  Every method blocks; call it outside an event loop.
"""

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from brim.ledger.correction import PastErrors
from brim.telemetry.events import log_event

LOADS_PER_MODEL = 64
"""Kept of each model, engine and machine: beyond, a load weighs less than 2^-16."""

MAX_ROWS = 20_000
"""Of the whole file, about 2 MB: some seventy models with all their loads and terms."""

BUSY_LIMIT_S = 1.0
"""For another process to finish its write; then the measurement is lost rather than waited for."""

FORMAT_VERSION = 1
"""SQLite's user_version; 0 is what brim wrote before it kept one, with the same table.  Raise it
with every change of the table, and lead older files to it in `_bring_up_to_date`."""

REFUSED = "refused"
"""In place of a term: the correction alone stood in the way of a load."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS forecast (
    id INTEGER PRIMARY KEY,
    fingerprint TEXT NOT NULL,
    engine TEXT NOT NULL,
    machine TEXT NOT NULL,
    load_id TEXT NOT NULL,
    term TEXT NOT NULL,
    planned_bytes INTEGER NOT NULL,
    measured_bytes INTEGER NOT NULL,
    recorded_unix_s REAL NOT NULL,
    UNIQUE (load_id, term)
);
CREATE INDEX IF NOT EXISTS by_model ON forecast (fingerprint, engine, machine, id);
"""

R = TypeVar("R")


class Subject(msgspec.Struct, frozen=True):
    """What a forecast was made for."""

    fingerprint: str
    """Of the model's file."""
    engine: str
    machine: str


class ForecastError(msgspec.Struct, frozen=True, kw_only=True):
    """One term of one load."""

    term: str
    planned_bytes: int
    measured_bytes: int

    error_percent: float | None
    """By how much the forecast was too high (above 0) or too low; None where nothing was taken."""

    @classmethod
    def of(cls, term: str, planned_bytes: int, measured_bytes: int) -> "ForecastError":
        """The error of one term.

        Example:
            >>> ForecastError.of("kv_bytes", 103, 100).error_percent
            3.0
        """
        percent = None
        if measured_bytes:
            percent = round(100.0 * (planned_bytes - measured_bytes) / measured_bytes, 3)
        return cls(
            term=term,
            planned_bytes=planned_bytes,
            measured_bytes=measured_bytes,
            error_percent=percent,
        )


class ForecastHistory:
    """The store.

    Args:
        path: The file; None keeps it in memory for as long as the process lives.
        now: Unix seconds.
    """

    def __init__(self, path: Path | None, *, now: Callable[[], float] = time.time) -> None:
        self._path = path
        self._now = now
        self._connection: sqlite3.Connection | None = None
        self._lock = threading.Lock()
        self.num_failures = 0

    def record(self, subject: Subject, load_id: str, terms: Mapping[str, tuple[int, int]]) -> None:
        """Keep (planned, measured) of some terms of one load; a term again replaces it."""

        def write(connection: sqlite3.Connection) -> None:
            rows = [
                (*msgspec.structs.astuple(subject), load_id, term, *_bounded(pair), self._now())
                for term, pair in terms.items()
            ]
            with connection:
                connection.executemany(
                    "INSERT INTO forecast (fingerprint, engine, machine, load_id, term, "
                    "planned_bytes, measured_bytes, recorded_unix_s) VALUES (?,?,?,?,?,?,?,?) "
                    "ON CONFLICT (load_id, term) DO UPDATE SET planned_bytes = "
                    "excluded.planned_bytes, measured_bytes = excluded.measured_bytes",
                    rows,
                )
                _prune(connection, subject)

        self._guarded(write, None)

    def record_refusal(self, subject: Subject, load_id: str) -> None:
        """Keep that only the correction refused a load, so that the correction ages."""
        self.record(subject, load_id, {REFUSED: (0, 0)})

    def past_errors(self, subject: Subject) -> PastErrors:
        """Ratios of measured over planned for each term, newest first, and refusals since."""

        def read(connection: sqlite3.Connection) -> PastErrors:
            ratios: dict[str, list[float]] = {}
            num_refused, is_newest = 0, True
            for term, planned, measured in connection.execute(
                "SELECT term, planned_bytes, measured_bytes FROM forecast WHERE fingerprint = ? "
                "AND engine = ? AND machine = ? "
                # A column keeps whatever somebody wrote into it.
                "AND typeof(planned_bytes) = 'integer' AND typeof(measured_bytes) = 'integer' "
                "ORDER BY id DESC",
                msgspec.structs.astuple(subject),
            ):
                if term == REFUSED:
                    num_refused += is_newest
                    continue
                is_newest = False
                if planned > 0 and measured > 0:
                    ratios.setdefault(term, []).append(measured / planned)
            return PastErrors(
                ratios={term: tuple(found) for term, found in ratios.items()},
                num_refused=num_refused,
            )

        return self._guarded(read, PastErrors())

    def close(self) -> None:
        """Give the file back; the next call opens it again."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _guarded(self, work: Callable[[sqlite3.Connection], R], otherwise: R) -> R:
        """Do the work, or give `otherwise` where the file does not let us.

        A damaged file is moved aside and the work done on a new one.
        """
        with self._lock:
            for is_last in (False, True):
                try:
                    return work(self._opened())
                except (sqlite3.Error, OSError) as exc:
                    self._note_failure(exc)
                    if is_last or not _is_damage(exc) or not self._put_aside():
                        return otherwise
        return otherwise

    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            if self._path is not None:
                _make_private(self._path)
            connection = sqlite3.connect(
                ":memory:" if self._path is None else self._path,
                timeout=BUSY_LIMIT_S,
                check_same_thread=False,  # the lock lets one thread in at a time
            )
            try:
                # Readers never wait for a writer, and a process that is killed leaves a good file.
                connection.execute("PRAGMA journal_mode = WAL")
                # A measurement that a power cut takes is no loss; waiting for the disk would be.
                connection.execute("PRAGMA synchronous = NORMAL")
                _bring_up_to_date(connection)
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def _note_failure(self, exc: Exception) -> None:
        self.num_failures += 1
        if self.num_failures == 1:
            log_event("forecast_history_failed", path=self._path, reason=exc)

    def _put_aside(self) -> bool:
        """Move the file and its journals out of the way; False where that fails as well."""
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None
        if self._path is None:
            return False
        try:
            for path in _files(self._path):
                if path.exists():
                    path.replace(path.with_name(path.name + ".damaged"))
        except OSError:
            return False
        return True


class _NewerError(sqlite3.OperationalError):
    """The file is of a newer brim, which will want it back: nothing is read or written."""


def _make_private(path: Path) -> None:
    # SQLite gives its journals the mode of the file, so it must be right before they are made.
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))


def _bring_up_to_date(connection: sqlite3.Connection) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > FORMAT_VERSION:
        raise _NewerError(
            f"it is of a newer brim (format {version}, this one knows {FORMAT_VERSION}), so that "
            "forecasts are not corrected by it"
        )
    connection.executescript(_SCHEMA)
    if version < FORMAT_VERSION:
        connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")


def _files(path: Path) -> Iterator[Path]:
    yield path
    for suffix in ("-wal", "-shm"):
        yield path.with_name(path.name + suffix)


def _is_damage(exc: Exception) -> bool:
    """Whether the file itself is wrong, rather than busy, read-only or on a full disk.

    An older or foreign schema shows as an OperationalError about a table or a column.
    """
    if isinstance(exc, sqlite3.OperationalError):
        return "no such column" in str(exc) or "has no column" in str(exc)
    return isinstance(exc, sqlite3.DatabaseError)


def _bounded(pair: tuple[int, int]) -> tuple[int, int]:
    # SQLite's integers have 64 bits; nothing that is measured comes near.
    planned, measured = pair
    return min(planned, 2**62), min(measured, 2**62)


def _prune(connection: sqlite3.Connection, subject: Subject) -> None:
    """Forget what lies beyond the bounds, oldest first."""
    connection.execute(
        "DELETE FROM forecast WHERE fingerprint = ?1 AND engine = ?2 AND machine = ?3 AND load_id "
        "NOT IN (SELECT load_id FROM forecast WHERE fingerprint = ?1 AND engine = ?2 AND machine = "
        "?3 GROUP BY load_id ORDER BY max(id) DESC LIMIT ?4)",
        (*msgspec.structs.astuple(subject), LOADS_PER_MODEL),
    )
    connection.execute(
        "DELETE FROM forecast WHERE id <= (SELECT max(id) FROM forecast) - ?", (MAX_ROWS,)
    )
