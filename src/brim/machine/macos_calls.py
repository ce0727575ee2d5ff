"""The calls and commands of macOS, as bytes and text; `macos_formats` takes their answers apart.

Off a Mac the libraries are missing, and every call gives None.
"""

import ctypes
import functools
import subprocess
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from brim.machine.macos_formats import VM_STATISTICS_INTS, Battery

HOST_VM_INFO64 = 4
"""Flavour of host_statistics64."""

VM_BUFFER_INTS = 256
"""The most that the call can give.  A smaller buffer fails at times on macOS 26 and later, where
an answer that was kept for another caller may be longer than ours has room for."""

RUSAGE_INFO_V4 = 4
"""Flavour of proc_pid_rusage, 296 bytes."""

RUSAGE_BUFFER_BYTES = 512
"""More than any flavour's struct, since the kernel writes the whole of it."""

COMMAND_LIMIT_S = 5.0
"""Commands answer in 10 to 300 ms, on a machine that swaps in a second or two."""


class CpuTimes(NamedTuple):
    """Seconds since boot, over all processors, and of our own processes."""

    total_s: float
    busy_s: float
    own_s: float


class MacosCalls(Protocol):
    """What is asked of macOS; tests answer from recordings."""

    def sysctl(self, name: str) -> bytes | None:
        """The raw value of a sysctl; None where there is no such key."""
        ...

    def vm_statistics(self) -> bytes | None:
        """vm_statistics64 of the whole machine."""
        ...

    def rusage(self, pid: int) -> bytes | None:
        """rusage_info_v4 of a process; None where it is gone or another user's."""
        ...

    def notify_state(self, key: str) -> int | None:
        """The state that a notify key carries."""
        ...

    def low_power_mode(self) -> bool | None:
        """`isLowPowerModeEnabled` of the process's NSProcessInfo."""
        ...

    def battery(self) -> Battery | None:
        """What feeds the machine, by IOPowerSources."""
        ...

    def metal_working_set_bytes(self) -> int | None:
        """`recommendedMaxWorkingSetSize` of the default Metal device; None where there is none."""
        ...

    def command(self, *words: str) -> str | None:
        """What a command prints now; None where it cannot be run."""
        ...

    def fixed(self, *words: str) -> str | None:
        """What a command prints that says the same each time; asked once a process."""
        ...

    def cpu_times(self, own_pids: Sequence[int]) -> CpuTimes:
        """Seconds that the processors worked."""
        ...


class NativeCalls:
    """The calls themselves, by ctypes."""

    def sysctl(self, name: str) -> bytes | None:
        """By sysctlbyname, which needs no root."""
        libc = _libsystem()
        if libc is None:
            return None
        size = ctypes.c_size_t(0)
        if libc.sysctlbyname(name.encode(), None, ctypes.byref(size), None, 0):
            return None
        size.value += 16  # room for growth between the two calls
        buffer = ctypes.create_string_buffer(size.value)
        if libc.sysctlbyname(name.encode(), buffer, ctypes.byref(size), None, 0):
            return None
        return buffer.raw[: size.value]

    def vm_statistics(self) -> bytes | None:
        """By host_statistics64; asked more than once a second, the kernel repeats itself."""
        libc = _libsystem()
        if libc is None:
            return None
        buffer = (ctypes.c_int32 * VM_BUFFER_INTS)()
        count = ctypes.c_uint32(VM_BUFFER_INTS)
        if libc.host_statistics64(_host(), HOST_VM_INFO64, buffer, ctypes.byref(count)):
            return None
        if count.value < VM_STATISTICS_INTS:
            return None
        return bytes(buffer)[: count.value * 4]

    def rusage(self, pid: int) -> bytes | None:
        """By proc_pid_rusage."""
        try:
            libproc = ctypes.CDLL("/usr/lib/libproc.dylib", use_errno=True)
        except OSError:
            return None
        buffer = (ctypes.c_uint64 * (RUSAGE_BUFFER_BYTES // 8))()
        if libproc.proc_pid_rusage(ctypes.c_int(pid), RUSAGE_INFO_V4, ctypes.byref(buffer)):
            return None
        return bytes(buffer)

    def notify_state(self, key: str) -> int | None:
        """By notify_get_state, on a token that is kept for the process's life."""
        libc = _libsystem()
        token = None if libc is None else _notify_token(key)
        if libc is None or token is None:
            return None
        state = ctypes.c_uint64(0)
        if libc.notify_get_state(token, ctypes.byref(state)):
            return None
        return state.value

    def low_power_mode(self) -> bool | None:
        """Through the Objective-C run time; macOS 12 and later."""
        return _low_power_mode()

    def battery(self) -> Battery | None:
        """By psutil, whose trouble on macOS 26 is with memory alone; desktops have none."""
        import psutil

        try:
            found = psutil.sensors_battery()
        except (OSError, RuntimeError):
            return None
        if found is None or found.power_plugged is None:
            return None
        return Battery(not found.power_plugged, round(found.percent))

    def metal_working_set_bytes(self) -> int | None:
        """Through the Objective-C run time."""
        return _metal_working_set_bytes()

    def command(self, *words: str) -> str | None:
        """In a child process, with a bound on its time."""
        try:
            # A property of ioreg may hold any bytes.
            result = subprocess.run(
                words, capture_output=True, encoding="utf-8", errors="replace", check=False,
                timeout=COMMAND_LIMIT_S,
            )  # fmt: skip
        except (OSError, subprocess.SubprocessError):
            return None
        return result.stdout

    def fixed(self, *words: str) -> str | None:
        """As `command`, kept."""
        return _fixed_output(words)

    def cpu_times(self, own_pids: Sequence[int]) -> CpuTimes:
        """By psutil, whose trouble on macOS 26 is with memory alone."""
        import psutil

        times = psutil.cpu_times()
        own = 0.0
        for pid in own_pids:
            try:
                spent = psutil.Process(pid).cpu_times()
            except psutil.Error:
                continue
            own += spent.user + spent.system
        return CpuTimes(sum(times), sum(times) - times.idle, own)


@functools.cache
def _fixed_output(words: tuple[str, ...]) -> str | None:
    return NativeCalls().command(*words)


@functools.cache
def _libsystem() -> Any:
    """libSystem, which is in the shared cache and not on disk; None where there is none."""
    try:
        libc = ctypes.CDLL("/usr/lib/libSystem.B.dylib", use_errno=True)
    except OSError:
        return None
    pointer, name, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_size_t)
    u32, u32_out = ctypes.c_uint32, ctypes.POINTER(ctypes.c_uint32)
    libc.sysctlbyname.argtypes = [name, pointer, size, pointer, ctypes.c_size_t]
    libc.sysctlbyname.restype = ctypes.c_int
    libc.mach_host_self.restype = u32
    libc.host_statistics64.argtypes = [u32, ctypes.c_int, pointer, u32_out]
    libc.host_statistics64.restype = ctypes.c_int
    libc.notify_register_check.argtypes = [name, ctypes.POINTER(ctypes.c_int)]
    libc.notify_register_check.restype = u32
    libc.notify_get_state.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_uint64)]
    libc.notify_get_state.restype = u32
    return libc


@functools.cache
def _host() -> int:
    """The host port; once, since each call adds a reference to it."""
    return int(_libsystem().mach_host_self())


@functools.cache
def _notify_token(key: str) -> int | None:
    token = ctypes.c_int(0)
    if _libsystem().notify_register_check(key.encode(), ctypes.byref(token)):
        return None
    return token.value


def _metal_working_set_bytes() -> int | None:
    try:
        # Metal finds no default device in a process without CoreGraphics.
        ctypes.CDLL("/System/Library/Frameworks/CoreGraphics.framework/CoreGraphics")
        metal = ctypes.CDLL("/System/Library/Frameworks/Metal.framework/Metal")
        objc = _objc()
    except OSError:
        return None
    metal.MTLCreateSystemDefaultDevice.restype = ctypes.c_void_p
    device = metal.MTLCreateSystemDefaultDevice()
    if not device:
        return None
    return int(_send(objc, ctypes.c_uint64, device, "recommendedMaxWorkingSetSize")) or None


def _low_power_mode() -> bool | None:
    try:
        ctypes.CDLL("/System/Library/Frameworks/Foundation.framework/Foundation")
        objc = _objc()
    except OSError:
        return None
    process_class, message = objc.objc_getClass(b"NSProcessInfo"), "isLowPowerModeEnabled"
    # A message that an object does not know ends the process: macOS 11 has no such mode.
    if not process_class or not objc.class_respondsToSelector(
        process_class, objc.sel_registerName(message.encode())
    ):
        return None
    process = _send(objc, ctypes.c_void_p, process_class, "processInfo")
    return bool(_send(objc, ctypes.c_bool, process, message)) if process else None


@functools.cache
def _objc() -> Any:
    objc = ctypes.CDLL("/usr/lib/libobjc.A.dylib")
    for function in (objc.sel_registerName, objc.objc_getClass):
        function.restype = ctypes.c_void_p
        function.argtypes = [ctypes.c_char_p]
    objc.class_respondsToSelector.restype = ctypes.c_bool
    objc.class_respondsToSelector.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    return objc


def _send(objc: Any, result: Any, receiver: int, name: str) -> Any:
    """The answer of an object to a message without arguments."""
    send = ctypes.CFUNCTYPE(result, ctypes.c_void_p, ctypes.c_void_p)(("objc_msgSend", objc))
    return send(receiver, objc.sel_registerName(name.encode()))
