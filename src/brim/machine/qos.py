"""Tells macOS how urgent a thread's work is, which decides the cores and the I/O it gets.

Threads that a backend starts inherit the class of the thread that starts them, so it is set before
the backend is imported.  Linux has nothing of the kind.
"""

import ctypes
from enum import IntEnum
from typing import Any


class QosClass(IntEnum):
    """How urgent; the values of <sys/qos.h>."""

    USER_INTERACTIVE = 0x21
    USER_INITIATED = 0x19
    DEFAULT = 0x15
    UTILITY = 0x11
    BACKGROUND = 0x09


def set_qos_class(qos: QosClass, libsystem: Any = None) -> bool:
    """Set the calling thread's class; whether the system took it.

    False off macOS, and in a process that was itself started in the background: no call promotes
    the threads of such a process.

    Args:
        qos: The class.
        libsystem: macOS's C library; found where it is None.
    """
    libsystem = libsystem or _libsystem()
    if libsystem is None:
        return False
    call = libsystem.pthread_set_qos_class_self_np
    call.argtypes = [ctypes.c_uint, ctypes.c_int]
    call.restype = ctypes.c_int
    # The second argument lowers the thread within its class, by 0 to 15.
    return bool(call(qos, 0) == 0)


def _libsystem() -> Any:
    """libSystem, which is in the shared cache and not on disk; None where there is none."""
    try:
        return ctypes.CDLL("/usr/lib/libSystem.B.dylib", use_errno=True)
    except OSError:
        return None
