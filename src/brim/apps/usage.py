"""What each app used, by UTC day and model, in one SQLite file that outlives crashes.

A request that begins is written down with all that it may use, and taken out with what it did use
when it ends, both in the transaction that counts it; so each request is counted once, whenever the
process ends.  What a server that was killed left behind counts as used in full when the next one
opens the file: nobody knows how much of it was, and a budget is a promise to whoever set it.

A thread writes, so that no disk ever stalls the event loop.  A reservation is in the file some
milliseconds after its request began, since commits do not wait for the disk either (where they did,
on a disk busy with other things, whole requests came and went before the line of the first was
written); a kill within them loses what the answer had by then, a token or two.
"""

import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from brim.apps.database import open_database, transaction, unusable
from brim.apps.day import day_of, days_before
from brim.telemetry.events import log_event

FILE_NAME = "usage.sqlite"
"""In the state directory.  Not in the file of the keys: whoever watches that for changes would be
woken by every request."""

COMMIT_PERIOD_S = 1.0
"""For what may be lost by a second: refusals, energy, bytes written.  A client that is refused a
thousand times a second costs one commit."""

RETRY_PERIOD_S = 5.0
"""After a write that failed; what is not written yet stays in memory, summed up."""

KEEP_DAYS = 400
"""A year and a month, so that a month can be held against the same of last year; 10 apps on three
models are 12,000 rows, about 1 MB."""

CLOSE_LIMIT_S = 10.0
"""For the last commit on a disk that hangs; then the next start counts what is in the file."""

_HOLDS = "what apps used of their budgets"

_MIGRATIONS = (
    """
    CREATE TABLE usage (
        app TEXT NOT NULL,
        day TEXT NOT NULL,
        model TEXT NOT NULL,
        num_requests INTEGER NOT NULL,
        num_refused INTEGER NOT NULL,
        num_prompt_tokens INTEGER NOT NULL,
        num_cached_tokens INTEGER NOT NULL,
        num_completion_tokens INTEGER NOT NULL,
        num_lost_tokens INTEGER NOT NULL,
        energy_j REAL NOT NULL,
        ssd_write_bytes INTEGER NOT NULL,
        PRIMARY KEY (app, day, model)
    ) WITHOUT ROWID;
    CREATE TABLE in_flight (
        id INTEGER PRIMARY KEY,
        app TEXT NOT NULL,
        day TEXT NOT NULL,
        model TEXT NOT NULL,
        num_prompt_tokens INTEGER NOT NULL,
        max_completion_tokens INTEGER NOT NULL
    )
    """,
)


class Spent(msgspec.Struct, frozen=True, kw_only=True):
    """What was used of one thing and another."""

    num_requests: int = 0
    """That began."""
    num_refused: int = 0
    """For want of budget, or over a limit."""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    """Of these: not computed."""
    num_completion_tokens: int = 0
    num_lost_tokens: int = 0
    """Bounds of answers that a crash of the server cut; they count as used."""
    energy_j: float = 0.0
    ssd_write_bytes: int = 0

    @property
    def num_tokens(self) -> int:
        """What counts against a budget of tokens."""
        return self.num_prompt_tokens + self.num_completion_tokens + self.num_lost_tokens

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(
            **{name: getattr(self, name) + getattr(other, name) for name in self.__struct_fields__}
        )


class UsageLine(msgspec.Struct, frozen=True, kw_only=True):
    """What one app used of one model in one day; no model for what belongs to none."""

    app: str
    day: str
    model: str
    spent: Spent


class Reservation(msgspec.Struct, frozen=True, kw_only=True):
    """What one request that runs may use."""

    app: str
    day: str
    """In which it began; all that it uses counts there."""
    model: str
    num_prompt_tokens: int
    max_completion_tokens: int
    """Of all its choices together."""


_COLUMNS = ", ".join(Spent.__struct_fields__)
_COUNT = (
    f"INSERT INTO usage (app, day, model, {_COLUMNS}) VALUES (?, ?, ?, "
    f"{', '.join('?' for _ in Spent.__struct_fields__)}) ON CONFLICT (app, day, model) DO UPDATE "
    f"SET {', '.join(f'{name} = {name} + excluded.{name}' for name in Spent.__struct_fields__)}"
)


class _Batch:
    """Changes that are not in the file yet."""

    def __init__(self) -> None:
        self.begun: dict[int, Reservation] = {}
        self.ended: set[int] = set()
        self.spent: dict[tuple[str, str, str], Spent] = {}

    def __bool__(self) -> bool:
        return bool(self.begun or self.ended or self.spent)

    def end(self, number: int) -> None:
        if self.begun.pop(number, None) is None:
            self.ended.add(number)

    def count(self, key: tuple[str, str, str], spent: Spent) -> None:
        before = self.spent.get(key)
        self.spent[key] = spent if before is None else before + spent

    def absorb(self, later: "_Batch") -> None:
        """Take in what came after, where this one could not be written."""
        for number in later.ended:
            self.end(number)
        self.begun |= later.begun
        for key, spent in later.spent.items():
            self.count(key, spent)


class UsageStore:
    """The file, written by the one server that has the state directory.

    Args:
        path: The file.
        now: Unix seconds.

    Raises:
        ConfigError: The file cannot be used; the message says what to do.
    """

    def __init__(self, path: Path, *, now: Callable[[], float] = time.time) -> None:
        self._path = path
        self._batch = _Batch()
        self._changed = threading.Condition()
        self._is_urgent = self._is_writing = self._is_closed = False
        self._num_begun = 0
        self.num_failures = 0
        """Commits that the file refused; what they held is tried again."""
        self._connection = open_database(path, _MIGRATIONS, holds=_HOLDS)
        try:
            self._settle(day_of(now()))
            self._reader = open_database(path, _MIGRATIONS, holds=_HOLDS)
        except sqlite3.Error as exc:
            self._connection.close()
            raise unusable(path, exc, holds=_HOLDS) from exc
        # A daemon: a server that dies of an exception must not hang on its bookkeeping.
        self._thread = threading.Thread(target=self._write, name="usage", daemon=True)
        self._thread.start()

    def begin(self, reservation: Reservation) -> int:
        """Write down what a request may use, soon; gives the number to end it by."""
        with self._changed:
            self._num_begun += 1
            self._batch.begun[self._num_begun] = reservation
            self._wake()
            return self._num_begun

    def end(self, number: int, reservation: Reservation, spent: Spent) -> None:
        """Put what a request did use in the place of what it might have used, soon."""
        with self._changed:
            self._batch.end(number)
            self._batch.count((reservation.app, reservation.day, reservation.model), spent)
            self._wake()

    def note(self, app: str, day: str, spent: Spent) -> None:
        """Count what belongs to no request, within a second."""
        with self._changed:
            self._batch.count((app, day, ""), spent)
            self._changed.notify_all()

    def spent(self, app: str, day: str) -> Spent:
        """What the file says that an app used in a day, of all models; nothing where it fails.

        Blocks for some 50 us; not from several threads.
        """
        sums = ", ".join(f"total({name})" for name in Spent.__struct_fields__)
        try:
            row = self._reader.execute(
                f"SELECT {sums} FROM usage WHERE app = ? AND day = ?", (app, day)
            ).fetchone()
        except sqlite3.Error as exc:
            self._note_failure(exc)
            return Spent()
        return msgspec.convert(
            dict(zip(Spent.__struct_fields__, row, strict=True)), Spent, strict=False
        )

    def flush(self) -> None:
        """Return when everything so far is in the file, or a commit of it failed."""
        with self._changed:
            num_failures = self.num_failures
            self._wake()
            self._changed.wait_for(
                lambda: (
                    not (self._batch or self._is_writing)
                    or self.num_failures > num_failures
                    or not self._thread.is_alive()
                )
            )

    def close(self) -> None:
        """Write what is left, and give the file back; safe more than once."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join(CLOSE_LIMIT_S)
        if not self._thread.is_alive():
            self._connection.close()
        self._reader.close()

    def _wake(self) -> None:
        self._is_urgent = True
        self._changed.notify_all()

    def _settle(self, today: str) -> None:
        """Count in full what was in flight when the last server was killed; forget old days."""
        connection = self._connection
        with transaction(connection):
            left = connection.execute(
                "SELECT app, day, model, num_prompt_tokens, max_completion_tokens FROM in_flight"
            ).fetchall()
            for *key, num_prompt_tokens, max_completion_tokens in left:
                spent = Spent(
                    num_requests=1,
                    num_prompt_tokens=num_prompt_tokens,
                    num_lost_tokens=max_completion_tokens,
                )
                connection.execute(_COUNT, (*key, *msgspec.structs.astuple(spent)))
            connection.execute("DELETE FROM in_flight")
            connection.execute("DELETE FROM usage WHERE day < ?", (days_before(today, KEEP_DAYS),))
        if left:
            log_event("usage_recovered", num_requests=len(left))

    def _write(self) -> None:
        """The thread: one commit for all that came while the last one was written."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._batch) or self._is_closed)
                if not self._is_urgent:
                    self._changed.wait_for(
                        lambda: self._is_urgent or self._is_closed, COMMIT_PERIOD_S
                    )
                batch, self._batch = self._batch, _Batch()
                self._is_urgent, self._is_writing = False, True
            error = self._commit(batch)
            with self._changed:
                self._is_writing = False
                if error is not None:
                    self._note_failure(error)
                    batch.absorb(self._batch)
                    self._batch = batch
                self._changed.notify_all()
                if self._is_closed and (error is not None or not self._batch):
                    return
                if error is not None:
                    self._changed.wait_for(lambda: self._is_closed, RETRY_PERIOD_S)

    def _commit(self, batch: _Batch) -> sqlite3.Error | None:
        connection = self._connection
        try:
            with transaction(connection):
                connection.executemany(
                    "INSERT INTO in_flight VALUES (?, ?, ?, ?, ?, ?)",
                    [(number, *msgspec.structs.astuple(r)) for number, r in batch.begun.items()],
                )
                connection.executemany(
                    "DELETE FROM in_flight WHERE id = ?", [(number,) for number in batch.ended]
                )
                connection.executemany(
                    _COUNT,
                    [(*key, *msgspec.structs.astuple(spent)) for key, spent in batch.spent.items()],
                )
        except sqlite3.Error as exc:
            return exc
        return None

    def _note_failure(self, exc: sqlite3.Error) -> None:
        self.num_failures += 1
        if self.num_failures == 1:
            log_event("usage_failed", path=self._path, reason=exc)


def read_usage(path: Path, *, since_day: str, app: str | None = None) -> list[UsageLine]:
    """What the file says, newest day first; changes nothing, beside a server or without one.

    Args:
        path: The file; one that is not there has nothing.
        since_day: The oldest day.
        app: Only this one's.

    Raises:
        ConfigError: The file cannot be used.
    """
    rows = _rows(
        path,
        f"SELECT app, day, model, {_COLUMNS} FROM usage WHERE day >= ?1 AND (?2 IS NULL OR app = "
        "?2) ORDER BY day DESC, app, model",
        (since_day, app),
    )
    return [
        UsageLine(
            app=name,
            day=day,
            model=model,
            spent=Spent(**dict(zip(Spent.__struct_fields__, spent, strict=True))),
        )
        for name, day, model, *spent in rows
    ]


def read_reserved(path: Path) -> dict[tuple[str, str], int]:
    """Tokens that requests in work may still use, by (app, day).

    Raises:
        ConfigError: The file cannot be used.
    """
    rows = _rows(
        path,
        "SELECT app, day, sum(num_prompt_tokens + max_completion_tokens) FROM in_flight "
        "GROUP BY app, day",
        (),
    )
    return {(app, day): tokens for app, day, tokens in rows}


def _rows(path: Path, query: str, values: tuple[object, ...]) -> list[tuple[Any, ...]]:
    if not path.exists():
        return []
    connection = open_database(path, _MIGRATIONS, holds=_HOLDS)
    try:
        return connection.execute(query, values).fetchall()
    except sqlite3.Error as exc:
        raise unusable(path, exc, holds=_HOLDS) from exc
    finally:
        connection.close()
