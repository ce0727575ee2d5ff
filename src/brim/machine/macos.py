"""macOS: sysctl, vm_stat and libproc, by ctypes and one command.

Read from Apple's headers and sources and tested on recorded outputs; not yet run on a Mac.
psutil is not asked about memory: up to 7.2.2 its call may fail on macOS 26 and later.
"""

import ctypes
import functools
import re
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

from brim.core.machine import MachineSpec
from brim.errors import ConfigError
from brim.machine.process_memory import ProcessMemory

MIB = 1024 * 1024

RUSAGE_INFO_V4 = 4
"""Flavour of proc_pid_rusage, 296 bytes (bsd/sys/resource.h); the u64 fields used here follow."""
RESIDENT_SIZE, PHYS_FOOTPRINT = 8, 9

VM_STAT = "/usr/bin/vm_stat"

VM_STAT_LIMIT_S = 5.0
"""It answers in milliseconds, on a machine that swaps in a second or two."""

Sysctl = Callable[[str], bytes | None]


def read_macos(*, own_pids: Sequence[int] = ()) -> MachineSpec:
    """Memory and processors of this Mac."""
    ram = _int(sysctl_bytes("hw.memsize")) or 0
    used = used_bytes(_vm_stat())
    own = sum(m.dirty_bytes for pid in own_pids if (m := process_memory(pid)) is not None)
    gpu_limit, gpu_source = gpu_limit_bytes(sysctl_bytes, metal_working_set_bytes)
    cores, cores_source = performance_cores(sysctl_bytes)
    return MachineSpec(
        name=_text(sysctl_bytes("machdep.cpu.brand_string")) or "Mac",
        system="darwin",
        ram_bytes=ram,
        others_bytes=max(0, used - own),
        gpu_limit_bytes=gpu_limit,
        performance_cores=cores,
        sources={
            "ram_bytes": "sysctl hw.memsize",
            "others_bytes": "vm_stat: anonymous - purgeable + wired + compressor - own footprint",
            "gpu_limit_bytes": gpu_source,
            "performance_cores": cores_source,
        },
    )


def parse_vm_stat(text: str) -> dict[str, int]:
    """Pages by name, and 'page size' in bytes, from the output of vm_stat."""
    values = {name: int(n) for name, n in re.findall(r'^"?([^":\n]+)"?:\s+(\d+)\.$', text, re.M)}
    size = re.search(r"page size of (\d+) bytes", text)
    return {**values, "page size": int(size[1])} if size else {}


def used_bytes(vm_stat: dict[str, int]) -> int:
    """What is in use as Activity Monitor counts it: app memory, wired and compressed.

    File pages and purgeable memory are given back on demand and do not count.

    Raises:
        ConfigError: A counter is missing; without it, memory in use would be promised again.
    """
    try:
        pages = (
            vm_stat["Anonymous pages"]
            - vm_stat["Pages purgeable"]
            + vm_stat["Pages wired down"]
            + vm_stat["Pages occupied by compressor"]
        )
        return pages * vm_stat["page size"]
    except KeyError as exc:
        raise _vm_stat_fails(f"does not say {exc}") from exc


def gpu_limit_bytes(sysctl: Sysctl, metal: Callable[[], int | None]) -> tuple[int | None, str]:
    """What the GPU may keep resident, from Metal or the operator's override, and its source.

    The default share of RAM differs by release and memory size, so it is asked, never computed.
    """
    working_set = metal()
    if working_set:
        return working_set, "Metal recommendedMaxWorkingSetSize"
    override = _int(sysctl("iogpu.wired_limit_mb"))
    if override:
        return override * MIB, "sysctl iogpu.wired_limit_mb"
    return None, "Metal gives no device here and iogpu.wired_limit_mb is not set"


def performance_cores(sysctl: Sysctl) -> tuple[int, str]:
    """Cores without the slowest tier, by index: level 0 is the fastest, whatever it is called."""
    num_levels = _int(sysctl("hw.nperflevels")) or 0
    counts = [_int(sysctl(f"hw.perflevel{level}.physicalcpu")) or 0 for level in range(num_levels)]
    if not any(counts):
        return _int(sysctl("hw.physicalcpu")) or 1, "sysctl hw.physicalcpu"
    # On some chips the last level is a fast one as well; only a level of that name is slow.
    last = _text(sysctl(f"hw.perflevel{num_levels - 1}.name"))
    if last == "Efficiency" and any(counts[:-1]):
        counts = counts[:-1]
    return sum(counts), f"sysctl hw.perflevel0..{len(counts) - 1}.physicalcpu"


def process_memory(pid: int) -> ProcessMemory | None:
    """proc_pid_rusage's footprint (what Activity Monitor shows) and resident size."""
    try:
        libproc = ctypes.CDLL("/usr/lib/libproc.dylib", use_errno=True)
    except OSError:
        return None
    # More than any flavour's struct, since the kernel writes the whole of it.
    fields = (ctypes.c_uint64 * 64)()
    if libproc.proc_pid_rusage(ctypes.c_int(pid), RUSAGE_INFO_V4, ctypes.byref(fields)):
        return None
    return ProcessMemory(dirty_bytes=fields[PHYS_FOOTPRINT], resident_bytes=fields[RESIDENT_SIZE])


def sysctl_bytes(name: str) -> bytes | None:
    """The raw value of a sysctl; None where there is no such key."""
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


def metal_working_set_bytes() -> int | None:
    """`recommendedMaxWorkingSetSize` of the default Metal device; None where there is none."""
    try:
        # Metal finds no default device in a process without CoreGraphics.
        ctypes.CDLL("/System/Library/Frameworks/CoreGraphics.framework/CoreGraphics")
        metal = ctypes.CDLL("/System/Library/Frameworks/Metal.framework/Metal")
        objc = ctypes.CDLL("/usr/lib/libobjc.A.dylib")
    except OSError:
        return None
    metal.MTLCreateSystemDefaultDevice.restype = ctypes.c_void_p
    device = metal.MTLCreateSystemDefaultDevice()
    if not device:
        return None
    objc.sel_registerName.restype = ctypes.c_void_p
    objc.sel_registerName.argtypes = [ctypes.c_char_p]
    send = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p, ctypes.c_void_p)(
        ("objc_msgSend", objc)
    )
    return int(send(device, objc.sel_registerName(b"recommendedMaxWorkingSetSize"))) or None


@functools.cache
def _libsystem() -> Any:
    """libSystem, which is in the shared cache and not on disk; None where there is none."""
    try:
        libc = ctypes.CDLL("/usr/lib/libSystem.B.dylib", use_errno=True)
    except OSError:
        return None
    size = ctypes.POINTER(ctypes.c_size_t)
    libc.sysctlbyname.argtypes = [
        ctypes.c_char_p, ctypes.c_void_p, size, ctypes.c_void_p, ctypes.c_size_t,
    ]  # fmt: skip
    libc.sysctlbyname.restype = ctypes.c_int
    return libc


def _vm_stat() -> dict[str, int]:
    try:
        result = subprocess.run(
            [VM_STAT], capture_output=True, text=True, check=False, timeout=VM_STAT_LIMIT_S
        )
    except (OSError, subprocess.SubprocessError) as exc:
        raise _vm_stat_fails(f"cannot be asked ({exc})") from exc
    return parse_vm_stat(result.stdout)


def _vm_stat_fails(what: str) -> ConfigError:
    return ConfigError(
        f"{VM_STAT} {what}, so nobody knows how much memory is free; run it by hand, and start "
        "brim again when it answers"
    )


def _int(value: bytes | None) -> int | None:
    if value is None or len(value) not in (4, 8):
        return None
    return int.from_bytes(value, "little", signed=len(value) == 4)


def _text(value: bytes | None) -> str:
    return (value or b"").split(b"\0", 1)[0].decode("utf-8", "replace")
