"""What a Linux machine feels, read from recorded and built file trees."""

import resource
from pathlib import Path

import pytest

from brim.core.machine import Conditions, ThermalState
from brim.machine.linux_conditions import read_linux_conditions
from brim.machine.linux_machine import LinuxMachine

FIXTURES = Path(__file__).parent / "fixtures"
V2 = "29 1 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
FIGURES = set(Conditions.__struct_fields__) - {"is_simulated", "sources"}


def grow(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def feel(
    root: Path,
    files: dict[str, str] | None = None,
    *,
    later: dict[str, str] | None = None,
    own_pids: tuple[int, ...] = (),
) -> Conditions:
    """Conditions of a tree of `files`; `later` is written while the processors are watched."""
    grow(root, files or {})

    def wait(seconds: float) -> None:
        grow(root, later or {})

    return read_linux_conditions(root, own_pids=own_pids, sleep=wait)


def no_wait(seconds: float) -> None:
    del seconds


def test_a_bare_machine_says_why_it_says_nothing(tmp_path: Path) -> None:
    """A container without sysfs gives None for everything, each with its reason."""
    conditions = feel(tmp_path)
    assert {getattr(conditions, name) for name in FIGURES} == {None}
    assert set(conditions.sources) == FIGURES
    assert not conditions.is_simulated


def test_recorded_stalls(tmp_path: Path) -> None:
    """The recorded PSI file says that nothing waited, which is 0 and not None."""
    text = (FIXTURES / "psi_memory_linux.txt").read_text()
    assert feel(tmp_path, {"proc/pressure/memory": text}).stalled_percent == 0.0


def test_own_group_may_stall_alone(tmp_path: Path) -> None:
    """A group at its limit stalls while the machine has room, and that is what we feel."""
    files = {
        "proc/pressure/memory": "some avg10=1.50 avg60=0.00 avg300=0.00 total=0\n",
        "proc/self/cgroup": "0::/box\n",
        "proc/self/mountinfo": V2,
        "sys/fs/cgroup/box/memory.pressure": "some avg10=42.10 avg60=0.00 avg300=0.00 total=9\n",
    }
    conditions = feel(tmp_path, files)
    assert conditions.stalled_percent == 42.1
    assert conditions.sources["stalled_percent"].endswith("box/memory.pressure: some avg10")


def test_swap_is_counted_in_bytes(tmp_path: Path) -> None:
    """Swap in use is what is not free of it, and traffic is pages since boot."""
    files = {
        "proc/meminfo": "SwapTotal: 4096 kB\nSwapFree: 1024 kB\n",
        "proc/vmstat": "pswpin 3\npswpout 5\n",
    }
    conditions = feel(tmp_path, files)
    page = resource.getpagesize()
    assert conditions.swap_used_bytes == 3072 * 1024
    assert (conditions.swapped_in_bytes, conditions.swapped_out_bytes) == (3 * page, 5 * page)


def zone(temp: int, **trips: int) -> dict[str, str]:
    """A thermal zone with trip points by kind."""
    files = {"temp": str(temp), "type": "x86_pkg_temp"}
    for i, (kind, limit) in enumerate(trips.items()):
        files |= {f"trip_point_{i}_type": kind, f"trip_point_{i}_temp": str(limit)}
    return {f"sys/class/thermal/thermal_zone0/{name}": f"{text}\n" for name, text in files.items()}


@pytest.mark.parametrize(
    ("files", "thermal", "is_throttled"),
    [
        (zone(50000, passive=90000, critical=100000), ThermalState.NOMINAL, False),
        (zone(90000, passive=90000, critical=100000), ThermalState.HEAVY, True),
        (zone(96000, passive=90000, hot=95000), ThermalState.TRAPPING, True),
        (zone(101000, critical=100000), ThermalState.SLEEPING, None),
        (zone(50000), None, None),
        (zone(50000, passive=-274000), None, None),
        (zone(50000, passive=0), None, None),
    ],
)
def test_trip_points_tell_the_heat(
    tmp_path: Path,
    files: dict[str, str],
    thermal: ThermalState | None,
    is_throttled: bool | None,
) -> None:
    """The kernel slows down from a passive trip point on; trips that are off do not count."""
    conditions = feel(tmp_path, files)
    assert conditions.thermal is thermal
    assert conditions.is_throttled is is_throttled
    assert conditions.hottest_celsius == int(files["sys/class/thermal/thermal_zone0/temp"]) / 1000


def test_the_hottest_zone_counts(tmp_path: Path) -> None:
    """Of several zones the hottest is shown; one without a reading is left out."""
    files = zone(50000) | {
        "sys/class/thermal/thermal_zone1/temp": "61500\n",
        "sys/class/thermal/thermal_zone2/temp": "-40000\n",
    }
    conditions = feel(tmp_path, files)
    assert conditions.hottest_celsius == 61.5
    assert conditions.sources["hottest_celsius"].endswith("thermal_zone1")


def test_a_throttle_count_that_rises_is_throttling(tmp_path: Path) -> None:
    """Throttling of the past does not count, throttling in the window does."""
    path = "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count"
    assert feel(tmp_path, {path: "7\n"}).is_throttled is False
    assert feel(tmp_path, {path: "7\n"}, later={path: "8\n"}).is_throttled is True


def test_a_lower_limit_on_the_clock_is_throttling(tmp_path: Path) -> None:
    """A processor that may not reach its highest frequency is held below its speed."""
    directory = "sys/devices/system/cpu/cpu3/cpufreq"
    files = {f"{directory}/cpuinfo_max_freq": "4000000\n"}
    assert feel(tmp_path, {**files, f"{directory}/scaling_max_freq": "4000000\n"}).is_throttled is (
        False
    )
    conditions = feel(tmp_path, {**files, f"{directory}/scaling_max_freq": "2000000\n"})
    assert conditions.is_throttled is True
    assert "scaling_max_freq" in conditions.sources["is_throttled"]


@pytest.mark.parametrize(
    ("path", "profile", "is_low_power"),
    [
        ("sys/firmware/acpi/platform_profile", "balanced", False),
        ("sys/firmware/acpi/platform_profile", "low-power", True),
        ("sys/class/platform-profile/platform-profile-0/profile", "quiet", True),
    ],
)
def test_platform_profile(tmp_path: Path, path: str, profile: str, is_low_power: bool) -> None:
    """The firmware's profile tells whether power is saved, in its old place and its new one."""
    assert feel(tmp_path, {path: f"{profile}\n"}).is_low_power is is_low_power


def supply(name: str, **fields: str) -> dict[str, str]:
    return {f"sys/class/power_supply/{name}/{key}": f"{text}\n" for key, text in fields.items()}


BATTERY = supply("BAT0", type="Battery", status="Discharging", capacity="80")
SECOND = supply("BAT1", type="Battery", status="Full", capacity="41")
MOUSE = supply("hid0", type="Battery", status="Discharging", capacity="9", scope="Device")


@pytest.mark.parametrize(
    ("files", "is_on_battery", "percent"),
    [
        (BATTERY | supply("AC", type="Mains", online="0"), True, 80),
        (BATTERY | supply("AC", type="Mains", online="1"), False, 80),
        (BATTERY | SECOND, True, 60),
        (supply("AC", type="Mains", online="0"), False, None),
        (MOUSE, None, None),
    ],
)
def test_power(
    tmp_path: Path, files: dict[str, str], is_on_battery: bool | None, percent: int | None
) -> None:
    """Mains decides where there is one, else the battery; a mouse's battery feeds nothing."""
    conditions = feel(tmp_path, files)
    assert (conditions.is_on_battery, conditions.battery_percent) == (is_on_battery, percent)


STAT = "cpu  {user} 0 0 {idle} {iowait} 0 0 {steal} {user} 0\ncpu0 1 2 3\n"
"""What guests take, after what is stolen, is part of the users' share."""


def test_others_load_is_without_ours(tmp_path: Path) -> None:
    """Of 100 ticks 60 are busy, 20 of them ours and 10 stolen by a neighbour: others have 40 %."""
    process = "7 (a) b) R 1 1 1 0 -1 0 0 0 0 0 {utime} {stime} 0 0 20 0\n"
    before = {
        "proc/stat": STAT.format(user=1000, idle=500, iowait=7, steal=0),
        "proc/7/stat": process.format(utime=100, stime=10),
    }
    after = {
        "proc/stat": STAT.format(user=1050, idle=520, iowait=27, steal=10),
        "proc/7/stat": process.format(utime=115, stime=15),
    }
    conditions = feel(tmp_path, before, later=after, own_pids=(7,))
    assert conditions.busy_fraction == pytest.approx(0.4)


def test_counters_that_stand_still_tell_no_load(tmp_path: Path) -> None:
    """Two equal readings give None, not an idle machine."""
    assert (
        feel(tmp_path, {"proc/stat": STAT.format(user=1, idle=1, iowait=1, steal=0)}).busy_fraction
        is None
    )


def test_linux_machine_answers_all_questions(tmp_path: Path) -> None:
    """Behind the common interface each question is answered from the same tree."""
    files = {
        "proc/meminfo": "MemTotal: 4096 kB\nMemAvailable: 1024 kB\n",
        "proc/7/smaps_rollup": "Pss: 100 kB\nPss_Anon: 60 kB\nPss_File: 40 kB\n",
        "proc/7/status": "VmRSS: 120 kB\n",
    }
    machine = LinuxMachine(grow(tmp_path, files), own_pids=lambda: [7], sleep=no_wait)
    assert machine.read_machine().others_bytes == (3072 - 60) * 1024
    assert machine.read_conditions().swap_used_bytes is None
    memory = machine.process_memory(7)
    assert memory is not None
    assert memory.dirty_bytes == 60 * 1024
    assert machine.resident_bytes(7) == 120 * 1024


def test_swap_is_never_negative(tmp_path: Path) -> None:
    """Where a container is told less swap than is free, none is in use."""
    text = "SwapTotal: 1 kB\nSwapFree: 5 kB\n"
    assert feel(tmp_path, {"proc/meminfo": text}).swap_used_bytes == 0
