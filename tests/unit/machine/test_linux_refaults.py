"""What was dropped and read again, and who waited for it, from recorded and built file trees."""

import os
import resource
import sys
from pathlib import Path

import pytest

from brim.machine.interface import Reading
from brim.machine.linux_machine import LinuxMachine
from brim.machine.linux_pressure import memory_readings
from brim.machine.linux_refaults import MajorFaults

FIXTURES = Path(__file__).parent / "fixtures"
PAGE = resource.getpagesize()
GIB = 1024**3
MEMINFO = "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n"
V1 = "35 1 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
V2 = "29 1 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"


def recorded(name: str) -> str:
    return (FIXTURES / name).read_text()


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": MEMINFO, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def refaulted(root: Path) -> Reading:
    return memory_readings(root)["refaulted_bytes"]


def v1_group(limit: int) -> dict[str, str]:
    group = "sys/fs/cgroup/memory/a"
    return {
        "proc/vmstat": recorded("vmstat_linux.txt"),
        "proc/self/cgroup": "5:memory:/a\n",
        "proc/self/mountinfo": V1,
        f"{group}/memory.limit_in_bytes": str(limit),
        f"{group}/memory.usage_in_bytes": str(GIB),
        f"{group}/memory.stat": recorded("memory_stat_v1.txt"),
    }


def test_without_a_limit_the_machine_counts(tmp_path: Path) -> None:
    """Pages of the recorded /proc/vmstat, in bytes; a limit of 2^63 is none."""
    for name, files in (
        ("bare", {"proc/vmstat": recorded("vmstat_linux.txt")}),
        ("unlimited", v1_group(9223372036854771712)),
    ):
        reading = refaulted(tree(tmp_path / name, files))
        assert reading.value == 60589399 * PAGE
        assert reading.source == "/proc/vmstat: workingset_refault_file, since boot"


def test_the_group_that_binds_counts_its_own(tmp_path: Path) -> None:
    """Version 1 counts the groups below it under a name of its own, version 2 under the same."""
    reading = refaulted(tree(tmp_path / "v1", v1_group(2 * GIB)))
    assert reading.value == 60589452 * PAGE
    assert "memory.stat: total_workingset_refault_file" in reading.source
    files = {
        "proc/vmstat": recorded("vmstat_linux.txt"),
        "proc/self/cgroup": "0::/box/inner\n",
        "proc/self/mountinfo": V2,
        "sys/fs/cgroup/box/inner/memory.max": "max",
        "sys/fs/cgroup/box/inner/memory.stat": "workingset_refault_file 5\n",
        "sys/fs/cgroup/box/memory.max": str(2 * GIB),
        "sys/fs/cgroup/box/memory.current": str(GIB),
        "sys/fs/cgroup/box/memory.stat": "workingset_refault_anon 1\nworkingset_refault_file 7\n",
    }
    assert refaulted(tree(tmp_path / "v2", files)).value == 7 * PAGE


def test_a_kernel_that_does_not_count_says_so(tmp_path: Path) -> None:
    """None, and what is missing, rather than 0."""
    reading = refaulted(tree(tmp_path, {"proc/vmstat": "pswpin 3\n"}))
    assert reading == Reading(None, "/proc/vmstat has no workingset_refault_file")


def stat(faults: int) -> str:
    """A line of /proc/PID/stat whose process is called 'a) b (c'."""
    return f"7 (a) b (c) S 1 7 7 0 -1 4194560 2000 11 {faults} 13 5 6 0 0 20 0 1 0 9 0 0\n"


def test_waits_of_processes_that_end_stay_counted(tmp_path: Path) -> None:
    """The count never falls: not when one ends, nor when its number is given to another."""
    faults = MajorFaults(tree(tmp_path, {"proc/7/stat": stat(40), "proc/8/stat": stat(2)}))
    assert faults.read([7, 8]).value == 42
    tree(tmp_path, {"proc/7/stat": stat(45)})
    assert faults.read([7]).value == 47
    tree(tmp_path, {"proc/7/stat": stat(3), "proc/8/stat": stat(2)})
    assert faults.read([7, 8]).value == 52
    assert faults.read([9]).value is None


def test_our_processes_are_looked_for_now_and_then(tmp_path: Path) -> None:
    """A second look in the same moment asks nobody which processes are ours."""
    asked = []

    def own_pids() -> list[int]:
        asked.append(1)
        return [7]

    machine = LinuxMachine(tree(tmp_path, {"proc/7/stat": stat(40)}), own_pids=own_pids)
    assert machine.read_signals().major_faults == 40
    tree(tmp_path, {"proc/7/stat": stat(41)})
    assert machine.read_signals().major_faults == 41
    assert len(asked) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts this")
def test_this_machine_counts_both() -> None:
    """The real files give figures of this process and of this kernel."""
    signals = LinuxMachine(own_pids=lambda: [os.getpid()]).read_signals()
    usage = resource.getrusage(resource.RUSAGE_SELF)
    assert signals.major_faults == pytest.approx(usage.ru_majflt, abs=5)
    assert isinstance(signals.refaulted_bytes, int) and signals.refaulted_bytes % PAGE == 0
