"""Measures how fast threads read memory: what bounds decoding on every machine.

libc's memchr looks for a byte that is not there, so it reads all of a buffer and writes nothing, in
the widest vectors the processor has, and without the interpreter's lock.
"""

import ctypes
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from brim.core.calibration import BandwidthSample

BUFFER_BYTES = 256 * 1024 * 1024
"""Several times the last-level cache of laptops and desktops, so that memory answers, not a cache.

A 2-core VM with 32 MiB of L3 gave its two threads 123 GB/s at 16 MiB, 48 at 64 and 47 at 256.
"""

PROBE_S = 0.3
"""For all thread counts together: some 20 passes, of which the best shows what the memory can."""

PAGE_BYTES = 4096

Clock = Callable[[], float]

_libc = ctypes.CDLL(None)
_libc.memchr.restype = ctypes.c_void_p
_libc.memchr.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)


def thread_counts(num_cores: int) -> tuple[int, ...]:
    """Numbers of threads worth measuring: one, doubled up to all cores.

    Example:
        >>> thread_counts(6)
        (1, 2, 4, 6)
    """
    counts = [1]
    while counts[-1] * 2 < num_cores:
        counts.append(counts[-1] * 2)
    return tuple(dict.fromkeys((*counts, max(1, num_cores))))


def read_bandwidth(
    counts: Sequence[int],
    *,
    limit_s: float = PROBE_S,
    buffer_bytes: int = BUFFER_BYTES,
    clock: Clock = time.perf_counter,
) -> tuple[BandwidthSample, ...]:
    """Bytes a second that each number of threads reads at once; the best of several passes.

    Takes `limit_s`, at least one pass for each count, and a tenth of a second for the buffer.

    Args:
        counts: Numbers of threads.
        limit_s: Time for all of them together.
        buffer_bytes: What one pass reads, shared out among the threads; freed afterwards.
        clock: Of seconds.
    """
    # Written to, because untouched pages are one shared page of zeros and stay in a cache.
    buffer = np.ones(buffer_bytes, dtype=np.uint8)
    with ThreadPoolExecutor(max(counts)) as pool:
        return tuple(
            BandwidthSample(
                num_threads=count,
                bytes_per_s=_best_rate(pool, buffer, count, limit_s / len(counts), clock),
            )
            for count in counts
        )


def _best_rate(
    pool: ThreadPoolExecutor,
    buffer: np.ndarray[tuple[int], np.dtype[np.uint8]],
    num_threads: int,
    limit_s: float,
    clock: Clock,
) -> float:
    start, part = buffer.ctypes.data, len(buffer) // num_threads // PAGE_BYTES * PAGE_BYTES
    parts = [(start + i * part, part) for i in range(num_threads)]
    best_s, begin_s = float("inf"), clock()
    while best_s == float("inf") or clock() - begin_s < limit_s:
        pass_s = clock()
        list(pool.map(_read, parts))
        best_s = min(best_s, clock() - pass_s)
    return part * num_threads / best_s


def _read(part: tuple[int, int]) -> None:
    address, num_bytes = part
    if _libc.memchr(address, 0, num_bytes) is not None:
        raise RuntimeError("the buffer of ones holds a zero")
