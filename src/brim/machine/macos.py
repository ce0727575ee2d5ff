"""macOS behind the interface of every machine: what is asked of it, and with which fallback.

Written from Apple's headers and sources and tested on recorded outputs; not yet run on a Mac.
psutil is not asked about memory: up to 7.2.2 its call may fail on macOS 26 and later.

Mapped weights that the GPU has wired are in the system's wired pages and in nobody's footprint, so
those of our own models count as others' use: too little is promised then, never too much.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

from brim.core.machine import Conditions, MachineSpec
from brim.errors import ConfigError
from brim.machine import chips
from brim.machine.interface import Reading, conditions_of
from brim.machine.macos_calls import MacosCalls, NativeCalls
from brim.machine.macos_formats import (
    PRESSURE_LEVELS,
    THERMAL_LEVELS,
    Battery,
    VmCounters,
    cooling_of,
    parse_gpu_cores,
    parse_low_power_mode,
    parse_pmset_batt,
    parse_product,
    parse_rusage,
    parse_swap_usage,
    parse_sysctl_int,
    parse_sysctl_text,
    parse_vm_stat,
    parse_vm_statistics,
)
from brim.machine.process_memory import ProcessMemory

MIB = 1024 * 1024

VM_STAT = "/usr/bin/vm_stat"
PMSET = "/usr/bin/pmset"
IOREG = ("/usr/sbin/ioreg", "-r", "-d", "1", "-w", "0", "-c", "IOAccelerator")
PROFILER = ("/usr/sbin/system_profiler", "-json", "SPHardwareDataType")
"""190 to 300 ms, so asked once a process; nothing quicker names the product."""

PRESSURE_KEY = "kern.memorystatus_vm_pressure_level"
THERMAL_KEY = "com.apple.system.thermalpressurelevel"

WINDOW_S = 0.25
"""Between the two readings of the processors' times, which are counted in ticks of 10 ms."""


class MacosMachine:
    """A Mac.

    Args:
        calls: What is asked of the system.
        own_pids: Processes whose memory and load are ours, asked at each reading.
        sleep: Waits between two readings of the processors.
    """

    def __init__(
        self,
        calls: MacosCalls | None = None,
        *,
        own_pids: Callable[[], Sequence[int]] = tuple,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._calls = NativeCalls() if calls is None else calls
        self._own_pids = own_pids
        self._sleep = sleep

    def read_machine(self) -> MachineSpec:
        """Memory and processors of this Mac.

        Raises:
            ConfigError: Neither the kernel nor vm_stat says how much memory is in use, or the
                kernel does not say how much there is.
        """
        calls = self._calls
        counters = vm_counters(calls)
        memories = [self.process_memory(pid) for pid in self._own_pids()]
        own_bytes = sum(memory.dirty_bytes for memory in memories if memory is not None)
        readings = {
            "ram_bytes": Reading(_ram_bytes(calls), "sysctl hw.memsize"),
            "others_bytes": Reading(
                max(0, counters.used_bytes() - own_bytes),
                f"{counters.source}: anonymous - purgeable + wired + compressor - own footprint",
            ),
            "gpu_limit_bytes": gpu_limit(calls),
            "performance_cores": performance_cores(calls),
        }
        brand = parse_sysctl_text(calls.sysctl("machdep.cpu.brand_string"))
        readings |= _by_table(calls, brand, readings["ram_bytes"].value)
        return MachineSpec(
            name=brand or "Mac",
            system="darwin",
            sources={name: reading.source for name, reading in readings.items()},
            **{name: reading.value for name, reading in readings.items()},
        )

    def read_conditions(self) -> Conditions:
        """What this Mac feels now, the processors watched for a quarter of a second."""
        calls = self._calls
        by_commands = _power_by_commands(calls)
        return conditions_of(
            {
                **_signals(calls),
                **_memory(calls),
                # What a command does not say, a call may have said.
                **{name: said for name, said in by_commands.items() if said.value is not None},
                "busy_fraction": self._busy_fraction(),
            }
        )

    def read_signals(self) -> Conditions:
        """What calls say at once; commands are left to `read_conditions`."""
        busy = Reading(None, "not watched: that takes a quarter of a second")
        return conditions_of({**_signals(self._calls), "busy_fraction": busy})

    def process_memory(self, pid: int) -> ProcessMemory | None:
        """proc_pid_rusage's footprint and resident size."""
        data = self._calls.rusage(pid)
        return None if data is None else parse_rusage(data)

    def resident_bytes(self, pid: int) -> int | None:
        """proc_pid_rusage's resident size, which leaves out what the GPU alone has mapped."""
        memory = self.process_memory(pid)
        return None if memory is None else memory.resident_bytes

    def _busy_fraction(self) -> Reading:
        own_pids = self._own_pids()
        before = self._calls.cpu_times(own_pids)
        self._sleep(WINDOW_S)
        after = self._calls.cpu_times(own_pids)
        total_s = after.total_s - before.total_s
        if total_s <= 0:
            return Reading(None, "the processors' times do not move")
        others_s = (after.busy_s - before.busy_s) - (after.own_s - before.own_s)
        source = f"host_statistics over {WINDOW_S:g} s, without our own processes"
        return Reading(min(1.0, max(0.0, others_s / total_s)), source)


def vm_counters(calls: MacosCalls) -> VmCounters:
    """The system's pages, from the kernel or, where it does not answer, from vm_stat.

    Raises:
        ConfigError: Neither says them; without, memory in use would be promised again.
    """
    counters = kernel_counters(calls)
    if counters is not None:
        return counters
    text = calls.command(VM_STAT)
    if text is None:
        raise _no_counters("cannot be asked")
    try:
        return parse_vm_stat(text)
    except KeyError as exc:
        raise _no_counters(f"does not say {exc}") from exc


def kernel_counters(calls: MacosCalls) -> VmCounters | None:
    """The system's pages from the kernel, which says the same for a second; None: no answer."""
    data = calls.vm_statistics()
    page_bytes = parse_sysctl_int(calls.sysctl("hw.pagesize")) or 0
    return None if data is None else parse_vm_statistics(data, page_bytes)


def gpu_limit(calls: MacosCalls) -> Reading:
    """What the GPU may keep resident, from Metal or the operator's override.

    The default share of RAM differs by release and memory size, so it is asked, never computed.
    """
    working_set = calls.metal_working_set_bytes()
    if working_set:
        return Reading(working_set, "Metal recommendedMaxWorkingSetSize")
    override = parse_sysctl_int(calls.sysctl("iogpu.wired_limit_mb"))
    if override:
        return Reading(override * MIB, "sysctl iogpu.wired_limit_mb")
    return Reading(None, "Metal gives no device here and iogpu.wired_limit_mb is not set")


def performance_cores(calls: MacosCalls) -> Reading:
    """Cores without the slowest tier, by index: level 0 is the fastest, whatever it is called."""

    def number(name: str) -> int:
        return parse_sysctl_int(calls.sysctl(name)) or 0

    num_levels = number("hw.nperflevels")
    counts = [number(f"hw.perflevel{level}.physicalcpu") for level in range(num_levels)]
    if not any(counts):
        return Reading(number("hw.physicalcpu") or 1, "sysctl hw.physicalcpu")
    # On some chips the last level is a fast one as well; only a level of that name is slow.
    last = parse_sysctl_text(calls.sysctl(f"hw.perflevel{num_levels - 1}.name"))
    if last == "Efficiency" and any(counts[:-1]):
        counts = counts[:-1]
    return Reading(sum(counts), f"sysctl hw.perflevel0..{len(counts) - 1}.physicalcpu")


def _ram_bytes(calls: MacosCalls) -> int:
    ram_bytes = parse_sysctl_int(calls.sysctl("hw.memsize"))
    if not ram_bytes:
        raise ConfigError(
            "sysctl hw.memsize does not say how much memory this Mac has, so nothing can be "
            "promised; run: sysctl hw.memsize, and start brim again when it answers"
        )
    return ram_bytes


def _by_table(calls: MacosCalls, brand: str, ram_bytes: int) -> dict[str, Reading]:
    """What the chip is, and what its maker says of it."""
    product = parse_product(calls.fixed(*PROFILER) or "")
    cooling = Reading(cooling_of(product), f"system_profiler: {product or 'no answer'}")
    num_cores = parse_gpu_cores(calls.fixed(*IOREG) or "")
    gpu_cores = Reading(num_cores, "ioreg gpu-core-count" if num_cores else "ioreg does not say")
    chip = chips.find_chip(brand, num_cores, ram_bytes)
    if chip is None:
        no_entry = Reading(None, f"no entry for '{brand}' in the chip table")
        figures = dict.fromkeys(("chip", "memory_bandwidth", "fp32_flops"), no_entry)
        return {**figures, "gpu_cores": gpu_cores, "cooling": cooling}
    if num_cores is None:
        gpu_cores = Reading(chip.gpu_cores, "assumed: the lower bin, since ioreg does not say")
    return {
        "chip": Reading(chip.chip, "sysctl machdep.cpu.brand_string"),
        "gpu_cores": gpu_cores,
        "memory_bandwidth": Reading(
            round(chip.memory_bandwidth_gb_s * chips.GIGA), "chip table: what Apple states"
        ),
        "fp32_flops": Reading(*chips.fp32_flops(chip)),
        "cooling": cooling,
    }


def _pressure(calls: MacosCalls) -> Reading:
    level = parse_sysctl_int(calls.sysctl(PRESSURE_KEY))
    if level not in PRESSURE_LEVELS:
        return Reading(None, f"sysctl {PRESSURE_KEY} gives {level}")
    return Reading(PRESSURE_LEVELS[level], f"sysctl {PRESSURE_KEY}")


def _signals(calls: MacosCalls) -> dict[str, Reading]:
    """All that needs no command and no wait."""
    counters = kernel_counters(calls)
    data = calls.sysctl("vm.swapusage")
    return {
        "pressure": _pressure(calls),
        **_by_pages(counters, "host_statistics64 gives no answer"),
        "swap_used_bytes": Reading(
            None if data is None else parse_swap_usage(data), "sysctl vm.swapusage"
        ),
        "stalled_percent": Reading(None, "macOS does not measure stalls"),
        "refaulted_bytes": Reading(None, "macOS does not count what it reads again; see pressure"),
        "major_faults": Reading(None, "not read: nothing to hold them against; see pressure"),
        "thermal": _thermal(calls),
        "hottest_celsius": Reading(None, "macOS gives temperatures to root alone"),
        "is_throttled": Reading(None, "macOS does not say; see thermal"),
        **_power_by_calls(calls),
    }


def _memory(calls: MacosCalls) -> dict[str, Reading]:
    try:
        return _by_pages(vm_counters(calls), "")
    except ConfigError as exc:
        return _by_pages(None, exc.message)


def _by_pages(counters: VmCounters | None, reason: str) -> dict[str, Reading]:
    """What the system's counters say; `reason` stands where there are none."""
    if counters is None:
        names = ("available_bytes", "compressor_ratio", "swapped_out_bytes", "swapped_in_bytes")
        return dict.fromkeys(names, Reading(None, reason))
    page_bytes, source = counters.page_bytes, counters.source

    def swapped(pages: int) -> Reading:
        return Reading(pages * page_bytes, f"{source}, since boot")

    return {
        "available_bytes": Reading(
            counters.available_bytes(), f"{source}: free + purgeable + file pages not used lately"
        ),
        "compressor_ratio": Reading(
            counters.compressor_ratio(), f"{source}: compressor / (active + inactive + free)"
        ),
        "swapped_out_bytes": swapped(counters.swapouts),
        "swapped_in_bytes": swapped(counters.swapins),
    }


def _thermal(calls: MacosCalls) -> Reading:
    level = calls.notify_state(THERMAL_KEY)
    if level is None or level >= len(THERMAL_LEVELS):
        return Reading(None, f"notify key {THERMAL_KEY} gives {level}")
    return Reading(THERMAL_LEVELS[level], f"notify key {THERMAL_KEY}")


def _power_by_commands(calls: MacosCalls) -> dict[str, Reading]:
    is_low_power = parse_low_power_mode(calls.command(PMSET, "-g") or "")
    battery = parse_pmset_batt(calls.command(PMSET, "-g", "batt") or "")
    return _power(is_low_power, "pmset -g: lowpowermode", battery, "pmset -g batt")


def _power_by_calls(calls: MacosCalls) -> dict[str, Reading]:
    is_low_power = calls.low_power_mode()
    return _power(is_low_power, "NSProcessInfo", calls.battery(), "IOPowerSources")


def _power(
    is_low_power: bool | None, mode_source: str, battery: Battery | None, battery_source: str
) -> dict[str, Reading]:
    on_battery: Any = None if battery is None else battery.is_on_battery
    percent: Any = None if battery is None else battery.percent
    return {
        "is_low_power": Reading(is_low_power, _said(is_low_power, mode_source)),
        "is_on_battery": Reading(on_battery, _said(on_battery, battery_source)),
        "battery_percent": Reading(percent, _said(percent, battery_source)),
    }


def _said(value: object, source: str) -> str:
    return f"{source} does not say" if value is None else source


def _no_counters(what: str) -> ConfigError:
    return ConfigError(
        f"host_statistics64 gives no answer and {VM_STAT} {what}, so nobody knows how much memory "
        f"is free; run {VM_STAT} by hand, and start brim again when it answers"
    )
