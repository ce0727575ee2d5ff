"""From readings to a level of memory and a power mode, with the reading that decided in words.

Every figure has two thresholds, the one that enters a level and a lower one that leaves it, and a
level falls only after nothing was seen at it for a while (`hold.Hold`).  A figure that the machine
does not give (None) counts as nothing: it neither raises a level nor lets one fall.  Pure.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

from brim.config.tree import GovernorSettings
from brim.core.machine import Conditions, Pressure, ThermalState
from brim.core.stance import PowerMode
from brim.governor.hold import Hold, Seen
from brim.governor.readings import Readings

PRESSURES = (Pressure.NORMAL, Pressure.WARNING, Pressure.CRITICAL)
POWER_MODES = (PowerMode.FULL, PowerMode.BATTERY, PowerMode.SAVING, PowerMode.HOT)
THERMAL_STATES = tuple(ThermalState)

L = TypeVar("L")

MEMORY_HOLD_S = 10.0
"""macOS smooths falling levels over 5 s and Linux's stall average decays over 10 s, so that a
shorter hold would follow one relief and its echo."""

POWER_HOLD_S = 30.0
"""A fanless machine takes 30 to 90 s to heat up under load: a mode that fell sooner than that would
turn heating and cooling into a saw."""


class Threshold(NamedTuple):
    """Where a figure enters a level, and where it leaves it."""

    enter: float
    leave: float


COMPRESSOR_RATIO = {
    Pressure.WARNING: Threshold(0.8, 0.6),
    Pressure.CRITICAL: Threshold(1.5, 1.3),
}
"""macOS: compressed pages over those that are not.  The kernel itself warns above 1.0 and takes
that back below 0.667.  0.8 is before it, by 6 % of the pool (0.7 GB on a 16 GB machine, about what
a page or a prompt takes in the second until the next look), and well above 0.667, so that a machine
the kernel has just called well is not warned of again.  0.6 is below 0.667, so that ours never ends
before the system's.  Above 1.5 the compressor begins to write to disk, and swapping is critical.
Source: xnu osfmk/vm/vm_compressor.c and vm_pageout.c, VM_PRESSURE_*."""

STALLED_PERCENT = {
    Pressure.WARNING: Threshold(10.0, 5.0),
    Pressure.CRITICAL: Threshold(40.0, 20.0),
}
"""Linux: of the last 10 s, in which some task waited for memory.  10 % is one second lost in ten,
which a person notices; system killers of programs act at 60 to 70 % and must not be met."""

AVAILABLE_FRACTION = {
    Pressure.WARNING: Threshold(0.03, 0.045),
    Pressure.CRITICAL: Threshold(0.015, 0.025),
}
AVAILABLE_BYTES = {
    Pressure.WARNING: Threshold(256_000_000, 384_000_000),
    Pressure.CRITICAL: Threshold(128_000_000, 192_000_000),
}
"""Available memory below which a level is entered: of all memory, or in bytes where that is more.
The ledger leaves 5 % and a gigabyte free at least, so that a full but orderly machine stays clear
of these.  3 % of 16 GB are half a second of a program that takes what it can; in a small control
group the bytes count, because what a model touches for one step (100 MB) is no smaller there."""

AMPLE_FRACTION = 0.25
"""With so much of all memory available, a task that stalls or swaps has a limit of its own, such as
a container that is full: whatever we gave back, it would not get."""

SWAP_BYTES_PER_S = 4 * 1024**2
"""A thousand pages a second.  An idle desktop moves a few; a storm moves ten times as many."""

SWAP_WINDOW_S = 5.0
SWAP_MIN_LOOKS = 3
SWAP_MIN_SPAN_S = 2.0
"""Three looks over two seconds in the last five: one burst, such as a laptop's lid, is none."""

REREAD_BYTES_PER_S = {
    Pressure.WARNING: Threshold(30e6, 15e6),
    Pressure.CRITICAL: Threshold(120e6, 60e6),
}
"""Linux: files that memory had dropped and that are read again, while our own processes wait for
the disk.  From a disk of 300 MB/s, the slowest that `brim doctor` takes for models without a word,
these cost a tenth and four tenths of the time, as STALLED_PERCENT.  Where exactly they lie matters
little: a model of 0.80 GB of weights in a group of 1.07 GB read nothing again and decoded 15 tok/s,
in one of 1.01 GB it read 700 to 1,500 MB/s again and decoded 1.5, while tasks stalled for 27 % of
the time at most.  Its loads read 37 MB/s again at most, for half a second."""

REREAD_MIN_SPAN_S = 2.0
"""Before it counts, as for swap: a prompt's KV that comes back from disk takes less."""

THROTTLED_AFTER_S = 10.0
"""Processors are held for moments under any load; for ten seconds on end it is heat."""


AT_REST = Hold(order=PRESSURES, hold_s=MEMORY_HOLD_S, level=Pressure.NORMAL)
AT_FULL_POWER = Hold(order=POWER_MODES, hold_s=POWER_HOLD_S, level=PowerMode.FULL)


COOL_CELSIUS = 70.0
"""Processors throttle at 95 to 105 °C; below this a lower limit is one that somebody has set."""


class SwapLook(NamedTuple):
    """Whether one look saw more than a little going in and out of swap."""

    at_s: float
    moves_in: bool
    moves_out: bool


class Reread(NamedTuple):
    """Looks in a row that saw our weights, or other files that we map, being read again."""

    since_s: float
    last_s: float
    num_bytes: float = 0.0


@dataclass(frozen=True, slots=True)
class Levels:
    """Where the machine stands, by all looks until now."""

    memory: Hold[Pressure] = AT_REST
    power: Hold[PowerMode] = AT_FULL_POWER
    swap_looks: tuple[SwapLook, ...] = ()
    reread: Reread | None = None
    throttled_since_s: float | None = None

    def after(self, readings: Readings, settings: GovernorSettings) -> "Levels":
        """The levels after one more look."""
        at_s = readings.at_s
        swap_looks = _swap_looks(self.swap_looks, readings)
        throttled_since_s = self.throttled_since_s
        is_throttled = _is_throttled(readings.conditions)
        if is_throttled is not None:
            throttled_since_s = throttled_since_s if throttled_since_s is not None else at_s
            if not is_throttled:
                throttled_since_s = None
        noted = replace(
            self,
            swap_looks=swap_looks,
            reread=_reread(self.reread, readings),
            throttled_since_s=throttled_since_s,
        )
        return replace(
            noted,
            memory=self.memory.after(_highest(noted._memory(readings), PRESSURES), at_s),
            power=self.power.after(_highest(noted._power(readings, settings), POWER_MODES), at_s),
        )

    def _memory(self, readings: Readings) -> Iterator[Seen[Pressure]]:
        """What each figure of memory says by itself, given where we stand."""
        conditions, held = readings.conditions, self.memory.level
        if conditions.pressure is not None:
            yield Seen(conditions.pressure, f"the system reports {conditions.pressure} pressure")
        ratio = conditions.compressor_ratio
        if ratio is not None:
            yield Seen(
                _level(ratio, COMPRESSOR_RATIO, held),
                f"the compressor holds {ratio:.2f} times what is not compressed",
            )
        stalled, is_ample = conditions.stalled_percent, _is_ample(readings)
        if stalled is not None:
            yield Seen(
                Pressure.NORMAL if is_ample else _level(stalled, STALLED_PERCENT, held),
                f"tasks waited for memory in {stalled:.0f} % of the last 10 s",
            )
        available = conditions.available_bytes
        # macOS keeps little available on purpose: what it can compress is its reserve.
        if available is not None and readings.ram_bytes and ratio is None:
            yield Seen(
                _level(-available, _available_thresholds(readings.ram_bytes), held),
                f"{available / 1e9:.2f} GB of memory are left",
            )
        swaps = self._swaps()
        if swaps is not None:
            yield replace(swaps, level=Pressure.NORMAL) if is_ample else swaps
        rereads = self._rereads(readings)
        if rereads is not None:
            yield replace(rereads, level=Pressure.NORMAL) if is_ample else rereads

    def _swaps(self) -> Seen[Pressure] | None:
        """Swapping both ways is thrashing; out alone makes room, in alone is how relief looks."""
        if not self.swap_looks:
            return None
        goes_out = _is_sustained([look.at_s for look in self.swap_looks if look.moves_out])
        comes_in = _is_sustained([look.at_s for look in self.swap_looks if look.moves_in])
        if goes_out and comes_in:
            return Seen(Pressure.CRITICAL, "the system swaps, in and out")
        if goes_out:
            return Seen(Pressure.WARNING, "the system moves memory out to swap")
        return Seen(Pressure.NORMAL, "nothing is swapped out")

    def _rereads(self, readings: Readings) -> Seen[Pressure] | None:
        """Weights that are read again and again are thrashing, without any swap.

        Critical only when more was read again than our models have in memory: those that come back
        to a model which wakes up are read once.
        """
        rate = readings.refaulted_bytes_per_s
        if rate is None or readings.major_faults_per_s is None or _is_loading(readings):
            return None
        reread, level = self.reread, Pressure.NORMAL
        if reread is not None and reread.last_s - reread.since_s >= REREAD_MIN_SPAN_S:
            level = _level(rate, REREAD_BYTES_PER_S, self.memory.level)
            held = sum(model.resident_bytes or 0 for model in readings.models)
            if level is Pressure.CRITICAL and reread.num_bytes <= held:
                level = Pressure.WARNING
        return Seen(level, f"weights are read from disk again, {rate / 1e6:.0f} MB a second")

    def _power(self, readings: Readings, settings: GovernorSettings) -> Iterator[Seen[PowerMode]]:
        """What each figure of heat and power says by itself, given where we stand."""
        conditions, held = readings.conditions, self.power.level
        if conditions.thermal is not None:
            yield Seen(
                _heat(conditions.thermal, held), f"the machine's heat is {conditions.thermal}"
            )
        if _is_throttled(conditions) is not None:
            since_s = self.throttled_since_s
            is_held = since_s is not None and readings.at_s - since_s >= THROTTLED_AFTER_S
            mode = PowerMode.SAVING if is_held else PowerMode.FULL
            yield Seen(mode, "the processors have been throttled for a while")
        if conditions.is_low_power is not None:
            mode = PowerMode.SAVING if conditions.is_low_power else PowerMode.FULL
            yield Seen(mode, "low power mode is on")
        if conditions.is_on_battery is not None:
            yield _battery(conditions, settings)


def _is_ample(readings: Readings) -> bool:
    available, ram_bytes = readings.conditions.available_bytes, readings.ram_bytes
    return (
        available is not None
        and ram_bytes is not None
        and (available >= AMPLE_FRACTION * ram_bytes)
    )


def _is_throttled(conditions: Conditions) -> bool | None:
    """Whether heat holds the processors; None where the machine does not say."""
    celsius = conditions.hottest_celsius
    is_cool = celsius is not None and celsius < COOL_CELSIUS
    return False if conditions.is_throttled and is_cool else conditions.is_throttled


def _battery(conditions: Conditions, settings: GovernorSettings) -> Seen[PowerMode]:
    if not conditions.is_on_battery:
        return Seen(PowerMode.FULL, "power is plugged in")
    percent = conditions.battery_percent
    if percent is not None and percent <= settings.low_battery_percent:
        return Seen(PowerMode.SAVING, f"the battery is at {percent} %")
    return Seen(PowerMode.BATTERY, "the machine runs on battery")


def _heat(thermal: ThermalState, held: PowerMode) -> PowerMode:
    """Heavy is where a fanless machine stays under load, so it slows down and does not stop.

    One state lower does not undo a mode: moderate heat under slowed work says that work at full
    speed would be heavy again.
    """
    rank = THERMAL_STATES.index(thermal)
    if rank >= THERMAL_STATES.index(ThermalState.TRAPPING):
        return PowerMode.HOT
    if rank >= THERMAL_STATES.index(ThermalState.HEAVY):
        return PowerMode.HOT if held is PowerMode.HOT else PowerMode.SAVING
    if thermal is ThermalState.MODERATE and held in (PowerMode.SAVING, PowerMode.HOT):
        return PowerMode.SAVING
    return PowerMode.FULL


def _level(figure: float, thresholds: dict[Pressure, Threshold], held: Pressure) -> Pressure:
    """The level of a figure that is worse the larger it is, where `held` stands."""
    for level in (Pressure.CRITICAL, Pressure.WARNING):
        threshold = thresholds[level]
        stands = PRESSURES.index(held) >= PRESSURES.index(level)
        if figure >= threshold.enter or (stands and figure >= threshold.leave):
            return level
    return Pressure.NORMAL


def _available_thresholds(ram_bytes: int) -> dict[Pressure, Threshold]:
    """In bytes, and negative, since this figure is worse the smaller it is."""
    return {
        level: Threshold(
            -max(fraction.enter * ram_bytes, AVAILABLE_BYTES[level].enter),
            -max(fraction.leave * ram_bytes, AVAILABLE_BYTES[level].leave),
        )
        for level, fraction in AVAILABLE_FRACTION.items()
    }


def _swap_looks(looks: tuple[SwapLook, ...], readings: Readings) -> tuple[SwapLook, ...]:
    kept = tuple(look for look in looks if readings.at_s - look.at_s <= SWAP_WINDOW_S)
    moved_in, moved_out = readings.swapped_in_bytes_per_s, readings.swapped_out_bytes_per_s
    if moved_in is None and moved_out is None:
        return kept
    look = SwapLook(
        readings.at_s, (moved_in or 0.0) >= SWAP_BYTES_PER_S, (moved_out or 0.0) >= SWAP_BYTES_PER_S
    )
    return (*kept, look)


def _reread(before: Reread | None, readings: Readings) -> Reread | None:
    """The looks in a row until this one; None where it ends them.

    A load ends them: it reads files because it was asked to.  Without a wait of ours, others read.
    """
    rate, faults = readings.refaulted_bytes_per_s, readings.major_faults_per_s
    threshold = REREAD_BYTES_PER_S[Pressure.WARNING]
    least = threshold.enter if before is None else threshold.leave
    if rate is None or not faults or rate < least or _is_loading(readings):
        return None
    if before is None:
        return Reread(readings.at_s, readings.at_s)
    num_bytes = before.num_bytes + rate * (readings.at_s - before.last_s)
    return Reread(before.since_s, readings.at_s, num_bytes)


def _is_loading(readings: Readings) -> bool:
    return any(model.is_loading for model in readings.models)


def _is_sustained(times_s: list[float]) -> bool:
    return len(times_s) >= SWAP_MIN_LOOKS and times_s[-1] - times_s[0] >= SWAP_MIN_SPAN_S


def _highest(seen: Iterator[Seen[L]], order: tuple[L, ...]) -> Seen[L] | None:
    return max(seen, key=lambda each: order.index(each.level), default=None)
