"""The grants of all brim processes of one user on one machine, in one locked file.

Each process keeps its own `Account`; what it was granted it writes here, where the others count it
as used by others.  Whoever grants holds the lock from before the machine is read until the grant is
written, so that two processes which start in the same moment see each other's bytes.

Lines of processes that ended, however they ended, are dropped: a process id together with the time
at which it began names one process for good.
"""

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import msgspec

from brim.core.machine import MachineSpec
from brim.errors import Busy
from brim.ledger.processes import is_running, process_tree, start_time
from brim.machine.process import process_memory
from brim.telemetry.events import log_event

LOCK_LIMIT_S = 10.0
"""Longer than any reading of a machine with many workers; who holds the lock longer hangs."""

LOCK_POLL_S = 0.01
"""A grant takes about this long; flock has no wait with a limit."""

MAX_BOOK_BYTES = 1024 * 1024
"""Thousands of lines; a file beyond is not ours."""


class Promise(msgspec.Struct, frozen=True, kw_only=True):
    """One grant of one process."""

    pid: int
    started_unix_s: float
    """When the process began, by the system."""
    name: str
    """The model, or what else the bytes are for."""
    num_bytes: int


class Page:
    """The book while it is locked; `Book.open` gives it.  Safe to use from several threads.

    A closed page reads as empty and takes nothing: whoever was cancelled may leave a write behind
    in another thread, and its descriptor may be another file's by then.

    Args:
        fd: The locked file.
        book: Where it comes from.
    """

    def __init__(self, fd: int, book: "Book") -> None:
        self._fd = fd
        self._book = book
        self._in_use = threading.Lock()

    def __enter__(self) -> "Page":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def others(self) -> list[Promise]:
        """Promises of other processes that still run."""
        with self._in_use:
            return self._others()

    def write(self, promises: Sequence[tuple[str, int]]) -> None:
        """Put (name, bytes) in the place of all that this process wrote before.

        Where the file takes nothing, such as on a full disk, others see only what our processes
        hold, which is better than no server: it is said, and not raised.
        """
        book = self._book
        own = [
            Promise(pid=book.pid, started_unix_s=book.started_unix_s, name=name, num_bytes=size)
            for name, size in promises
        ]
        with self._in_use:
            if self._fd >= 0:
                data = msgspec.json.encode([*self._others(), *own])
                try:
                    os.pwrite(self._fd, data, 0)
                    os.ftruncate(self._fd, len(data))
                except OSError as exc:
                    log_event("ledger_book_unusable", reason=exc)

    def close(self) -> None:
        """Unlock the book; safe more than once."""
        with self._in_use:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def _others(self) -> list[Promise]:
        """Lines of other processes that run.

        A file that is damaged or cannot be read is an empty one: servers write their lines again
        with every reading.
        """
        if self._fd < 0:
            return []
        try:
            found = msgspec.json.decode(os.pread(self._fd, MAX_BOOK_BYTES, 0), type=list[Promise])
        except (msgspec.DecodeError, OSError):
            return []
        book = self._book
        return [each for each in found if each.pid != book.pid and book.is_running(each)]


class Book:
    """The file and the lock on it.

    Args:
        path: The file; its directory must be the user's alone.
        pid: The process that writes; this one, but for tests.
    """

    def __init__(self, path: Path, *, pid: int | None = None) -> None:
        self._path = path
        self.pid = os.getpid() if pid is None else pid
        self.started_unix_s = start_time(self.pid) or 0.0

    def open(self) -> Page:
        """Lock the book; blocks until it is ours.

        Raises:
            Busy: Another process holds the lock and does not go on.
            OSError: The file cannot be made or locked.
        """
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._lock(fd)
        except BaseException:
            os.close(fd)
            raise
        return Page(fd, self)

    def is_running(self, promise: Promise) -> bool:
        """Whether the very process that wrote a promise is still there."""
        return is_running(promise.pid, promise.started_unix_s)

    def erase(self) -> None:
        """Take everything out that this process wrote; a book that cannot be opened has nothing."""
        with contextlib.suppress(OSError, Busy), self.open() as page:
            page.write(())

    def _lock(self, fd: int) -> None:
        deadline = time.monotonic() + LOCK_LIMIT_S
        while True:
            try:
                return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise Busy(
                        f"another brim process has held {self._path} for {LOCK_LIMIT_S:.0f} s; "
                        "end it, and try again",
                        retry_after_s=LOCK_LIMIT_S,
                    ) from None
                time.sleep(LOCK_POLL_S)


def beside(machine: MachineSpec, promises: Sequence[Promise]) -> MachineSpec:
    """The reading in which what other processes were granted counts as used.

    What they hold in anonymous memory is in every reading already; the rest of each grant, mapped
    weights and KV that was not touched yet, looks free to everybody else and is added.  What the
    GPU may keep resident is one limit for all of them, so that their grants are taken off it.
    """
    promised = _sums(promises)
    unseen = sum(max(0, size - _dirty_bytes(pid)) for pid, size in promised.items())
    changes: dict[str, int] = {}
    if unseen:
        changes["others_bytes"] = machine.others_bytes + unseen
    if machine.gpu_limit_bytes is not None and promised:
        changes["gpu_limit_bytes"] = max(0, machine.gpu_limit_bytes - sum(promised.values()))
    if not changes:
        return machine
    words = {
        "others_bytes": "and plans of other brim servers",
        "gpu_limit_bytes": "less plans of other brim servers",
    }
    sources = {f: f"{machine.sources.get(f, 'measured')}; {words[f]}" for f in changes}
    return msgspec.structs.replace(machine, sources=machine.sources | sources, **changes)


def _dirty_bytes(pid: int) -> int:
    """Anonymous memory of a process and of all that it started."""
    held = (process_memory(each) for each in process_tree(pid))
    return sum(memory.dirty_bytes for memory in held if memory is not None)


def _sums(promises: Sequence[Promise]) -> dict[int, int]:
    sums: dict[int, int] = {}
    for promise in promises:
        sums[promise.pid] = sums.get(promise.pid, 0) + promise.num_bytes
    return sums
