"""What a Linux machine and its control groups can still give, from built file trees."""

from pathlib import Path

import pytest

from brim.machine.cgroup import memory_groups
from brim.machine.interface import Reading
from brim.machine.linux import read_linux
from brim.machine.linux_machine import LinuxMachine
from brim.machine.linux_pressure import memory_readings

GIB = 1024**3
V2 = "29 1 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
V1 = "35 1 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"


def kib(gib: float) -> int:
    return int(gib * 1024**2)


def tree(root: Path, files: dict[str, str], **meminfo_gib: float) -> Path:
    """A machine of 16 GiB, 12 of them available by the kernel's count, and `files` on top."""
    values = {"MemTotal": 16, "MemAvailable": 12, **meminfo_gib}
    lines = [f"{name.replace('_file', '(file)')}: {kib(n)} kB\n" for name, n in values.items()]
    for name, text in {"proc/meminfo": "".join(lines), **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def available(root: Path) -> Reading:
    return memory_readings(root)["available_bytes"]


def test_mapped_weights_are_not_available(tmp_path: Path) -> None:
    """The kernel's figure counts file pages that a model has mapped; ours does not."""
    reading = available(tree(tmp_path, {}, Mapped=5, Active_file=2, Inactive_file=6))
    assert reading.value == 7 * GIB
    assert reading.source == "/proc/meminfo: MemAvailable - Mapped"


def test_mapped_shared_memory_is_no_file(tmp_path: Path) -> None:
    """What is mapped beyond all file pages is shared memory, which was never counted as free."""
    assert available(tree(tmp_path, {}, Mapped=5, Active_file=1, Inactive_file=1)).value == 10 * GIB


@pytest.mark.parametrize("meminfo", ["MemTotal: 16 kB\n", "MemAvailable: 16 kB\n", ""])
def test_without_the_kernels_figure_there_is_none(tmp_path: Path, meminfo: str) -> None:
    """A /proc/meminfo without the figure gives None and says what is missing."""
    reading = available(tree(tmp_path, {"proc/meminfo": meminfo}))
    assert reading.value is None
    assert "/proc/meminfo" in reading.source


def v2_box(**files: str) -> dict[str, str]:
    box = {f"sys/fs/cgroup/box/{name.replace('_', '.', 1)}": text for name, text in files.items()}
    return {"proc/self/cgroup": "0::/box\n", "proc/self/mountinfo": V2, **box}


def stat(active: float = 0, inactive: float = 0, mapped: float = 0, prefix: str = "") -> str:
    name = "mapped_file" if prefix else "file_mapped"
    return (
        f"{prefix}active_file {int(active * GIB)}\n{prefix}inactive_file {int(inactive * GIB)}\n"
        f"{prefix}{name} {int(mapped * GIB)}\n"
    )


def test_a_group_leaves_its_limit_less_what_is_in_use(tmp_path: Path) -> None:
    """File pages of a group are available on either list, unless they are mapped."""
    files = v2_box(
        memory_max=str(8 * GIB), memory_current=str(7 * GIB), memory_stat=stat(1, 2, mapped=2)
    )
    reading = available(tree(tmp_path, files))
    assert reading.value == 2 * GIB
    assert reading.source.endswith("box/memory.max - usage + file pages that nobody has mapped")


def test_a_group_may_be_slowed_before_it_is_full(tmp_path: Path) -> None:
    """Above memory.high the kernel slows a group down, so that is its limit where it is lower."""
    files = v2_box(
        memory_max="max", memory_high=str(6 * GIB), memory_current=str(5 * GIB), memory_stat=""
    )
    root = tree(tmp_path, files)
    assert available(root).value == GIB
    assert read_linux(root).ram_bytes == 6 * GIB
    assert [group.source.rpartition("/")[2] for group in memory_groups(root)] == ["memory.high"]


def test_version_1_groups_count_those_below(tmp_path: Path) -> None:
    """Version 1 gives the same figures under other names; 2^63 less a page is no limit."""
    group = "sys/fs/cgroup/memory/a"
    files = {
        "proc/self/cgroup": "5:memory:/a\n",
        "proc/self/mountinfo": V1,
        f"{group}/memory.limit_in_bytes": str(4 * GIB),
        f"{group}/memory.usage_in_bytes": str(4 * GIB),
        f"{group}/memory.stat": "active_file 0\n" + stat(2, 1, mapped=0.5, prefix="total_"),
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "9223372036854771712",
    }
    assert available(tree(tmp_path, files)).value == 2.5 * GIB


def test_the_machine_binds_where_it_has_less(tmp_path: Path) -> None:
    """A wide group is no promise on a machine that is nearly full."""
    files = v2_box(memory_max=str(8 * GIB), memory_current="0", memory_stat="")
    reading = available(tree(tmp_path, files, MemAvailable=0.5))
    assert (reading.value, reading.source) == (GIB // 2, "/proc/meminfo: MemAvailable - Mapped")


def test_a_group_over_its_limit_has_nothing(tmp_path: Path) -> None:
    """Where use is above a limit that was lowered, nothing is available, and no less."""
    files = v2_box(memory_max=str(GIB), memory_current=str(2 * GIB), memory_stat="")
    assert available(tree(tmp_path, files)).value == 0


def no_wait(seconds: float) -> None:
    raise AssertionError(f"waited {seconds} s")


def test_signals_wait_for_nothing(tmp_path: Path) -> None:
    """All but the load of others is in the signals, which are read without a wait."""
    throttled = "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count"
    machine = LinuxMachine(tree(tmp_path, {throttled: "7\n"}), sleep=no_wait)
    signals = machine.read_signals()
    assert (signals.available_bytes, signals.busy_fraction) == (12 * GIB, None)
    assert "quarter of a second" in signals.sources["busy_fraction"]
    watched = LinuxMachine(tmp_path, sleep=lambda seconds: None).read_conditions()
    assert set(signals.sources) == set(watched.sources)


def test_throttling_between_two_signals_counts(tmp_path: Path) -> None:
    """Throttle counts are held against the reading before; the first one has none."""
    throttled = "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count"
    machine = LinuxMachine(tree(tmp_path, {throttled: "7\n"}), sleep=no_wait)
    seen = [machine.read_signals().is_throttled]
    for count in ("7\n", "9\n", "9\n"):
        tree(tmp_path, {throttled: count})
        seen.append(machine.read_signals().is_throttled)
    assert seen == [False, False, True, False]


def test_readings_leave_no_descriptor_open(tmp_path: Path) -> None:
    """Fifty readings leave as many open files as there were."""
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("only Linux lists a process's descriptors there")
    machine = LinuxMachine(tree(tmp_path, {}))
    machine.read_signals()
    before = len(list(descriptors.iterdir()))
    for _ in range(50):
        machine.read_signals()
    assert len(list(descriptors.iterdir())) == before
