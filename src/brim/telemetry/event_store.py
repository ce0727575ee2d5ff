"""The events of servers in one SQLite file, so that those before a crash can be read after it.

A thread of its own writes: an event is in the file a few milliseconds after it was recorded, and no
disk ever stalls whoever records.  What cannot be written is counted and said once; it never fails a
server.  Any process may read meanwhile.
"""

import contextlib
import os
import queue
import sqlite3
import threading
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from brim.core.event import Event, EventKind
from brim.errors import ConfigError
from brim.telemetry.events import log_event

FILE_NAME = "events.sqlite"
"""In a server's state directory."""

MAX_EVENTS = 10_000
"""The newest that are kept, about 5 MB: months of a quiet server, days of a bad one."""

MAX_PENDING = 1000
"""Events that wait for a disk that hangs; those beyond it are lost."""

BUSY_LIMIT_S = 1.0
"""For another server on the same file, which no two of this version share."""

CLOSE_LIMIT_S = 5.0
"""For what is pending at the end to be written; the thread is a daemon and holds up no exit."""

FORMAT_VERSION = 1
"""SQLite's user_version.  Raise it with every change of the table or of what an event means."""

_TABLE = """
CREATE TABLE event (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    at_unix_s REAL NOT NULL,
    kind TEXT NOT NULL,
    model TEXT NOT NULL,
    app TEXT NOT NULL,
    json BLOB NOT NULL
)
"""


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Event).decode


class StoredEvent(NamedTuple):
    """An event and its place; places rise, and none is given twice."""

    place: int
    event: Event


class EventStore:
    """The file.

    Args:
        path: Made with the first event, for its owner alone.
        max_events: How many are kept.
    """

    def __init__(self, path: Path, *, max_events: int = MAX_EVENTS) -> None:
        self._path = path
        self._max_events = max_events
        self._pending: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._connection: sqlite3.Connection | None = None
        self._is_closed = False
        self._num_refused = self._num_failures = 0

    @property
    def num_lost(self) -> int:
        """Events that were not written."""
        return self._num_refused + self._num_failures

    def record(self, event: Event) -> None:
        """Have an event written; never blocks and never raises.  For one thread."""
        if self._is_closed or self._pending.qsize() >= MAX_PENDING:
            self._num_refused += 1
            return
        self._pending.put(event)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="brim-events", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Write what is pending and let the file go; again does nothing."""
        self._is_closed = True
        thread, self._thread = self._thread, None
        if thread is not None:
            self._pending.put(None)
            thread.join(CLOSE_LIMIT_S)

    def read(
        self,
        limit: int | None = None,
        *,
        kinds: Collection[EventKind] = (),
        since_unix_s: float | None = None,
        model: str | None = None,
        app: str | None = None,
        after_place: int = 0,
    ) -> list[StoredEvent]:
        """The newest events that meet every condition, oldest first; none where there is no file.

        Args:
            limit: At most so many.
            kinds: Only these; all where empty.
            since_unix_s: Only from then on.
            model: Only of this model.
            app: Only of this app.
            after_place: Only those behind it, for whoever looks again and again.

        Raises:
            ConfigError: The file is damaged, or of a newer brim.
        """
        parts = ["id > ?"]
        values: list[str | float] = [after_place, *(kind.value for kind in kinds)]
        if kinds:
            parts.append(f"kind IN ({','.join('?' * len(kinds))})")
        for part, value in (
            ("at_unix_s >= ?", since_unix_s),
            ("model = ?", model),
            ("app = ?", app),
        ):
            if value is not None:
                parts.append(part)
                values.append(value)
        values.append(-1 if limit is None else limit)
        rows = self._rows(
            f"SELECT id, json FROM event WHERE {' AND '.join(parts)} ORDER BY id DESC LIMIT ?",
            values,
        )
        return [stored for row in reversed(rows) if (stored := _decoded(*row)) is not None]

    def _rows(self, statement: str, values: Sequence[str | float]) -> list[tuple[int, bytes]]:
        if not self._path.exists():
            return []
        try:
            address = f"{self._path.absolute().as_uri()}?mode=ro"
            with contextlib.closing(
                sqlite3.connect(address, uri=True, timeout=BUSY_LIMIT_S)
            ) as connection:
                version = _version(connection)
                if version == 0:  # a server that is just making it
                    return []
                _check_version(self._path, version)
                return connection.execute(statement, values).fetchall()
        except sqlite3.Error as exc:
            raise ConfigError(
                f"{self._path} cannot be read ({exc}); if that stays, move it away, and the next "
                "server begins a new one"
            ) from exc

    def _run(self) -> None:
        while (event := self._pending.get()) is not None:
            self._write(event)
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _write(self, event: Event) -> None:
        try:
            try:
                self._insert(event)
            except sqlite3.DatabaseError as exc:
                if not _is_damage(exc):
                    raise
                self._put_aside()
                self._insert(event)
        except (sqlite3.Error, OSError, ConfigError) as exc:
            self._num_failures += 1
            if self._num_failures == 1:
                log_event("event_store_failed", path=self._path, reason=exc)

    def _insert(self, event: Event) -> None:
        connection = self._opened()
        with connection:
            cursor = connection.execute(
                "INSERT INTO event (at_unix_s, kind, model, app, json) VALUES (?, ?, ?, ?, ?)",
                (event.at_unix_s, event.kind.value, event.model, event.app, _encode(event)),
            )
            oldest = (cursor.lastrowid or 0) - self._max_events
            connection.execute("DELETE FROM event WHERE id <= ?", (oldest,))

    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            _make_private(self._path)
            connection = sqlite3.connect(self._path, timeout=BUSY_LIMIT_S)
            try:
                # Readers never wait for a writer, and a process that is killed leaves a good file.
                connection.execute("PRAGMA journal_mode = WAL")
                # What a power cut takes is no loss that waiting for the disk would be worth.
                connection.execute("PRAGMA synchronous = NORMAL")
                _bring_up_to_date(connection, self._path)
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def _put_aside(self) -> None:
        """Move a damaged file and its journals out of the way: new events are worth more."""
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None
        log_event("event_store_damaged", path=self._path)
        for suffix in ("", "-wal", "-shm"):
            path = self._path.with_name(self._path.name + suffix)
            if path.exists():
                path.replace(path.with_name(path.name + ".damaged"))


def _decoded(place: int, data: bytes) -> StoredEvent | None:
    try:
        return StoredEvent(place, _decode(data))
    except msgspec.MsgspecError:  # of a kind that this version does not know
        return None


def _make_private(path: Path) -> None:
    # SQLite gives its journals the mode of the file, so it must be right before they are made.
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))


def _bring_up_to_date(connection: sqlite3.Connection, path: Path) -> None:
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        version = _version(connection)
        if version == 0:
            connection.execute(_TABLE)
            connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
        else:
            _check_version(path, version)


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _check_version(path: Path, version: int) -> None:
    """Leave the events of a newer brim alone: it will want them back.

    Raises:
        ConfigError: The file is of a newer one.
    """
    if version > FORMAT_VERSION:
        raise ConfigError(
            f"{path} is of a newer brim (format {version}, this one knows {FORMAT_VERSION}); use "
            "that one, or name another state directory"
        )


def _is_damage(exc: sqlite3.DatabaseError) -> bool:
    """Whether the file itself is wrong, rather than busy, read-only or on a full disk."""
    if isinstance(exc, sqlite3.OperationalError):
        return "no such" in str(exc) or "already exists" in str(exc)
    return True
