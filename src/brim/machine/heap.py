"""Gives memory back to the system that a process has freed and its C library keeps."""

import ctypes
from typing import Any


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
