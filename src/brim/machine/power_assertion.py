"""Keeps the machine from falling asleep while something generates, and no longer.

macOS: an assertion of IOKit (IOPMLib.h), which the system takes back with the process that made it,
however that ends.  It keeps no laptop awake whose lid is shut.  A child `caffeinate` would do the
same at the price of a process for each answer.

Linux: nothing.  logind's inhibitors need a session and its bus, which a service has not; servers do
not sleep, and desktops let their users say `systemd-inhibit brim serve`.
"""

import atexit
import ctypes
from typing import Any

ASSERTION_TYPE = "PreventUserIdleSystemSleep"
LEVEL_ON = 255
"""kIOPMAssertionLevelOn."""

UTF8 = 0x08000100
"""kCFStringEncodingUTF8."""

REASON = "brim is generating"
"""What `pmset -g assertions` shows."""


class PowerAssertion:
    """One assertion of this process, held or not.  For one thread.

    Args:
        iokit: macOS's IOKit; found where it is None.
        core_foundation: As well.
    """

    def __init__(self, iokit: Any = None, core_foundation: Any = None) -> None:
        self._iokit = iokit or _framework("IOKit")
        self._core_foundation = core_foundation or _framework("CoreFoundation")
        self._assertion: int | None = None
        if self.is_available:
            _declare(self._iokit, self._core_foundation)
            # The system would release it as well; this is for those who exit and linger.
            atexit.register(self.hold, False)

    @property
    def is_available(self) -> bool:
        """Whether this system has such assertions."""
        return self._iokit is not None and self._core_foundation is not None

    @property
    def is_held(self) -> bool:
        """Whether the machine is kept awake."""
        return self._assertion is not None

    def hold(self, is_wanted: bool) -> bool:
        """Hold the assertion or release it, if that is not so yet; whether it is held now."""
        if is_wanted and self._assertion is None and self.is_available:
            self._assertion = self._created()
        elif not is_wanted and self._assertion is not None:
            self._iokit.IOPMAssertionRelease(self._assertion)
            self._assertion = None
        return self.is_held

    def close(self) -> None:
        """Release it, and forget about the exit."""
        self.hold(False)
        atexit.unregister(self.hold)

    def _created(self) -> int | None:
        create, release = (
            self._core_foundation.CFStringCreateWithCString,
            (self._core_foundation.CFRelease),
        )
        texts = [create(None, text.encode(), UTF8) for text in (ASSERTION_TYPE, REASON)]
        assertion = ctypes.c_uint32(0)
        try:
            if not all(texts):
                return None
            failure = self._iokit.IOPMAssertionCreateWithName(
                texts[0], LEVEL_ON, texts[1], ctypes.byref(assertion)
            )
        finally:
            for text in filter(None, texts):
                release(text)
        return None if failure else assertion.value


def _framework(name: str) -> Any:
    try:
        return ctypes.CDLL(f"/System/Library/Frameworks/{name}.framework/{name}")
    except OSError:
        return None


def _declare(iokit: Any, core_foundation: Any) -> None:
    """Types of the calls; an undeclared pointer would be cut to 32 bits."""
    create = core_foundation.CFStringCreateWithCString
    create.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint32]
    create.restype = ctypes.c_void_p
    core_foundation.CFRelease.argtypes = [ctypes.c_void_p]
    core_foundation.CFRelease.restype = None
    iokit.IOPMAssertionCreateWithName.argtypes = [
        ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint32),
    ]  # fmt: skip
    iokit.IOPMAssertionCreateWithName.restype = ctypes.c_int
    iokit.IOPMAssertionRelease.argtypes = [ctypes.c_uint32]
    iokit.IOPMAssertionRelease.restype = ctypes.c_int
