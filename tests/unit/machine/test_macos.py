"""A Mac as it would answer, from recorded outputs; the calls themselves need a Mac."""

import ctypes
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from brim.core.machine import Cooling, Pressure, ThermalState
from brim.errors import ConfigError
from brim.machine import macos_calls
from brim.machine.macos import IOREG, PMSET, PROFILER, VM_STAT, MacosMachine
from brim.machine.macos_calls import CpuTimes, NativeCalls
from brim.machine.macos_formats import (
    RUSAGE_FOOTPRINT,
    RUSAGE_RESIDENT,
    VM_STATISTICS,
    Battery,
    parse_vm_stat,
)

FIXTURES = Path(__file__).parent / "fixtures"
RECORDED_VM_STAT = (FIXTURES / "vm_stat_m5pro_48g_macos26.txt").read_text()
GIB = 1024**3


def u32(value: int) -> bytes:
    return value.to_bytes(4, "little")


class RecordedMac:
    """Answers as a MacBook Pro M5 Pro with 48 GB did, changed as a test asks.

    Args:
        sysctls: Output of the sysctl command, 'name: value' a line.
        commands: Outputs by the command's words, over those recorded; None for one that fails.
    """

    def __init__(
        self, sysctls: str = "", commands: dict[tuple[str, ...], str | None] | None = None
    ) -> None:
        self.sysctls: dict[str, bytes | None] = {
            "hw.memsize": (48 * GIB).to_bytes(8, "little"),
            "hw.pagesize": (16384).to_bytes(8, "little"),
            "machdep.cpu.brand_string": b"Apple M5 Pro\0",
            "kern.memorystatus_vm_pressure_level": u32(1),
            "vm.swapusage": b"".join(n.to_bytes(8, "little") for n in (2**31, 2**30, 2**30)),
        }
        for name, value in re.findall(r"^(\S+): (.+)$", sysctls, re.M):
            text = value.encode() + b"\0"
            self.sysctls[name] = u32(int(value)) if value.isdigit() else text
        self.commands: dict[tuple[str, ...], str | None] = {
            (VM_STAT,): RECORDED_VM_STAT,
            (PMSET, "-g"): " lowpowermode         0\n",
            (PMSET, "-g", "batt"): (FIXTURES / "pmset_batt_ac.txt").read_text(),
            IOREG: '"gpu-core-count" = 20',
            PROFILER: '{"SPHardwareDataType":[{"machine_name":"MacBook Pro"}]}',
            **(commands or {}),
        }
        self.statistics: bytes | None = None
        self.metal_bytes: int | None = 40200896512
        self.is_low_power: bool | None = True
        self.power: Battery | None = Battery(is_on_battery=True, percent=41)
        self.thermal_level: int | None = 1
        self.footprints: dict[int, int] = {}
        self.times = iter([CpuTimes(100.0, 50.0, 10.0), CpuTimes(104.0, 53.0, 12.0)])

    def sysctl(self, name: str) -> bytes | None:
        return self.sysctls.get(name)

    def vm_statistics(self) -> bytes | None:
        return self.statistics

    def rusage(self, pid: int) -> bytes | None:
        if pid not in self.footprints:
            return None
        words = [0] * 64
        words[RUSAGE_FOOTPRINT], words[RUSAGE_RESIDENT] = self.footprints[pid], 5
        return b"".join(word.to_bytes(8, "little") for word in words)

    def notify_state(self, key: str) -> int | None:
        return self.thermal_level if key == "com.apple.system.thermalpressurelevel" else None

    def low_power_mode(self) -> bool | None:
        return self.is_low_power

    def battery(self) -> Battery | None:
        return self.power

    def metal_working_set_bytes(self) -> int | None:
        return self.metal_bytes

    def command(self, *words: str) -> str | None:
        return self.commands.get(words)

    def fixed(self, *words: str) -> str | None:
        return self.commands.get(words)

    def cpu_times(self, own_pids: Sequence[int]) -> CpuTimes:
        return next(self.times)


def mac(calls: RecordedMac, own_pids: Sequence[int] = ()) -> MacosMachine:
    return MacosMachine(calls, own_pids=lambda: own_pids, sleep=lambda seconds: None)


def test_recorded_mac_is_described() -> None:
    """RAM and use come from the system, the maker's figures from the table by chip and cores."""
    spec = mac(RecordedMac()).read_machine()
    assert (spec.ram_bytes, spec.gpu_limit_bytes) == (48 * GIB, 40200896512)
    assert spec.others_bytes == parse_vm_stat(RECORDED_VM_STAT).used_bytes()
    assert (spec.chip, spec.gpu_cores, spec.memory_bandwidth) == ("M5 Pro", 20, 307 * 10**9)
    assert spec.cooling is Cooling.COMPACT
    assert spec.is_at_hand
    assert not spec.is_simulated
    assert set(spec.sources) == {
        "ram_bytes", "others_bytes", "gpu_limit_bytes", "performance_cores", "chip", "gpu_cores",
        "memory_bandwidth", "fp32_flops", "cooling",
    }  # fmt: skip


def test_own_footprint_is_not_others() -> None:
    """What our own processes are charged is taken off, and one that is gone takes off nothing."""
    calls = RecordedMac()
    before = mac(calls).read_machine().others_bytes
    calls.footprints[7] = 3 * GIB
    assert mac(calls, own_pids=[7, 8]).read_machine().others_bytes == before - 3 * GIB


def test_lower_bin_where_gpu_cores_are_not_known() -> None:
    """Without ioreg the lower bin that is sold with the memory is taken, and said to be assumed."""
    spec = mac(RecordedMac(commands={IOREG: None})).read_machine()
    assert spec.gpu_cores == 16
    assert "assumed" in spec.sources["gpu_cores"]


def test_chip_without_an_entry_has_no_figures() -> None:
    """A chip that the table lacks keeps what the system says; the rest is None with a reason."""
    spec = mac(RecordedMac("machdep.cpu.brand_string: Apple M9 Max")).read_machine()
    assert (spec.chip, spec.memory_bandwidth, spec.fp32_flops, spec.gpu_cores) == (
        None, None, None, 20,
    )  # fmt: skip
    assert "Apple M9 Max" in spec.sources["memory_bandwidth"]


def test_kernel_counters_come_before_vm_stat() -> None:
    """vm_stat is a fallback: it is not run where host_statistics64 answers."""
    calls = RecordedMac(commands={(VM_STAT,): None})
    calls.statistics = u32(0) * 3 + u32(1000) + bytes(152 - 16)
    spec = mac(calls).read_machine()
    assert spec.others_bytes == 1000 * 16384
    assert spec.sources["others_bytes"].startswith("host_statistics64")


@pytest.mark.parametrize(
    ("output", "words"), [(None, "cannot be asked"), ("Pages free: 3.\n", "does not say")]
)
def test_nobody_says_what_is_in_use(output: str | None, words: str) -> None:
    """Without counters nothing may be promised: the error says what to run, conditions go on."""
    calls = RecordedMac(commands={(VM_STAT,): output})
    with pytest.raises(ConfigError, match=f"{words}.*by hand"):
        mac(calls).read_machine()
    conditions = mac(calls).read_conditions()
    assert conditions.compressor_ratio is None
    assert words in conditions.sources["compressor_ratio"]
    assert conditions.swap_used_bytes == 2**30


@pytest.mark.parametrize(("file", "cores"), [("sysctl_m6.txt", 6), ("sysctl_m3max.txt", 12)])
def test_efficiency_level_is_left_out(file: str, cores: int) -> None:
    """The slowest level is left out by its index, with two levels as with three."""
    calls = RecordedMac((FIXTURES / file).read_text())
    assert mac(calls).read_machine().performance_cores == cores


@pytest.mark.parametrize(
    ("sysctls", "cores"),
    [
        (
            "hw.nperflevels: 2\nhw.perflevel0.name: Super\nhw.perflevel0.physicalcpu: 6\n"
            "hw.perflevel1.name: Performance\nhw.perflevel1.physicalcpu: 12\n",
            18,
        ),
        ("hw.physicalcpu: 8", 8),
        ("", 1),
    ],
)
def test_without_a_slow_level_all_cores_count(sysctls: str, cores: int) -> None:
    """Two fast levels both count, and a system without levels gives its cores, one at the least."""
    assert mac(RecordedMac(sysctls)).read_machine().performance_cores == cores


def test_gpu_limit_is_asked_and_never_computed() -> None:
    """Metal's figure comes first, then the operator's override, and without both it is unknown."""
    calls = RecordedMac("iogpu.wired_limit_mb: 26000")
    assert mac(calls).read_machine().gpu_limit_bytes == 40200896512
    calls.metal_bytes = None
    assert mac(calls).read_machine().gpu_limit_bytes == 26000 * 1024**2
    calls.sysctls["iogpu.wired_limit_mb"] = u32(0)
    spec = mac(calls).read_machine()
    assert spec.gpu_limit_bytes is None
    assert "not set" in spec.sources["gpu_limit_bytes"]


def test_recorded_conditions() -> None:
    """Pressure, swap, heat and power are read, and every figure has its source or its reason."""
    conditions = mac(RecordedMac()).read_conditions()
    assert conditions.pressure is Pressure.NORMAL
    assert conditions.compressor_ratio == pytest.approx(0.0959, abs=0.0001)
    assert (conditions.swap_used_bytes, conditions.swapped_out_bytes) == (2**30, 77484917 * 16384)
    assert conditions.thermal is ThermalState.MODERATE
    assert (conditions.is_low_power, conditions.is_on_battery) == (False, False)
    assert conditions.battery_percent == 100
    assert conditions.busy_fraction == 0.25
    names = {*type(conditions).__struct_fields__} - {"is_simulated", "sources"}
    assert set(conditions.sources) == names


def test_recorded_thermal_level_has_a_name() -> None:
    """The level that notifyutil printed is the one that the key's state gives."""
    level = int((FIXTURES / "notifyutil_thermal.txt").read_text().split()[-1])
    calls = RecordedMac()
    calls.thermal_level = level
    assert mac(calls).read_conditions().thermal is ThermalState.MODERATE


def test_silence_is_none_and_never_a_guess() -> None:
    """A Mac that says nothing gives None for each figure, with what was asked."""
    calls = RecordedMac(commands={(PMSET, "-g"): None, (PMSET, "-g", "batt"): None})
    calls.thermal_level = calls.is_low_power = calls.power = None
    calls.sysctls["kern.memorystatus_vm_pressure_level"] = None
    calls.sysctls["vm.swapusage"] = None
    conditions = mac(calls).read_conditions()
    for name in (
        "pressure", "thermal", "is_low_power", "is_on_battery", "battery_percent",
        "swap_used_bytes",
    ):  # fmt: skip
        assert getattr(conditions, name) is None, name
        assert conditions.sources[name]


def test_a_command_that_fails_takes_nothing_from_what_calls_say() -> None:
    """In a sandbox without pmset the mode and the battery are still known."""
    calls = RecordedMac(commands={(PMSET, "-g"): None, (PMSET, "-g", "batt"): None})
    conditions = mac(calls).read_conditions()
    assert (conditions.is_low_power, conditions.is_on_battery) == (True, True)
    assert conditions.battery_percent == 41
    assert conditions.sources["battery_percent"] == "IOPowerSources"


@pytest.mark.parametrize(("level", "thermal"), [(4, ThermalState.SLEEPING), (20, None)])
def test_levels_of_heat(level: int, thermal: ThermalState | None) -> None:
    """Levels 0 to 4 have names; another one is not guessed at."""
    calls = RecordedMac()
    calls.thermal_level = level
    assert mac(calls).read_conditions().thermal is thermal


@pytest.mark.skipif(platform.system() == "Darwin", reason="a Mac has these libraries")
def test_elsewhere_the_calls_give_none() -> None:
    """Off a Mac the libraries and commands are missing, which gives None and no exception."""
    calls = NativeCalls()
    assert calls.sysctl("hw.memsize") is None
    assert calls.vm_statistics() is None
    assert calls.rusage(1) is None
    assert calls.notify_state("com.apple.system.thermalpressurelevel") is None
    assert calls.metal_working_set_bytes() is None
    assert calls.low_power_mode() is None
    assert calls.fixed(*PROFILER) is None


@pytest.mark.parametrize("is_known", [True, False])
def test_a_mac_without_the_mode_is_not_asked_for_it(
    monkeypatch: pytest.MonkeyPatch, is_known: bool
) -> None:
    """A message that NSProcessInfo does not know would end the process, so it is not sent."""
    sent: list[str] = []
    objc = SimpleNamespace(
        objc_getClass=lambda name: 2**40 + 1,
        sel_registerName=lambda name: name,
        class_respondsToSelector=lambda receiver, name: is_known,
    )

    def send(_objc: object, _result: object, receiver: int, name: str) -> int:
        sent.append(name)
        return receiver

    monkeypatch.setattr(ctypes, "CDLL", lambda path: None)
    monkeypatch.setattr(macos_calls, "_objc", lambda: objc)
    monkeypatch.setattr(macos_calls, "_send", send)
    assert NativeCalls().low_power_mode() is (True if is_known else None)
    assert sent == (["processInfo", "isLowPowerModeEnabled"] if is_known else [])


def test_processors_are_watched_everywhere() -> None:
    """Processor times come from psutil, on any system: busy and own time are part of the whole."""
    times = NativeCalls().cpu_times([])
    assert times.total_s > times.busy_s > 0
    assert times.own_s == 0


def test_a_mac_without_its_size_promises_nothing() -> None:
    """A kernel that does not say how much memory there is is an error, not a Mac of 0 bytes."""
    mac = RecordedMac()
    mac.sysctls["hw.memsize"] = None
    with pytest.raises(ConfigError, match=r"run: sysctl hw\.memsize"):
        MacosMachine(mac).read_machine()


def test_a_command_may_print_any_bytes() -> None:
    """Output that is no text is read as far as it is, and stops nothing."""
    code = "import sys; sys.stdout.buffer.write(bytes([34, 255, 34]))"
    assert NativeCalls().command(sys.executable, "-S", "-c", code) == '"\ufffd"'


def test_signals_run_no_command() -> None:
    """Each second only calls are made: no command and no wait, and the load of others is None."""
    calls = RecordedMac()
    calls.statistics = statistics(free=1000, active=4000, inactive=2000, wired=50)

    def refuse(*words: object) -> None:
        raise AssertionError(words)

    calls.command = calls.fixed = calls.cpu_times = refuse  # type: ignore[assignment]
    signals = MacosMachine(calls, sleep=refuse).read_signals()
    assert (signals.is_low_power, signals.is_on_battery, signals.battery_percent) == (
        True, True, 41,
    )  # fmt: skip
    assert (signals.pressure, signals.thermal) == (Pressure.NORMAL, ThermalState.MODERATE)
    assert signals.busy_fraction is None
    names = {*type(signals).__struct_fields__} - {"is_simulated", "sources"}
    assert set(signals.sources) == names
    assert signals.sources["available_bytes"].startswith("host_statistics64: ")


def statistics(
    *, free: int, active: int, inactive: int, wired: int, purgeable: int = 0,
    speculative: int = 0, file_backed: int = 0,
) -> bytes:  # fmt: skip
    """vm_statistics64 with these pages."""
    words = [free, active, inactive, wired, *[0] * 9, purgeable, speculative, *[0] * 9]
    words[21] = file_backed
    return VM_STATISTICS.pack(*words)


def test_what_a_mac_can_give() -> None:
    """Free and purgeable pages count, and of the file pages in use the inactive ones' share."""
    calls = RecordedMac()
    calls.statistics = statistics(
        free=1000, active=3000, inactive=1000, wired=9999,
        purgeable=50, speculative=100, file_backed=900,
    )  # fmt: skip
    pages = 1000 + 50 + (900 - 100) // 4
    assert mac(calls).read_signals().available_bytes == pages * 16384


def test_recorded_mac_has_memory_left() -> None:
    """Of the recorded 48 GiB, 6.1 can be taken: more than is free, less than is not in use."""
    counters = parse_vm_stat(RECORDED_VM_STAT)
    available = mac(RecordedMac()).read_conditions().available_bytes
    assert available == counters.available_bytes()
    assert counters.free * 16384 < available < 48 * GIB - counters.used_bytes()
    assert available / GIB == pytest.approx(6.14, abs=0.01)


def test_a_mac_without_counters_has_no_headroom() -> None:
    """Where the kernel does not answer, signals do not run vm_stat in its place: they are None."""
    signals = mac(RecordedMac()).read_signals()
    assert (signals.available_bytes, signals.compressor_ratio) == (None, None)
    assert signals.sources["available_bytes"] == "host_statistics64 gives no answer"


def test_a_desktop_mac_says_nothing_of_a_battery() -> None:
    """Without a battery, power source and charge are None with a reason."""
    calls = RecordedMac()
    calls.power = calls.is_low_power = None
    signals = mac(calls).read_signals()
    assert (signals.is_on_battery, signals.battery_percent, signals.is_low_power) == (
        None, None, None,
    )  # fmt: skip
    assert signals.sources["is_on_battery"] == "IOPowerSources does not say"
