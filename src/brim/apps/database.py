"""Opens an SQLite file of the state directory: private, crash-safe, and of a version known here.

A file that is damaged or from a newer brim is refused with what to do; it is never put aside by
itself, since keys and budgets are in it.
"""

import contextlib
import os
import sqlite3
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from brim.errors import ConfigError

Journal = Literal["WAL", "DELETE"]

PRIVATE = 0o600
"""Who uses what is nobody else's business."""

BUSY_LIMIT_S = 2.0
"""For another process to finish its write, which takes milliseconds; longer means that it hangs."""


def open_database(
    path: Path, migrations: Sequence[str], *, holds: str, journal: Journal = "WAL"
) -> sqlite3.Connection:
    """Open a file, making it and bringing it up to date where that is needed.

    Args:
        path: The file; its directory is made as well, for the user alone.
        migrations: The script that leads from each version to the next; a new file goes through
            all of them.  Only ever append.
        holds: What is in it, for messages.
        journal: WAL is for what is written all the time: others read meanwhile, and a commit waits
            for no disk, so that a power cut may take what the system had not written out yet, half
            a minute at most.  DELETE is for what is written now and then: a commit is on the disk,
            and the file is one file, which may be copied and replaced.

    Returns:
        A connection in autocommit mode, for any thread, one at a time.

    Raises:
        ConfigError: The file cannot be used; the message says what to do.
    """
    try:
        _make_private(path)
        connection = sqlite3.connect(
            path, timeout=BUSY_LIMIT_S, isolation_level=None, check_same_thread=False
        )
        try:
            # A process that is killed leaves a good file in either mode.
            connection.execute(f"PRAGMA journal_mode = {journal}")
            connection.execute(f"PRAGMA synchronous = {'NORMAL' if journal == 'WAL' else 'FULL'}")
            _bring_up_to_date(connection, path, migrations)
        except BaseException:
            connection.close()
            raise
    except OSError as exc:
        raise ConfigError(f"{path} cannot be made ({exc.strerror}); {_ELSEWHERE}") from exc
    except sqlite3.Error as exc:
        raise unusable(path, exc, holds=holds) from exc
    return connection


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Write all of what follows, or nothing of it."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        # A disk that is full has made SQLite do it already: once more fails, and hides the reason.
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


_ELSEWHERE = "make its directory writable, or name another with server.state_directory"


def unusable(path: Path, exc: sqlite3.Error, *, holds: str) -> ConfigError:
    """The sentence for what SQLite says of a file."""
    if isinstance(exc, sqlite3.OperationalError) and not _is_foreign(exc):
        return ConfigError(
            f"{path} cannot be used ({exc}); close what holds it, free the disk, or {_ELSEWHERE}"
        )
    return ConfigError(
        f"{path} is damaged ({exc}); it holds {holds}: put a copy from a backup in its place, or "
        "move it away and begin anew"
    )


def _is_foreign(exc: sqlite3.OperationalError) -> bool:
    """Whether it is another program's database, or tables of it are gone."""
    return "no such" in str(exc) or "has no column" in str(exc) or "already exists" in str(exc)


def _make_private(path: Path) -> None:
    # SQLite gives its journals the mode of the file, so it must be right before they are made.
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, PRIVATE))
    except FileExistsError:
        # Not by opening it: closing any descriptor of a file ends the locks of all connections
        # that this process has on it.
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            # Whatever it is, a link to a device even, it is not ours to change.
            raise ConfigError(
                f"{path} is no regular file; move it away, or name another server.state_directory"
            ) from None
        if mode & 0o077:
            path.chmod(PRIVATE)


def _bring_up_to_date(
    connection: sqlite3.Connection, path: Path, migrations: Sequence[str]
) -> None:
    while (version := _version(connection)) != len(migrations):
        if version > len(migrations):
            raise ConfigError(
                f"{path} was written by a newer brim (its format is {version}, this one knows "
                f"{len(migrations)}); run that one, or name another server.state_directory"
            )
        with transaction(connection):
            # Another process may have done it while we waited for the lock.
            if _version(connection) == version:
                for statement in migrations[version].split(";"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {version + 1}")


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])
