"""Has memory that a process has freed go back to the system, where its C library would keep it."""

import ctypes
from typing import Any

LARGE_BLOCK_BYTES = 512 * 1024
"""Blocks from here on are mapped one by one and unmapped as they are freed.  Above the 256 KiB that
asyncio's own loop allocates for each read of a socket, which would cost three calls of the system
otherwise; below what any large request body, its decoded lists or its text take."""

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8
"""Source: glibc's malloc.h."""


def keep_heap_compact(libc: Any = None) -> None:
    """Have glibc keep one heap for all threads, and give large blocks back as they are freed.

    It keeps a heap for each thread otherwise, eight for each core, and after the first large block
    was freed it takes the next ones, up to 32 MiB, from these heaps; each then stays as large as
    the most that its thread ever held.  Threads that already have a heap keep it, so this is for a
    process's start.  One heap costs a process little whose threads wait for Python's lock anyway.
    Elsewhere nothing is done: macOS and musl map large blocks one by one by themselves.

    Args:
        libc: The C library; the process's own where it is None.
    """
    libc = libc or ctypes.CDLL(None)
    try:
        mallopt = libc.mallopt
    except AttributeError:
        return
    mallopt(ctypes.c_int(_M_ARENA_MAX), ctypes.c_int(1))
    # Once it is set, glibc no longer raises it by what is freed.
    mallopt(ctypes.c_int(_M_MMAP_THRESHOLD), ctypes.c_int(LARGE_BLOCK_BYTES))


def trim_heap(libc: Any = None) -> None:
    """Have the C library hand its free pages back; it keeps them for the next allocation otherwise.

    glibc returns an allocation of more than 32 MiB as it is freed, and what is smaller only from
    the end of its heap; macOS's zones keep pages until the system asks.  Elsewhere nothing is done.

    Args:
        libc: The C library; the process's own where it is None.
    """
    libc = libc or ctypes.CDLL(None)
    for name, arguments in (
        ("malloc_trim", (ctypes.c_size_t(0),)),
        ("malloc_zone_pressure_relief", (ctypes.c_void_p(None), ctypes.c_size_t(0))),
    ):
        try:
            call = getattr(libc, name)
        except AttributeError:
            continue
        call(*arguments)
        return
