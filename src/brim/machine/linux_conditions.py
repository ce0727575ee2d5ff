"""What a Linux machine feels: stalls, swap, heat, power and the load of others.

Every function takes the root of the file tree, so that recorded trees can be read.  Virtual
machines and containers lack most of sysfs, so every figure may be missing.
Source: https://docs.kernel.org/accounting/psi.html, driver-api/thermal/sysfs-api.html,
ABI/testing/sysfs-class-power and sysfs-platform_profile.
"""

import re
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from brim.core.machine import Conditions, ThermalState
from brim.machine.cgroup import hierarchies, read_text
from brim.machine.interface import Reading, conditions_of
from brim.machine.linux import parse_kib_lines

WINDOW_S = 0.25
"""Between the two readings of counters: the kernel counts in ticks of 10 ms, so that two
processors give 50 of them, a resolution of 2 %."""

QUIET_PROFILES = frozenset({"low-power", "quiet"})
"""Platform profiles that desktops offer as 'power saver'."""


class Activity(NamedTuple):
    """Counters since boot, in ticks; two of them make a rate."""

    total: int
    busy: int
    own: int
    num_throttled: int | None
    """Times that a processor was throttled; None where it does not count them."""


def read_linux_conditions(
    root: Path = Path("/"),
    *,
    own_pids: Sequence[int] = (),
    window_s: float = WINDOW_S,
    sleep: Callable[[float], None] = time.sleep,
) -> Conditions:
    """What the machine feels now.

    Args:
        root: Where /proc and /sys lie.
        own_pids: Processes whose load is ours, not others'.
        window_s: How long the processors are watched.
        sleep: Waits that long.
    """
    before = _activity(root, own_pids)
    sleep(window_s)
    after = _activity(root, own_pids)
    zones = list(thermal_zones(root))
    return conditions_of(
        {
            "pressure": Reading(None, "Linux has no levels of pressure; see stalled_percent"),
            "compressor_ratio": Reading(None, "Linux has no such compressor"),
            "stalled_percent": stalled_percent(root),
            **_swap(root),
            "thermal": _thermal(zones),
            "hottest_celsius": _hottest(zones),
            "is_throttled": _is_throttled(root, zones, before, after),
            "is_low_power": _is_low_power(root),
            **_power(root),
            "busy_fraction": busy_fraction(before, after, window_s),
        }
    )


def stalled_percent(root: Path = Path("/")) -> Reading:
    """Share of the last 10 s in which a task waited for memory: ours, or any of the machine's.

    A group of ours may stall at its limit while the machine has room, so the largest counts.
    """
    paths = [root / "proc/pressure/memory"]
    for hierarchy in hierarchies("memory", root):
        if hierarchy.version == 2:
            paths += [directory / "memory.pressure" for directory in hierarchy.directories]
    found = []
    for path in paths:
        match = re.search(r"^some avg10=(\d+(?:\.\d+)?) ", read_text(path), re.M)
        if match:
            found.append(Reading(float(match[1]), f"{path}: some avg10"))
    none = Reading(None, "no /proc/pressure/memory: this kernel does not measure stalls")
    return max(found, key=lambda reading: float(reading.value), default=none)


def _swap(root: Path) -> dict[str, Reading]:
    meminfo = parse_kib_lines(read_text(root / "proc/meminfo"))
    used: int | None = None
    if "SwapTotal" in meminfo and "SwapFree" in meminfo:
        # A container may be told its own total and the machine's free bytes.
        used = max(0, meminfo["SwapTotal"] - meminfo["SwapFree"])
    words = [line.split() for line in read_text(root / "proc/vmstat").splitlines()]
    pages = {pair[0]: int(pair[1]) for pair in words if len(pair) == 2 and pair[1].isdigit()}
    page_bytes = resource.getpagesize()

    def bytes_of(counter: str) -> Reading:
        if counter not in pages:
            return Reading(None, f"/proc/vmstat has no {counter}")
        return Reading(pages[counter] * page_bytes, f"/proc/vmstat: {counter}, since boot")

    return {
        "swap_used_bytes": Reading(used, "/proc/meminfo: SwapTotal - SwapFree"),
        "swapped_out_bytes": bytes_of("pswpout"),
        "swapped_in_bytes": bytes_of("pswpin"),
    }


class Zone(NamedTuple):
    """One thermal zone."""

    source: str
    celsius: float
    trips: dict[str, float]
    """Kind ('passive', 'hot', 'critical') -> the lowest temperature of it."""


def thermal_zones(root: Path = Path("/")) -> Iterator[Zone]:
    """Every zone that gives a temperature."""
    for directory in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        celsius = _celsius(directory / "temp")
        if celsius is None:
            continue
        trips: dict[str, float] = {}
        for path in directory.glob("trip_point_*_type"):
            kind = read_text(path).strip()
            limit = _celsius(path.with_name(path.name.replace("_type", "_temp")))
            if limit is not None:
                trips[kind] = min(limit, trips.get(kind, limit))
        kind = read_text(directory / "type").strip()
        yield Zone(f"{directory} ({kind})" if kind else str(directory), celsius, trips)


def _celsius(path: Path) -> float | None:
    """A temperature in the kernel's thousandths; zero and less is a sensor or trip switched off."""
    text = read_text(path).strip()
    return int(text) / 1000 if text.isdigit() and int(text) > 0 else None


def _hottest(zones: Sequence[Zone]) -> Reading:
    if not zones:
        return Reading(None, "no thermal zone under /sys/class/thermal")
    zone = max(zones, key=lambda zone: zone.celsius)
    return Reading(zone.celsius, zone.source)


def _thermal(zones: Sequence[Zone]) -> Reading:
    """Which trip points are passed, in macOS's words: the kernel slows down from 'passive' on."""
    levels = {
        "passive": ThermalState.HEAVY, "hot": ThermalState.TRAPPING,
        "critical": ThermalState.SLEEPING,
    }  # fmt: skip
    for kind in ("critical", "hot", "passive"):
        for zone in zones:
            if kind in zone.trips and zone.celsius >= zone.trips[kind]:
                return Reading(levels[kind], f"{zone.source}: past its {kind} trip point")
    if any(kind in zone.trips for zone in zones for kind in levels):
        return Reading(ThermalState.NOMINAL, "/sys/class/thermal: below every trip point")
    return Reading(None, "no thermal zone with a trip point under /sys/class/thermal")


def _is_throttled(root: Path, zones: Sequence[Zone], before: Activity, after: Activity) -> Reading:
    """Slowed down by heat in the window, by a trip point that is passed, or by a lower limit."""
    for zone in zones:
        if "passive" in zone.trips and zone.celsius >= zone.trips["passive"]:
            return Reading(True, f"{zone.source}: past its passive trip point")
    if before.num_throttled is not None and after.num_throttled is not None:
        if after.num_throttled > before.num_throttled:
            return Reading(True, "cpu*/thermal_throttle counts more throttling now")
    held = list(_held_frequencies(root))
    for path, is_held in held:
        if is_held:
            return Reading(True, f"{path} is below cpuinfo_max_freq")
    if after.num_throttled is not None or held or any("passive" in z.trips for z in zones):
        return Reading(False, "no trip point passed, no throttle count rising, no lower limit")
    return Reading(None, "no throttle counts, passive trip points or cpufreq on this machine")


def _held_frequencies(root: Path) -> Iterator[tuple[Path, bool]]:
    for directory in sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq")):
        limit = read_text(directory / "scaling_max_freq").strip()
        most = read_text(directory / "cpuinfo_max_freq").strip()
        if limit.isdigit() and most.isdigit():
            yield directory / "scaling_max_freq", int(limit) < int(most)


def _is_low_power(root: Path) -> Reading:
    paths = [
        root / "sys/firmware/acpi/platform_profile",
        *sorted((root / "sys/class/platform-profile").glob("*/profile")),
    ]
    for path in paths:
        if profile := read_text(path).strip():
            return Reading(profile in QUIET_PROFILES, f"{path}: {profile}")
    return Reading(None, "no platform profile on this machine")


class Supply(NamedTuple):
    """One entry of /sys/class/power_supply."""

    kind: str
    is_online: bool
    status: str
    percent: int | None


def _power(root: Path) -> dict[str, Reading]:
    supplies = list(_supplies(root))
    batteries = [supply for supply in supplies if supply.kind == "Battery"]
    mains = [supply for supply in supplies if supply.kind != "Battery"]
    where = "/sys/class/power_supply"
    if mains:
        on_battery = Reading(
            bool(batteries) and not any(supply.is_online for supply in mains), f"{where}: online"
        )
    elif batteries:
        discharging = any(supply.status == "Discharging" for supply in batteries)
        on_battery = Reading(discharging, f"{where}: status")
    else:
        on_battery = Reading(None, f"nothing under {where}")
    percents = [supply.percent for supply in batteries if supply.percent is not None]
    if percents:
        percent = Reading(round(sum(percents) / len(percents)), f"{where}: capacity")
    else:
        percent = Reading(None, f"no battery under {where}")
    return {"is_on_battery": on_battery, "battery_percent": percent}


def _supplies(root: Path) -> Iterator[Supply]:
    """What feeds the machine; batteries of mice and headsets have the scope 'Device'."""
    for directory in sorted((root / "sys/class/power_supply").glob("*")):
        kind = read_text(directory / "type").strip()
        if not kind or read_text(directory / "scope").strip() == "Device":
            continue
        capacity = read_text(directory / "capacity").strip()
        yield Supply(
            kind,
            read_text(directory / "online").strip() == "1",
            read_text(directory / "status").strip(),
            int(capacity) if capacity.isdigit() else None,
        )


def busy_fraction(before: Activity, after: Activity, window_s: float) -> Reading:
    """Share of all processors that others kept busy between two readings.

    Example:
        >>> busy_fraction(Activity(0, 0, 0, None), Activity(100, 75, 50, None), 0.5).value
        0.25
    """
    total = after.total - before.total
    if total <= 0:
        return Reading(None, "/proc/stat does not count")
    others = (after.busy - before.busy) - (after.own - before.own)
    source = f"/proc/stat over {window_s:g} s, without our own processes"
    return Reading(min(1.0, max(0.0, others / total)), source)


def _activity(root: Path, own_pids: Sequence[int]) -> Activity:
    words = read_text(root / "proc/stat").partition("\n")[0].split()
    # user nice system idle iowait irq softirq steal; what guests take is part of user.
    ticks = [int(word) for word in words[1:9] if word.isdigit()]
    idle = sum(ticks[3:5])
    own = sum(_own_ticks(root / f"proc/{pid}/stat") for pid in own_pids)
    counts = [
        int(text)
        for path in (root / "sys/devices/system/cpu").glob(
            "cpu[0-9]*/thermal_throttle/*_throttle_count"
        )
        if (text := read_text(path).strip()).isdigit()
    ]
    return Activity(sum(ticks), sum(ticks) - idle, own, sum(counts) if counts else None)


def _own_ticks(path: Path) -> int:
    """Fields 14 and 15, utime and stime; the name before may hold spaces and brackets."""
    fields = read_text(path).rpartition(")")[2].split()
    return sum(int(field) for field in fields[11:13])
