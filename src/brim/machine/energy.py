"""Joules that the chip has used, where the machine counts them, and the watts that follow.

Linux: RAPL by powercap (https://docs.kernel.org/power/powercap/powercap.html), which root alone may
read since 5.10.  macOS: the package zeus-apple-silicon, if it is installed; what it gives are
Apple's model estimates.  A counter that stands still is no counter: it gives None and never 0.
"""

import importlib
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from brim.machine.cgroup import read_text

WINDOW_S = 5.0
"""Shortest time that watts are taken over: macOS publishes its counters every two seconds, so that
watts over one second alternate between nothing and double."""

STALL_S = 15.0
"""A counter that has not moved for so long is dead: no chip uses nothing."""

PACKAGE, MODULE = "zeus-apple-silicon", "zeus_apple_silicon"

MILLIJOULE_FIELDS = {
    "cpu": "cpu_total_mj", "gpu": "gpu_mj", "gpu sram": "gpu_sram_mj", "ane": "ane_mj",
    "dram": "dram_mj",
}  # fmt: skip
"""Parts of the chip in zeus's metrics; the others are parts of these."""


class Counters(Protocol):
    """Where energy is counted, part by part."""

    @property
    def source(self) -> str:
        """What counts, or why nothing does."""
        ...

    def read_uj(self) -> Mapping[str, int]:
        """Microjoules of each part; parts that do not count are left out."""
        ...

    def wrap_uj(self, part: str) -> int:
        """At which a part begins anew; 0 where it never does."""
        ...


class NoCounters(NamedTuple):
    """A machine that does not say what it uses, and why."""

    source: str

    def read_uj(self) -> Mapping[str, int]:
        """Nothing."""
        return {}

    def wrap_uj(self, part: str) -> int:
        """Nothing wraps."""
        del part
        return 0


class Powercap:
    """The packages of an x86 processor.

    Args:
        root: Where /sys lies.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        # Subzones ('core', 'dram') are parts of their package, and 'psys' is the whole machine with
        # its packages: either would be counted twice.
        self._zones = {
            zone.name: zone
            for zone in sorted((root / "sys/class/powercap").glob("intel-rapl:*"))
            if read_text(zone / "name").startswith("package")
        }
        self._wraps = {name: _number(zone / "max_energy_range_uj") or 0
                       for name, zone in self._zones.items()}  # fmt: skip
        self.source = "powercap" if self._zones else "no package under /sys/class/powercap"

    @property
    def num_packages(self) -> int:
        """Packages that are there, readable or not."""
        return len(self._zones)

    def read_uj(self) -> dict[str, int]:
        """What each package has used since it last began anew."""
        found = {name: _number(zone / "energy_uj") for name, zone in self._zones.items()}
        return {name: number for name, number in found.items() if number is not None}

    def wrap_uj(self, part: str) -> int:
        """A package wraps after 65 to 262 kJ, at 50 W within the hour."""
        return self._wraps[part]


class AppleCounters:
    """The parts of an Apple chip, from zeus's monitor.

    Args:
        monitor: An `AppleEnergyMonitor`, or one like it.
    """

    source = PACKAGE

    def __init__(self, monitor: Any) -> None:
        self._monitor = monitor

    def read_uj(self) -> dict[str, int]:
        """Parts that have counted anything; on macOS 27 some of them stay at 0."""
        try:
            metrics = self._monitor.get_cumulative_energy()
        except RuntimeError:
            return {}
        found = {part: getattr(metrics, name, None) for part, name in MILLIJOULE_FIELDS.items()}
        return {part: 1000 * int(number) for part, number in found.items() if number}

    def wrap_uj(self, part: str) -> int:
        """Counts of 64 bits do not wrap."""
        del part
        return 0


def counters_at_hand(root: Path = Path("/")) -> Counters:
    """What counts energy on this machine."""
    return _apple_counters() if sys.platform == "darwin" else linux_counters(root)


def linux_counters(root: Path = Path("/")) -> Counters:
    """Powercap's packages, if they may be read."""
    counters = Powercap(root)
    if counters.num_packages and not counters.read_uj():
        return NoCounters("/sys/class/powercap: only root may read energy_uj")
    return counters


def _apple_counters() -> Counters:
    try:
        return AppleCounters(importlib.import_module(MODULE).AppleEnergyMonitor())
    except ImportError:
        return NoCounters(f"{PACKAGE} is not installed; run: pip install 'brim[energy]'")
    except Exception as exc:  # whatever the system refuses, energy is a figure that may be missing
        return NoCounters(f"{PACKAGE} gives no counters ({exc})")


class EnergyMeter:
    """Adds up what the counters say.  For any thread; ask at least every few minutes.

    Args:
        counters: Where energy is counted; of the machine at hand unless given.
        clock: Of seconds.
    """

    def __init__(
        self, counters: Counters | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._counters = counters_at_hand() if counters is None else counters
        self._clock = clock
        self._lock = threading.RLock()
        self._before: dict[str, int] = {}
        self._total_uj = 0
        self._moved_s: float | None = None
        self._parts: set[str] = set()
        self._window: tuple[float, float] | None = None
        self._watts: float | None = None

    @property
    def source(self) -> str:
        """What counts, with the parts that have moved, or why nothing does."""
        parts = f" ({', '.join(sorted(self._parts))})" if self._parts else ""
        return f"{self._counters.source}{parts}"

    def read_j(self) -> float | None:
        """Joules since the first reading; None while no counter moves, since all may be dead."""
        with self._lock:
            now_s = self._clock()
            for part, number in self._counters.read_uj().items():
                if used := self._used_uj(part, number):
                    self._total_uj += used
                    self._moved_s = now_s
                    self._parts.add(part)
            is_alive = self._moved_s is not None and now_s - self._moved_s < STALL_S
            return self._total_uj / 1e6 if is_alive else None

    def _used_uj(self, part: str, number: int) -> int:
        """What a part has used since it was read before."""
        used = number - self._before.get(part, number)
        self._before[part] = number
        if used >= 0:
            return used
        # One that begins anew without a known range has been reset: its rest is lost.
        wrap_uj = self._counters.wrap_uj(part)
        return used + wrap_uj if wrap_uj else 0

    def read_watts(self) -> float | None:
        """Mean over the last window of at least `WINDOW_S`; None before the first one has passed.

        Call it every second or so.  None as well where nothing counts.
        """
        with self._lock:
            joules, now_s = self.read_j(), self._clock()
            if joules is None:
                self._window = self._watts = None
                return None
            if self._window is None:
                self._window = now_s, joules
            begun_s, before_j = self._window
            if now_s - begun_s >= WINDOW_S:
                self._watts = (joules - before_j) / (now_s - begun_s)
                self._window = now_s, joules
            return self._watts


def _number(path: Path) -> int | None:
    text = read_text(path).strip()
    return int(text) if text.isdigit() else None
