"""Directories and files of the cache: private to the user, never through a link, safe in a crash.

Layout: DIRECTORY/lock, DIRECTORY/written-DAY, DIRECTORY/tmp/*, DIRECTORY/<model>/<segment>.kv.
"""

import contextlib
import errno
import fcntl
import itertools
import mmap
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from brim.errors import StoreError
from brim.machine.file_blocks import reserve_blocks
from brim.prefix_cache import format as form

LOCK_LIMIT_S = 10.0
"""Longer than making room for an entry takes; who holds the lock longer hangs."""

LOCK_POLL_S = 0.005
"""Making room takes about this long; flock has no wait with a limit."""

CAN_READ_AHEAD = hasattr(os, "posix_fadvise")
"""Whether a file can be read ahead before it is mapped; on macOS the mapping has to ask."""

ORPHAN_AGE_S = 60.0
"""Between making a temporary file and locking it lie microseconds; a minute is no such moment."""

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
"""NONBLOCK: a named pipe in the place of a file must not stop us."""

_counter = itertools.count()


def make_directory(path: Path) -> None:
    """Make a directory for this user alone, or check that it is one.

    Raises:
        StoreError: It is a file, another user's, or one that others can write.
        OSError: It cannot be made.
    """
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700, parents=True)
    status = path.stat()
    if not stat.S_ISDIR(status.st_mode):
        raise StoreError(f"{path} is no directory; name another one in cache.directory")
    if status.st_uid != os.getuid():
        raise StoreError(
            f"{path} belongs to another user, who could feed answers through it; "
            "name one of your own in cache.directory"
        )
    if status.st_mode & 0o022:
        raise StoreError(
            f"{path} can be written by others, who could feed answers through it; "
            f"take their right away: chmod go-w '{path}'"
        )


def make_subdirectory(path: Path) -> None:
    """Make a directory within the cache's; the cache's own may be a link to another disk, this not.

    Raises:
        StoreError: It is a link, a file, another user's, or one that others can write.
        OSError: It cannot be made.
    """
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    if not is_private_directory(path):
        raise StoreError(f"{path} is no private directory of yours; remove it")


def is_private_directory(path: Path) -> bool:
    """Whether a directory is one of ours, and no link to another."""
    try:
        status = path.lstat()
    except OSError:
        return False
    mode = status.st_mode
    return stat.S_ISDIR(mode) and status.st_uid == os.getuid() and not mode & 0o022


def open_private(path: str | Path) -> int:
    """Open a file of ours for reading; gives the descriptor.

    Raises:
        StoreError: It is a link, a pipe, another user's, or others can write it.
        FileNotFoundError: It is gone.
        OSError: It cannot be opened.
    """
    try:
        descriptor = os.open(path, _READ)
    except OSError as exc:
        # A link to follow is ELOOP (EMLINK on some BSDs).
        if exc.errno in (errno.ELOOP, errno.EMLINK):
            raise StoreError("a prefix cache entry is a link") from exc
        raise
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        os.close(descriptor)
        raise StoreError("a prefix cache entry is no private file")
    return descriptor


def read_header(path: str | Path) -> form.Header:
    """The header of a file, checked, whose name fits what it says.

    Raises:
        StoreError: It is damaged, foreign, or stands under another name.
        OSError: It cannot be read.
    """
    descriptor = open_private(path)
    try:
        size = os.fstat(descriptor).st_size
        data = os.pread(descriptor, form.PAGE_BYTES, 0)
        header_bytes = form.header_bytes_of(data, size)
        if header_bytes > len(data):
            data += os.pread(descriptor, header_bytes - len(data), len(data))
    finally:
        os.close(descriptor)
    header = form.decode(data, size)
    if header.key != Path(path).stem:
        raise StoreError("a prefix cache entry stands under another's name")
    return header


def map_entry(path: str | Path, used_unix_s: float | None) -> tuple[form.Header, memoryview]:
    """The header, checked, and the block of a file, mapped for reading.

    Args:
        path: The file.
        used_unix_s: Marks it as used at that time; None leaves it as it was.

    Raises:
        StoreError: It is damaged, foreign, or stands under another name.
        OSError: It cannot be read.
    """
    descriptor = open_private(path)
    try:
        size = os.fstat(descriptor).st_size
        if size < form.PAGE_BYTES:
            raise StoreError("a prefix cache entry is cut short")
        mapped = mmap.mmap(descriptor, size, prot=mmap.PROT_READ)
        if not CAN_READ_AHEAD:
            mapped.madvise(mmap.MADV_WILLNEED)
        view = memoryview(mapped)
        header = form.decode(view, size)
        block = view[header.header_bytes :]
        head = bytes(block[: form.BLOCK_HEAD_BYTES])
        if header.key != Path(path).stem or head.ljust(form.BLOCK_HEAD_BYTES, b"\0") != (
            header.block_head
        ):
            raise StoreError("a prefix cache entry has another's header or block")
        if used_unix_s is not None:
            # A read-only file system takes no times; entries there are not evicted either.
            with contextlib.suppress(OSError):
                os.utime(descriptor, (used_unix_s, used_unix_s))
    finally:
        os.close(descriptor)
    return header, block


class Temporary:
    """A file that becomes an entry, mapped and locked by this process while it is written.

    Args:
        directory: Where it lies until then.
        num_bytes: Its size, which it has at once.
        made_unix_s: When its contents were used, for eviction.

    Raises:
        OSError: The disk is full or cannot be written.
    """

    def __init__(self, directory: Path, num_bytes: int, made_unix_s: float) -> None:
        name = f"{os.getpid()}-{next(_counter)}-{os.urandom(4).hex()}.tmp"
        self.path, self.num_bytes = directory / name, num_bytes
        self._made_unix_s = made_unix_s
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(self.path, flags, 0o600)
        try:
            # The lock ends with the process, however that ends: it tells orphans from files of
            # the living, which a process id cannot once it is another's.
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            reserve_blocks(self._fd, num_bytes)
            self.view = memoryview(mmap.mmap(self._fd, num_bytes))
        except OSError:
            self.remove()
            raise

    def sync(self) -> None:
        """Bring the contents to the disk.

        Raises:
            OSError: They did not arrive, and nobody knows which of them did: remove the file.
        """
        sync_file(self._fd)

    def rename(self, target: Path) -> None:
        """Make it an entry.

        Raises:
            OSError: It stayed where it was.
        """
        os.utime(self._fd, (self._made_unix_s, self._made_unix_s))
        self.path.rename(target)

    def remove(self) -> None:
        """Remove the file, if it still has its first name."""
        with contextlib.suppress(OSError):
            self.path.unlink()
        self.close()

    def close(self) -> None:
        """Let go of the file; the mapping goes with the last view of it."""
        self.view = memoryview(b"")
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def sync_file(descriptor: int) -> None:
    """Have a file's contents on the disk itself when this returns.

    macOS's fsync hands them to the drive, which may keep them in its own cache and write them in
    another order; F_FULLFSYNC waits for the platter.

    Raises:
        OSError: They did not arrive.
    """
    if (full := getattr(fcntl, "F_FULLFSYNC", None)) is not None:
        try:
            fcntl.fcntl(descriptor, full)
            return
        except OSError as exc:
            # Network and foreign file systems do not have it, and get what they have.
            if exc.errno not in (errno.ENOTSUP, errno.EINVAL, errno.ENOTTY):
                raise
    os.fsync(descriptor)


def sync_directory(path: Path) -> None:
    """Have the names in a directory on the disk.

    Raises:
        OSError: They did not arrive.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sync_file(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(path: str | Path) -> int:
    """Bytes that this user may still write to the file system.

    Raises:
        OSError: It cannot be asked.
    """
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the lock of a cache directory, against other processes and stores.

    Raises:
        StoreError: Somebody else holds it for too long.
        OSError: The lock file cannot be made.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(directory / "lock", flags, 0o600)
    try:
        _wait_for_lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def _wait_for_lock(descriptor: int) -> None:
    give_up_s = time.monotonic() + LOCK_LIMIT_S
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > give_up_s:
                raise StoreError("another process keeps the prefix cache locked") from None
            time.sleep(LOCK_POLL_S)


def remove_orphans(directory: Path) -> int:
    """Remove temporary files whose process has ended; gives how many there were."""
    num_removed = 0
    for path in directory.glob("*.tmp"):
        with contextlib.suppress(OSError, StoreError):
            if _is_orphan(path):
                path.unlink()
                num_removed += 1
    return num_removed


def _is_orphan(path: Path) -> bool:
    descriptor = open_private(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        age_s = time.time() - os.fstat(descriptor).st_mtime
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    pid = path.name.partition("-")[0]
    return age_s > ORPHAN_AGE_S or not (pid.isdecimal() and _is_running(int(pid)))


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
