"""The thread that brings entries to the disk: fsync, room, rename, and news of other processes.

It alone waits for the disk.  What it did reaches the store's own thread as messages, in order.
"""

import contextlib
import errno
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from brim.core.cache import owner_of
from brim.errors import StoreError
from brim.prefix_cache import files
from brim.prefix_cache.format import Header
from brim.prefix_cache.room import Room, changed_at
from brim.prefix_cache.segment import Skip
from brim.telemetry.events import log_event

Clock = Callable[[], float]

TICK_NS = 20_000_000
"""Times of change come from a clock that ticks every 1 to 10 ms: a directory that changed in the
last two ticks may change again without its time doing so."""


class Arrived(msgspec.Struct, frozen=True):
    """An entry is on the disk."""

    key: str
    num_bytes: int
    owner: str
    """Whose namespace it is in."""


class Dropped(msgspec.Struct, frozen=True):
    """An entry was not kept."""

    key: str
    num_bytes: int
    reason: Skip
    problem: str = ""
    """What the system said, where it was its fault."""


class Changed(msgspec.Struct, frozen=True, eq=False):
    """What else came and went in this model's directory."""

    found: Sequence[Header] = ()
    gone: Sequence[str] = ()
    """Keys."""
    num_evicted: int = 0
    num_damaged: int = 0
    is_rescan: bool = False


class Opened(msgspec.Struct, frozen=True):
    """The directory was tried again."""

    reason: Skip | None = None
    """Why it cannot be used still."""
    problem: str = ""


Message = Arrived | Dropped | Changed | Opened


class Writer:
    """One queue, one thread, started by the first job.

    Args:
        root: The cache's directory.
        own: Name of this model's directory.
        room: The directory's bounds.
        clock: Seconds since 1970.
    """

    def __init__(self, root: Path, own: str, room: Room, clock: Clock) -> None:
        self._root, self._own, self._room, self._clock = root, own, room, clock
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.messages: deque[Message] = deque()
        self._seen_ns = 0
        self._seen_at_ns = 0

    # --- from the store's thread ---------------------------------------------------------------

    def put(self, job: Callable[[], None]) -> None:
        """Have `job` run behind those that wait."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="prefix-cache", daemon=True)
            self._thread.start()
        self._jobs.put(job)

    def has_news(self) -> bool:
        """Whether this model's directory may have changed by other hands since it was read."""
        seen_ns = self._seen_ns
        if changed_at(self._root / self._own) != seen_ns:
            return True
        is_unsure = self._seen_at_ns - seen_ns < TICK_NS
        return is_unsure and time.time_ns() - seen_ns >= TICK_NS

    def saw(self, changed_ns: int) -> None:
        """The directory has been read as it was at this time of change."""
        self._seen_at_ns = time.time_ns()
        self._seen_ns = changed_ns

    def flush(self, limit_s: float | None = None) -> None:
        """Wait until all jobs that wait now have run, or for so long."""
        if self._thread is not None:
            done = threading.Event()
            self._jobs.put(done.set)
            done.wait(limit_s)

    def stop(self, limit_s: float) -> None:
        """End the thread behind the jobs that wait, or leave it alone after `limit_s`."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join(limit_s)
            self._thread = None

    # --- jobs ----------------------------------------------------------------------------------

    def write(
        self, temporary: files.Temporary, header: Header, surplus: Sequence[str] = ()
    ) -> None:
        """Make a filled temporary file an entry, or drop it.

        Args:
            temporary: The file.
            header: What it holds.
            surplus: Keys of entries that are of no use beside it.
        """
        key, num_bytes = header.key, temporary.num_bytes
        try:
            reason, problem = self._write(temporary, header), ""
        except Exception as exc:
            # Of any kind: what is in flight must end, or nothing more would be written.
            reason, problem = reason_of(exc), str(exc)
        finally:
            temporary.remove()
        if reason is None:
            self.messages.append(Arrived(key, num_bytes, owner_of(header.namespace)))
            self.remove(surplus)
        else:
            self.messages.append(Dropped(key, num_bytes, reason, problem))

    def rescan(self, known: frozenset[str]) -> None:
        """See what other processes did to this model's directory."""
        changed_ns = changed_at(self._root / self._own)
        survey, found, gone = self._room.survey, [], frozenset[str]()
        damaged = survey.num_damaged
        try:
            keys = survey.sizes(self._own).keys()
            gone = known - keys
            found = list(survey.headers(self._own, keys - known))
        finally:
            self.saw(changed_ns)
            self.messages.append(
                Changed(
                    sorted(found, key=lambda header: header.start),
                    sorted(gone),
                    num_damaged=survey.num_damaged - damaged,
                    is_rescan=True,
                )
            )

    def remove(self, keys: Sequence[str]) -> None:
        """Remove entries of this model."""
        if not keys:
            return
        with contextlib.suppress(OSError, StoreError), self._changing():
            for key in keys:
                self._room.survey.remove(self._own, key)
            self.messages.append(Changed(gone=keys))

    def make_room(self, num_bytes: int) -> None:
        """Remove entries until the disk has `num_bytes` free beside its floor."""
        with contextlib.suppress(OSError, StoreError), self._changing():
            self._evict(0, (), floor_bytes=num_bytes)

    def reopen(self) -> None:
        """Try a directory again that could not be used."""
        try:
            self._room.open(self._clock())
            self.messages.append(Opened())
        except (OSError, StoreError) as exc:
            self.messages.append(Opened(refusal_of(exc), str(exc)))

    def read_ahead(self, paths: Sequence[str]) -> None:
        """Ask the system to read files into memory that are about to be mapped."""
        for path in paths:
            with contextlib.suppress(OSError, StoreError):
                descriptor = files.open_private(path)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
                os.close(descriptor)

    # --- how -----------------------------------------------------------------------------------

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception as exc:
                # A defect here must not end the thread that later entries need.
                log_event("prefix_cache_job_failed", reason=f"{type(exc).__name__}: {exc}")
            # Nothing of a job may outlive it here: it may hold a mapped file.
            del job

    def _write(self, temporary: files.Temporary, header: Header) -> Skip | None:
        with files.locked(self._root):
            if reason := self._room.charge(temporary.num_bytes, self._clock()):
                return reason
        temporary.sync()
        target = self._room.survey.path(self._own, header.key)
        with self._changing():
            if header.parent and not self._room.survey.path(self._own, header.parent).exists():
                return Skip.NO_PARENT
            own = () if not header.parent else ((self._own, header.parent),)
            # An equal entry that another process wrote is replaced, and counts only once.
            added = temporary.num_bytes - self._room.survey.sizes(self._own).get(header.key, 0)
            if reason := self._evict(added, own):
                return reason
            files.make_subdirectory(target.parent)
            temporary.rename(target)
        files.sync_directory(target.parent)
        return None

    def _evict(
        self, num_bytes: int, protected: Sequence[tuple[str, str]], *, floor_bytes: int = 0
    ) -> Skip | None:
        damaged = self._room.survey.num_damaged
        reason, gone = self._room.make_room(
            num_bytes, self._clock(), protected, more_free_bytes=floor_bytes
        )
        damaged = self._room.survey.num_damaged - damaged
        if gone or damaged:
            keys = [each.key for each in gone if each.directory == self._own]
            self.messages.append(Changed(gone=keys, num_evicted=len(gone), num_damaged=damaged))
        return reason

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold the lock; changes of this thread's own are no news afterwards, others' still are."""
        own = self._root / self._own
        with files.locked(self._root):
            is_known = changed_at(own) == self._seen_ns
            damaged = self._room.survey.num_damaged
            try:
                yield
            finally:
                # Damaged files were removed by name only: a rescan finds out which they were.
                if is_known and self._room.survey.num_damaged == damaged:
                    self.saw(changed_at(own))


def refusal_of(error: Exception) -> Skip:
    """What kind of failure it was to open the directory."""
    return Skip.REFUSED if isinstance(error, StoreError) else reason_of(error)


def reason_of(error: Exception) -> Skip:
    """What kind of failure it was."""
    if not isinstance(error, OSError):
        return Skip.WRITE_FAILED
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Skip.NO_SPACE
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return Skip.READ_ONLY
    return Skip.WRITE_FAILED
