"""Measures how fast the disk gives a file that is not in memory."""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

CHUNK_BYTES = 8 * 1024 * 1024
"""Large enough that the system reads ahead at its full rate."""

CACHED_RATIO = 0.8
"""A first read this near to a second one came from memory too: nothing was measured."""

Clock = Callable[[], float]


def disk_read_rate(path: Path, *, clock: Clock = time.perf_counter) -> float | None:
    """Bytes a second of a read from the disk; None where the page cache could not be emptied.

    Reads the file twice, the second time from memory, and leaves it in the cache.

    Args:
        path: A file of some hundred megabytes, written to the disk before.
        clock: Of seconds.

    Raises:
        OSError: The file cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        _forget(file.fileno())
        first = _read_rate(file.fileno(), clock)
    with path.open("rb", buffering=0) as file:
        second = _read_rate(file.fileno(), clock)
    return first if first < CACHED_RATIO * second else None


def _forget(descriptor: int) -> None:
    """Have the file's pages dropped from memory, or read past them."""
    with contextlib.suppress(OSError):  # a file that was opened to be read need not be written
        os.fsync(descriptor)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    elif hasattr(fcntl, "F_NOCACHE"):
        fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)


def _read_rate(descriptor: int, clock: Clock) -> float:
    buffer, total = bytearray(CHUNK_BYTES), 0
    begin_s = clock()
    while count := os.readv(descriptor, [buffer]):
        total += count
    return total / max(clock() - begin_s, 1e-9)
