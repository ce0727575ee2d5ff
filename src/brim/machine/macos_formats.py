"""What macOS's calls and commands give, taken apart: structs, counters and printed lines.

Pure: each function takes bytes or text, so that recorded outputs test it on any system.
Sources: Apple's xnu (osfmk/mach/vm_statistics.h, bsd/sys/resource.h, bsd/sys/sysctl.h,
osfmk/vm/vm_compressor.c, libkern/OSThermalNotification.h) as of macOS 15.
"""

import json
import re
import struct
from typing import NamedTuple

from brim.core.machine import Cooling, Pressure, ThermalState
from brim.machine.names import PRODUCTS
from brim.machine.process_memory import ProcessMemory

VM_STATISTICS = struct.Struct("<4I9Q2I4Q4IQ")
"""vm_statistics64 up to macOS 15, 152 bytes.  Later releases add fields behind, never between."""

VM_STATISTICS_INTS = VM_STATISTICS.size // 4
"""38: fewer than these is an answer that cannot be read."""

SWAP_USAGE = struct.Struct("<QQQ")
"""Head of xsw_usage: total, available and used bytes."""

RUSAGE_WIRED, RUSAGE_RESIDENT, RUSAGE_FOOTPRINT, RUSAGE_PEAK_FOOTPRINT = 7, 8, 9, 30
"""Of rusage_info_v4 as 64-bit words: the uuid takes two, phys_footprint lies at byte 72,
lifetime_max_phys_footprint at 240."""

PRESSURE_LEVELS = {1: Pressure.NORMAL, 2: Pressure.WARNING, 4: Pressure.CRITICAL}
"""kern.memorystatus_vm_pressure_level."""

THERMAL_LEVELS = tuple(ThermalState)
"""com.apple.system.thermalpressurelevel, 0 to 4."""


class VmCounters(NamedTuple):
    """The system's pages, from host_statistics64 or from vm_stat."""

    page_bytes: int
    free: int
    """With speculative pages, as the kernel counts them."""
    active: int
    inactive: int
    wired: int
    anonymous: int
    purgeable: int
    compressor: int
    """Pages that the compressor takes, not those it has stored."""
    swapins: int
    swapouts: int
    source: str
    file_backed: int = 0
    """Active, inactive and speculative ones."""
    speculative: int = 0
    """Read ahead and not asked for yet; part of `free`."""

    def used_bytes(self) -> int:
        """In use as Activity Monitor counts it: app memory, wired and compressed.

        File pages and purgeable memory are given back on demand and do not count.
        """
        pages = self.anonymous - self.purgeable + self.wired + self.compressor
        return pages * self.page_bytes

    def available_bytes(self) -> int:
        """What can be taken before something in use is compressed, swapped or read again.

        Free and purgeable pages, and file pages that were not used lately.  The system does not
        say how many of the inactive pages are file pages: their share is taken to be the same
        among active and inactive ones.
        """
        pageable = self.active + self.inactive
        files = max(0, self.file_backed - self.speculative)
        idle_files = files * self.inactive // pageable if pageable else 0
        return (self.free + self.purgeable + idle_files) * self.page_bytes

    def compressor_ratio(self) -> float | None:
        """Compressor pages over pages that are neither compressed nor wired.

        The kernel warns above 1, swaps above 1.5, is critical above 1.92 and takes the warning
        back below 0.67; so this says earlier than its level how near the warning is.
        """
        pageable = self.active + self.inactive + self.free
        return self.compressor / pageable if pageable else None


def parse_vm_statistics(data: bytes, page_bytes: int) -> VmCounters | None:
    """Counters from vm_statistics64 of any release; None where the answer is too short."""
    if len(data) < VM_STATISTICS.size or not page_bytes:
        return None
    words = VM_STATISTICS.unpack_from(data)
    free, active, inactive, wired = words[:4]
    purgeable, speculative = words[13], words[14]
    swapins, swapouts, compressor = words[17], words[18], words[19]
    file_backed, anonymous = words[21], words[22]
    return VmCounters(
        page_bytes, free, active, inactive, wired, anonymous, purgeable, compressor,
        swapins, swapouts, "host_statistics64", file_backed, speculative,
    )  # fmt: skip


def parse_vm_stat(text: str) -> VmCounters:
    """Counters from the output of vm_stat.

    Raises:
        KeyError: A counter is missing; without it, memory in use would be promised again.
    """
    values = {name: int(n) for name, n in re.findall(r'^"?([^":\n]+)"?:\s+(\d+)\.$', text, re.M)}
    size = re.search(r"page size of (\d+) bytes", text)
    if size is None:
        raise KeyError("page size")
    return VmCounters(
        page_bytes=int(size[1]),
        free=values["Pages free"] + values["Pages speculative"],
        active=values["Pages active"],
        inactive=values["Pages inactive"],
        wired=values["Pages wired down"],
        anonymous=values["Anonymous pages"],
        purgeable=values["Pages purgeable"],
        compressor=values["Pages occupied by compressor"],
        swapins=values["Swapins"],
        swapouts=values["Swapouts"],
        source="vm_stat",
        file_backed=values["File-backed pages"],
        speculative=values["Pages speculative"],
    )


def parse_rusage(data: bytes) -> ProcessMemory:
    """Footprint (what Activity Monitor shows) and resident bytes from rusage_info_v4."""
    resident, footprint = struct.unpack_from("<2Q", data, RUSAGE_RESIDENT * 8)
    return ProcessMemory(dirty_bytes=footprint, resident_bytes=resident)


def parse_swap_usage(data: bytes) -> int | None:
    """Bytes of swap in use from vm.swapusage; a total of 0 is normal, since files grow on demand.

    Example:
        >>> parse_swap_usage(SWAP_USAGE.pack(2048, 1500, 548) + bytes(8))
        548
    """
    return SWAP_USAGE.unpack_from(data)[2] if len(data) >= SWAP_USAGE.size else None


def parse_sysctl_int(data: bytes | None) -> int | None:
    """A sysctl's number, 32 bits signed or 64 bits unsigned.

    Example:
        >>> parse_sysctl_int(bytes([2, 0, 0, 0])), parse_sysctl_int(b"abc")
        (2, None)
    """
    if data is None or len(data) not in (4, 8):
        return None
    return int.from_bytes(data, "little", signed=len(data) == 4)


def parse_sysctl_text(data: bytes | None) -> str:
    """A sysctl's text, which ends with a zero; empty where there is none."""
    return (data or b"").split(b"\0", 1)[0].decode("utf-8", "replace")


def parse_gpu_cores(text: str) -> int | None:
    """GPU cores from `ioreg -r -d 1 -w 0 -c IOAccelerator`.

    Example:
        >>> parse_gpu_cores('  "gpu-core-count" = 10')
        10
    """
    found = re.search(r'"gpu-core-count"\s*=\s*(\d+)', text)
    return int(found[1]) if found else None


class Battery(NamedTuple):
    """What `pmset -g batt` says."""

    is_on_battery: bool
    percent: int | None
    """None for a machine without a battery of its own."""


def parse_pmset_batt(text: str) -> Battery | None:
    """Power source and charge; None where the output is not understood.

    Example:
        >>> parse_pmset_batt("Now drawing from 'AC Power'")
        Battery(is_on_battery=False, percent=None)
    """
    source = re.search(r"drawing from '([^']+)'", text)
    if source is None:
        return None
    percent = re.search(r"-InternalBattery\S*.*?(\d+)%", text)
    return Battery(source[1] != "AC Power", int(percent[1]) if percent else None)


def parse_low_power_mode(text: str) -> bool | None:
    """Low Power Mode from `pmset -g`; machines that also have High Power print powermode instead.

    Example:
        >>> parse_low_power_mode(" lowpowermode         1"), parse_low_power_mode(" powermode  2")
        (True, False)
    """
    found = re.search(r"^\s*(?:lowpowermode|powermode)\s+(\d+)", text, re.M)
    return found[1] == "1" if found else None


def parse_product(text: str) -> str | None:
    """'MacBook Air' from `system_profiler -json SPHardwareDataType`.

    hw.model no longer tells: since 2022 it is 'Mac14,2' for laptops and desktops alike.
    """
    try:
        name = json.loads(text)["SPHardwareDataType"][0]["machine_name"]
    except (ValueError, KeyError, IndexError, TypeError):
        return None
    return name if isinstance(name, str) else None


def cooling_of(product: str | None) -> Cooling | None:
    """How a product keeps its speed; None for one that is not known.

    Example:
        >>> cooling_of("MacBook Air"), cooling_of("Mac mini"), cooling_of(None)
        (<Cooling.FANLESS: 'fanless'>, <Cooling.COMPACT: 'compact'>, None)
    """
    return next((cooling for title, cooling in PRODUCTS.values() if title == product), None)
