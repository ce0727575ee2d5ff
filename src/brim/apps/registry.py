"""The apps that this machine's operator added, and the hashes of their keys, in one SQLite file.

A key is shown once, when it is made; what is kept cannot be turned back into it.  `brim apps` in
another process writes the same file: a server sees that within a second.
"""

import contextlib
import hashlib
import hmac
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from brim.apps.database import BUSY_LIMIT_S, open_database, transaction, unusable
from brim.core.app import App
from brim.errors import ConfigError, NotFound
from brim.telemetry.events import log_event

FILE_NAME = "apps.sqlite"
"""In the state directory."""

KEY_PREFIX = "brim-"
"""What secret scanners, and people who find a key somewhere, know it by."""

NUM_KEY_BYTES = 32
"""256 random bits: neither guessing a key nor searching for one with a known hash has an end, which
is why one round of SHA-256 will do."""

NUM_HINT_LETTERS = 8
"""Of a key, kept as they are to tell keys apart and to find the one to compare with; the other 35
letters have 210 bits."""

MAX_KEY_LETTERS = 256
"""A key has 48; what is sent in its place is not hashed at any length."""

MAX_APPS = 1000
"""More is a script gone wrong; all of them are kept in memory."""

LOOK_PERIOD_S = 0.5
"""Between two looks at whether another process changed the file: 20 us each."""

_HOLDS = "the hashes of the apps' keys"

_WRONG_ROW = (msgspec.DecodeError, TypeError)
"""What reading a row raises that somebody else wrote."""

_MIGRATIONS = (
    """
    CREATE TABLE app (
        name TEXT PRIMARY KEY,
        app TEXT NOT NULL,
        manifest TEXT NOT NULL,
        key_hint TEXT NOT NULL,
        key_sha256 BLOB NOT NULL,
        added_unix_s REAL NOT NULL,
        changed_unix_s REAL NOT NULL
    ) WITHOUT ROWID
    """,
)


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One app as it was added."""

    app: App
    manifest: str
    """The text that it was made from."""
    key_hint: str
    """How its key begins."""
    added_unix_s: float
    changed_unix_s: float
    """When its manifest or key last changed."""


class _Known(msgspec.Struct, frozen=True):
    entry: Entry
    key_sha256: bytes


class Registry:
    """The file, read into memory; safe to use from several threads.

    Nothing is made before an app is added.

    Args:
        path: The file.
        clock: Monotonic seconds.
        now: Unix seconds.

    Raises:
        ConfigError: The file is there and cannot be used; the message says what to do.
    """

    def __init__(
        self,
        path: Path,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._path = path
        self._clock = clock
        self._now = now
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None
        self._data_version = -1
        self._looked_s = clock()
        self._known: dict[str, _Known] = {}
        self._by_hint: dict[str, list[_Known]] = {}
        self._has_failed = False
        with self._lock, self._said():
            self._look(wait_s=BUSY_LIMIT_S)

    def add(self, app: App, manifest_text: str) -> str:
        """Let an app use this machine; gives its key, which is nowhere else.

        Raises:
            ConfigError: There is one of this name, there are too many, or the file takes nothing.
        """
        key = _new_key()
        with self._writing() as connection:
            if app.name in self._known:
                raise ConfigError(
                    f"there is an app '{app.name}' already; --replace gives it the new manifest "
                    "and keeps its key and usage"
                )
            if len(self._known) >= MAX_APPS:
                raise ConfigError(f"there are {MAX_APPS} apps, which is the most; remove one first")
            now = self._now()
            connection.execute(
                "INSERT INTO app VALUES (?, ?, ?, ?, ?, ?, ?)",
                (app.name, _encoded(app), manifest_text, _hint(key), _sha256(key), now, now),
            )
        return key

    def replace(self, app: App, manifest_text: str) -> None:
        """Give an app another manifest; its key and its usage stay.

        Raises:
            NotFound: There is none of this name.
            ConfigError: The file takes nothing.
        """
        with self._writing() as connection:
            self._check_known(app.name)
            connection.execute(
                "UPDATE app SET app = ?, manifest = ?, changed_unix_s = ? WHERE name = ?",
                (_encoded(app), manifest_text, self._now(), app.name),
            )

    def rotate(self, name: str) -> str:
        """Give an app another key and forget the old one; gives the new one.

        Raises:
            NotFound: There is none of this name.
            ConfigError: The file takes nothing.
        """
        key = _new_key()
        with self._writing() as connection:
            self._check_known(name)
            connection.execute(
                "UPDATE app SET key_hint = ?, key_sha256 = ?, changed_unix_s = ? WHERE name = ?",
                (_hint(key), _sha256(key), self._now(), name),
            )
        return key

    def remove(self, name: str) -> None:
        """Forget an app and its key.

        Raises:
            NotFound: There is none of this name.
            ConfigError: The file takes nothing.
        """
        with self._writing() as connection:
            self._check_known(name)
            connection.execute("DELETE FROM app WHERE name = ?", (name,))

    def entries(self) -> tuple[Entry, ...]:
        """All apps with what is kept beside them, by name."""
        with self._lock:
            self._look_sometimes()
            return tuple(self._known[name].entry for name in sorted(self._known))

    def entry(self, name: str) -> Entry:
        """One app with what is kept beside it.

        Raises:
            NotFound: There is none of this name.
        """
        with self._lock:
            self._look_sometimes()
            self._check_known(name)
            return self._known[name].entry

    def apps(self) -> tuple[App, ...]:
        """All apps, by name."""
        return tuple(entry.app for entry in self.entries())

    def get(self, name: str) -> App | None:
        """The app of this name; None where there is none, or no longer."""
        with self._lock:
            self._look_sometimes()
            known = self._known.get(name)
            return None if known is None else known.entry.app

    def authenticate(self, key: str) -> App | None:
        """Whose key this is; None for nobody's.

        How long it takes tells nothing of the keys that are known, beyond their hints.
        """
        if len(key) > MAX_KEY_LETTERS:
            return None
        digest = _sha256(key)
        with self._lock:
            self._look_sometimes()
            for known in self._by_hint.get(_hint(key), ()):
                if hmac.compare_digest(digest, known.key_sha256):
                    return known.entry.app
        return None

    def close(self) -> None:
        """Give the file back; the next call opens it again."""
        with self._lock:
            self._close()

    def _check_known(self, name: str) -> None:
        if name not in self._known:
            names = ", ".join(f"'{each}'" for each in sorted(self._known)) or "none"
            raise NotFound(f"there is no app '{name}'; there are: {names}")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction on what the file says now; what it wrote is known here when it is over."""
        with self._lock, self._said():
            if self._connection is None or self._file != _identity(self._path):
                self._close()
                self._open()
            connection = self._connection
            assert connection is not None
            _set_patience(connection, BUSY_LIMIT_S)
            try:
                with transaction(connection):
                    self._read(connection)
                    yield connection
                    self._read(connection)
            except BaseException:
                self._data_version = -1
                raise

    def _look_sometimes(self) -> None:
        """Take in what other processes changed; a file that fails leaves what was known."""
        now = self._clock()
        if now - self._looked_s < LOOK_PERIOD_S:
            return
        self._looked_s = now
        try:
            # While another process writes, what was known stands until the next look: no event
            # loop waits for it.
            self._look(wait_s=0)
            self._has_failed = False
        except (sqlite3.Error, OSError, ConfigError, *_WRONG_ROW) as exc:
            if not self._has_failed and "locked" not in str(exc):
                log_event("apps_unread", path=self._path, reason=exc)
                self._has_failed = True

    def _look(self, *, wait_s: float) -> None:
        identity = _identity(self._path)
        if identity is None:
            self._close()
            self._take({})
            return
        if self._connection is None or identity != self._file:
            # Another file may have been put in its place, such as one from a backup.
            self._close()
            self._open()
        assert self._connection is not None
        _set_patience(self._connection, wait_s)
        version = int(self._connection.execute("PRAGMA data_version").fetchone()[0])
        if version != self._data_version:
            self._read(self._connection)
            self._data_version = version

    def _open(self) -> None:
        # One file at rest, so that a backup is a copy and is put back by renaming it, also under a
        # running server: a journal of the old file would be taken for the new one's.
        self._connection = open_database(self._path, _MIGRATIONS, holds=_HOLDS, journal="DELETE")
        self._file = _identity(self._path)
        self._data_version = -1

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _read(self, connection: sqlite3.Connection) -> None:
        rows = connection.execute(
            "SELECT app, manifest, key_hint, key_sha256, added_unix_s, changed_unix_s FROM app"
        )
        found = {}
        for app, manifest, hint, digest, added, changed in rows:
            decoded = msgspec.json.decode(app, type=App)
            entry = Entry(
                app=decoded,
                manifest=manifest,
                key_hint=hint,
                added_unix_s=added,
                changed_unix_s=changed,
            )
            found[decoded.name] = _Known(entry, bytes(digest))
        self._take(found)

    def _take(self, found: dict[str, _Known]) -> None:
        self._known = found
        self._by_hint = {}
        for known in found.values():
            self._by_hint.setdefault(known.entry.key_hint, []).append(known)

    @contextlib.contextmanager
    def _said(self) -> Iterator[None]:
        """SQLite's errors as sentences."""
        try:
            yield
        except sqlite3.Error as exc:
            raise unusable(self._path, exc, holds=_HOLDS) from exc
        except OSError as exc:
            raise ConfigError(f"{self._path} cannot be read ({exc.strerror})") from exc
        except _WRONG_ROW as exc:
            raise unusable(self._path, sqlite3.DatabaseError(str(exc)), holds=_HOLDS) from exc


def _set_patience(connection: sqlite3.Connection, wait_s: float) -> None:
    """How long to wait for another process to finish its write."""
    connection.execute(f"PRAGMA busy_timeout = {int(1000 * wait_s)}")


def _new_key() -> str:
    return KEY_PREFIX + secrets.token_urlsafe(NUM_KEY_BYTES)


def _hint(key: str) -> str:
    """What is kept of a key as it is."""
    return key[: len(KEY_PREFIX) + NUM_HINT_LETTERS]


def _sha256(key: str) -> bytes:
    # Headers may hold any bytes, which arrive here as letters.
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _encoded(app: App) -> str:
    return msgspec.json.encode(app).decode()


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a file from another one of its name; None where there is none."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_dev, found.st_ino
