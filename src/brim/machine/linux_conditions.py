"""What a Linux machine feels: heat, power, the load of others, and what `linux_pressure` reads.

Every function takes the root of the file tree, so that recorded trees can be read.  Virtual
machines and containers lack most of sysfs, so every figure may be missing.
Source: https://docs.kernel.org/driver-api/thermal/sysfs-api.html, ABI/testing/sysfs-class-power
and sysfs-platform_profile.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from brim.core.machine import Conditions, ThermalState
from brim.machine.cgroup import read_text
from brim.machine.interface import Reading, conditions_of
from brim.machine.linux_pressure import memory_readings
from brim.machine.linux_refaults import MajorFaults

WINDOW_S = 0.25
"""Between the two readings of counters: the kernel counts in ticks of 10 ms, so that two
processors give 50 of them, a resolution of 2 %."""

PIDS_PERIOD_S = 5.0
"""Between two searches for our own processes: one walks all of /proc (2.8 ms where 92 processes
run, more than everything else that is read), and workers live for minutes."""

QUIET_PROFILES = frozenset({"low-power", "quiet"})
"""Platform profiles that desktops offer as 'power saver'."""


class Activity(NamedTuple):
    """Counters since boot, in ticks; two of them make a rate."""

    total: int
    busy: int
    own: int


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
    before, num_before = _activity(root, own_pids), num_throttled(root)
    sleep(window_s)
    after = _activity(root, own_pids)
    return conditions_of(
        {
            **_signals(root, num_before, num_throttled(root), {}),
            "major_faults": MajorFaults(root).read(own_pids),
            "busy_fraction": busy_fraction(before, after, window_s),
        }
    )


class LinuxSignals:
    """What answers at once: everything but the load of others, which takes a wait.

    Args:
        root: Where /proc and /sys lie.
        own_pids: Processes whose waits for the disk are ours.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        root: Path = Path("/"),
        *,
        own_pids: Callable[[], Sequence[int]] = tuple,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._root = root
        self._own_pids = own_pids
        self._clock = clock
        self._pids: Sequence[int] = ()
        self._pids_due_s = -math.inf
        self._major_faults = MajorFaults(root)
        self._num_throttled: int | None = None
        # Read once: a laptop has a hundred of them, more than half of all files.
        self._trips: Trips = {}

    def read(self) -> Conditions:
        """What the machine feels now; throttling since the last call counts."""
        before, self._num_throttled = self._num_throttled, num_throttled(self._root)
        busy = Reading(None, "not watched: that takes a quarter of a second")
        signals = _signals(self._root, before, self._num_throttled, self._trips)
        faults = self._major_faults.read(self._current_pids())
        return conditions_of({**signals, "major_faults": faults, "busy_fraction": busy})

    def _current_pids(self) -> Sequence[int]:
        now_s = self._clock()
        if now_s >= self._pids_due_s:
            self._pids, self._pids_due_s = self._own_pids(), now_s + PIDS_PERIOD_S
        return self._pids


Trips = dict[Path, dict[str, float]]
"""A thermal zone's directory -> kind ('passive', 'hot', 'critical') -> its lowest temperature."""


def _signals(
    root: Path, num_before: int | None, num_now: int | None, trips: Trips
) -> dict[str, Reading]:
    zones = list(thermal_zones(root, trips))
    return {
        "pressure": Reading(None, "Linux has no levels of pressure; see stalled_percent"),
        "compressor_ratio": Reading(None, "Linux has no such compressor"),
        **memory_readings(root),
        "thermal": _thermal(zones),
        "hottest_celsius": _hottest(zones),
        "is_throttled": _is_throttled(root, zones, num_before, num_now),
        "is_low_power": _is_low_power(root),
        **_power(root),
    }


class Zone(NamedTuple):
    """One thermal zone."""

    source: str
    celsius: float
    trips: dict[str, float]
    """Kind ('passive', 'hot', 'critical') -> the lowest temperature of it."""


def thermal_zones(root: Path, known: Trips) -> Iterator[Zone]:
    """Every zone that gives a temperature.

    Args:
        root: Where /sys lies.
        known: Trip points by zone; those that are missing are read and put in.
    """
    for directory in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        celsius = _celsius(directory / "temp")
        if celsius is None:
            continue
        if directory not in known:
            known[directory] = _trips(directory)
        kind = read_text(directory / "type").strip()
        source = f"{directory} ({kind})" if kind else str(directory)
        yield Zone(source, celsius, known[directory])


def _trips(directory: Path) -> dict[str, float]:
    trips: dict[str, float] = {}
    for path in directory.glob("trip_point_*_type"):
        kind = read_text(path).strip()
        limit = _celsius(path.with_name(path.name.replace("_type", "_temp")))
        if limit is not None:
            trips[kind] = min(limit, trips.get(kind, limit))
    return trips


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


def _is_throttled(
    root: Path, zones: Sequence[Zone], num_before: int | None, num_now: int | None
) -> Reading:
    """Slowed down since the count before, by a trip point that is passed, or by a lower limit."""
    for zone in zones:
        if "passive" in zone.trips and zone.celsius >= zone.trips["passive"]:
            return Reading(True, f"{zone.source}: past its passive trip point")
    if num_before is not None and num_now is not None and num_now > num_before:
        return Reading(True, "cpu*/thermal_throttle counts more throttling now")
    held = list(_held_frequencies(root))
    for path, is_held in held:
        if is_held:
            return Reading(True, f"{path} is below cpuinfo_max_freq")
    if num_now is not None or held or any("passive" in z.trips for z in zones):
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
        >>> busy_fraction(Activity(0, 0, 0), Activity(100, 75, 50), 0.5).value
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
    return Activity(sum(ticks), sum(ticks) - idle, own)


def num_throttled(root: Path = Path("/")) -> int | None:
    """Times since boot that a processor was throttled; None where it does not count them."""
    counts = [
        int(text)
        for path in (root / "sys/devices/system/cpu").glob(
            "cpu[0-9]*/thermal_throttle/*_throttle_count"
        )
        if (text := read_text(path).strip()).isdigit()
    ]
    return sum(counts) if counts else None


def _own_ticks(path: Path) -> int:
    """Fields 14 and 15, utime and stime; the name before may hold spaces and brackets."""
    fields = read_text(path).rpartition(")")[2].split()
    return sum(int(field) for field in fields[11:13])
