"""Energy counters: recorded trees for Linux, a stand-in for the monitor on macOS."""

import sys
import types
from collections.abc import Mapping
from pathlib import Path

import pytest

from brim.machine import energy
from brim.machine.energy import AppleCounters, EnergyMeter, NoCounters, linux_counters

WRAP_UJ = 262_143_328_850


def zone(root: Path, name: str, kind: str, used_uj: int | None) -> None:
    directory = root / "sys/class/powercap" / name
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "name").write_text(f"{kind}\n")
    (directory / "max_energy_range_uj").write_text(f"{WRAP_UJ}\n")
    if used_uj is not None:
        (directory / "energy_uj").write_text(f"{used_uj}\n")


def laptop(root: Path, used_uj: int | None, *, second_uj: int | None = None) -> Path:
    """A processor whose cores, whole platform and second interface are counted as well."""
    zone(root, "intel-rapl:0", "package-0", used_uj)
    zone(root, "intel-rapl:0:0", "core", 10**9)
    zone(root, "intel-rapl:1", "psys", 10**9)
    zone(root, "intel-rapl-mmio:0", "package-0", used_uj)
    if second_uj is not None:
        zone(root, "intel-rapl:2", "package-1", second_uj)
    return root


class Counting:
    """Counters and a clock that a test moves on."""

    source = "test"

    def __init__(self, **used_uj: int) -> None:
        self.used_uj, self.now_s, self.range_uj = used_uj, 0.0, 0

    def read_uj(self) -> Mapping[str, int]:
        return dict(self.used_uj)

    def wrap_uj(self, part: str) -> int:
        del part
        return self.range_uj

    def clock(self) -> float:
        return self.now_s


def test_packages_alone_are_added_up(tmp_path: Path) -> None:
    """Parts of a package, the platform around it and a second interface would count twice."""
    meter = EnergyMeter(linux_counters(laptop(tmp_path, 1_000_000, second_uj=5_000_000)))
    assert meter.read_j() is None
    laptop(tmp_path, 3_500_000, second_uj=6_000_000)
    assert meter.read_j() == 3.5
    assert meter.source == "powercap (intel-rapl:0, intel-rapl:2)"


def test_a_package_that_wraps_goes_on(tmp_path: Path) -> None:
    """A count that begins anew lost nothing: its range is known."""
    meter = EnergyMeter(linux_counters(laptop(tmp_path, WRAP_UJ - 1_000_000)))
    meter.read_j()
    laptop(tmp_path, 2_000_000)
    assert meter.read_j() == 3.0


def test_a_count_without_a_range_that_falls_was_reset() -> None:
    """Nobody knows what a reset lost, so it adds nothing and nothing is taken off."""
    counters = Counting(cpu=5_000_000)
    meter = EnergyMeter(counters)
    meter.read_j()
    for used_uj in (6_000_000, 1_000_000, 3_000_000):
        counters.used_uj["cpu"] = used_uj
        joules = meter.read_j()
    assert joules == 3.0


def test_counts_for_root_alone_say_so(tmp_path: Path) -> None:
    """Packages that may not be read give None and the reason."""
    meter = EnergyMeter(linux_counters(laptop(tmp_path, None)))
    assert (meter.read_j(), meter.read_watts()) == (None, None)
    assert "only root" in meter.source


def test_a_machine_without_packages_says_so(tmp_path: Path) -> None:
    """A virtual machine counts no energy."""
    meter = EnergyMeter(linux_counters(tmp_path))
    assert meter.read_j() is None
    assert meter.source == "no package under /sys/class/powercap"


def test_a_counter_that_stands_still_is_none_and_not_zero() -> None:
    """Before it has moved, and once it has stopped for long, a counter says nothing."""
    counters = Counting(gpu=7)
    meter = EnergyMeter(counters, clock=counters.clock)
    seen = []
    for counters.now_s, used_uj in (
        (0, 7),
        (60, 7),
        (61, 2_000_007),
        (70, 2_000_007),
        (80, 2_000_007),
    ):
        counters.used_uj["gpu"] = used_uj
        seen.append(meter.read_j())
    assert seen == [None, None, 2.0, 2.0, None]


def test_watts_are_a_mean_over_five_seconds() -> None:
    """Counts come in lumps, so that watts over less would alternate between nothing and double."""
    counters = Counting(cpu=0)
    meter = EnergyMeter(counters, clock=counters.clock)
    seen = []
    for second in range(12):
        counters.now_s = second
        counters.used_uj["cpu"] = 20_000_000 * (second // 2)
        seen.append(meter.read_watts())
    # Nothing has moved before second 2; the first window ends at 7, the next would at 12.
    assert seen == [None] * 7 + [8.0] * 5


def test_watts_end_with_the_counts() -> None:
    """Watts of a counter that died are not repeated for ever."""
    counters = Counting(cpu=0)
    meter = EnergyMeter(counters, clock=counters.clock)
    for counters.now_s, counters.used_uj["cpu"] in ((0, 0), (1, 10**7), (6, 6 * 10**7)):
        watts = meter.read_watts()
    assert watts == 10.0
    counters.now_s = 30.0
    assert meter.read_watts() is None
    # Back again, it is watched for a whole window before it is believed.
    seen = []
    for counters.now_s, counters.used_uj["cpu"] in ((31, 10**9), (33, 10**9), (36, 11 * 10**8)):
        seen.append(meter.read_watts())
    assert seen == [None, None, 20.0]


class Metrics(types.SimpleNamespace):
    """AppleEnergyMetrics: millijoules or None."""


class Monitor:
    """AppleEnergyMonitor, which a test winds on."""

    def __init__(self, **millijoules: int | None) -> None:
        self.millijoules = millijoules
        self.fails = False

    def get_cumulative_energy(self) -> Metrics:
        if self.fails:
            raise RuntimeError("no sample")
        return Metrics(**self.millijoules)


def test_apple_parts_are_added_up() -> None:
    """Parts that a chip does not have are None, and those that a system froze stay 0."""
    monitor = Monitor(
        cpu_total_mj=0, gpu_mj=1000, gpu_sram_mj=None, ane_mj=0, dram_mj=500,
        performance_cluster_mj=77,
    )  # fmt: skip
    meter = EnergyMeter(AppleCounters(monitor))
    assert set(AppleCounters(monitor).read_uj()) == {"gpu", "dram"}
    assert meter.read_j() is None
    monitor.millijoules |= {"gpu_mj": 3000, "dram_mj": 1500, "performance_cluster_mj": 7777}
    assert meter.read_j() == 3.0
    assert meter.source == "zeus-apple-silicon (dram, gpu)"
    monitor.fails = True
    assert meter.read_j() == 3.0


def test_a_mac_without_the_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is optional: without it energy is None, and the reason is how to install it."""
    monkeypatch.setattr(sys, "platform", "darwin")
    counters = energy.counters_at_hand()
    assert isinstance(counters, NoCounters)
    assert counters.source.endswith("run: pip install 'brim[energy]'")


@pytest.mark.parametrize("works", [True, False])
def test_a_mac_with_the_package_uses_it(monkeypatch: pytest.MonkeyPatch, works: bool) -> None:
    """The package's monitor is asked; a chip that it refuses is a reason and no error."""

    def make() -> Monitor:
        if not works:
            raise RuntimeError("no channels")
        return Monitor(gpu_mj=5)

    module = types.ModuleType("zeus_apple_silicon")
    module.AppleEnergyMonitor = make  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "zeus_apple_silicon", module)
    monkeypatch.setattr(sys, "platform", "darwin")
    counters = energy.counters_at_hand()
    assert dict(counters.read_uj()) == ({"gpu": 5000} if works else {})
    assert ("no channels" in counters.source) is not works
