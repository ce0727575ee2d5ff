"""What Linux says about memory and processors, read from recorded and built file trees."""

import os
from pathlib import Path

import pytest

from brim.errors import ConfigError
from brim.machine.cgroup import cpu_quota, memory_groups
from brim.machine.linux import parse_kib_lines, process_memory, read_linux, resident_bytes

FIXTURES = Path(__file__).parent / "fixtures"
GIB = 1024**3
V2 = "29 1 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "35 1 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"


def tree(tmp_path: Path, files: dict[str, str]) -> Path:
    """A file tree with a machine of 16 GiB, 12 of them available, and `files` on top."""
    meminfo = f"MemTotal: {16 * 1024**2} kB\nMemAvailable: {12 * 1024**2} kB\n"
    for name, text in {"proc/meminfo": meminfo, **files}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def rollup(anonymous_gib: float, file_gib: float = 0) -> str:
    """A smaps_rollup of a process with so much memory."""
    anonymous, file = int(anonymous_gib * 1024**2), int(file_gib * 1024**2)
    return f"Pss: {anonymous + file} kB\nPss_Anon: {anonymous} kB\nPss_File: {file} kB\n"


def group(
    limit: str, used_gib: float = 0, inactive_gib: float = 0, active_gib: float = 0
) -> dict[str, str]:
    """The files of one version 2 memory group, to be put below its directory."""
    inactive, active = int(inactive_gib * GIB), int(active_gib * GIB)
    return {
        "memory.max": limit,
        "memory.current": str(int(used_gib * GIB)),
        "memory.stat": f"anon 1\ninactive_file {inactive}\nactive_file {active}\n",
    }


def at(directory: str, files: dict[str, str]) -> dict[str, str]:
    return {f"{directory}/{name}": text for name, text in files.items()}


def test_recorded_meminfo_is_read_in_kib() -> None:
    """The recorded /proc/meminfo gives bytes, and lines without a unit are left out."""
    values = parse_kib_lines((FIXTURES / "meminfo_head.txt").read_text() + "HugePages_Total: 0\n")
    assert values["MemTotal"] == 24684096 * 1024
    assert values["MemAvailable"] == 22954248 * 1024
    assert "HugePages_Total" not in values


def test_recorded_rollup_is_read(tmp_path: Path) -> None:
    """The recorded smaps_rollup gives the process's anonymous, file and resident bytes."""
    text = (FIXTURES / "smaps_rollup.txt").read_text()
    memory = process_memory(7, tree(tmp_path, {"proc/7/smaps_rollup": text}))
    assert memory is not None
    assert memory.dirty_bytes == 112 * 1024
    assert memory.file_bytes == 240 * 1024
    assert memory.resident_bytes == 352 * 1024


def test_swapped_memory_is_dirty_and_not_resident(tmp_path: Path) -> None:
    """What a process has in swap counts as its own but not as in RAM."""
    text = "Pss: 100 kB\nPss_Anon: 60 kB\nPss_File: 40 kB\nSwapPss: 30 kB\n"
    memory = process_memory(7, tree(tmp_path, {"proc/7/smaps_rollup": text}))
    assert memory is not None
    assert (memory.dirty_bytes, memory.resident_bytes) == (90 * 1024, 100 * 1024)


def test_a_process_that_is_gone_has_no_memory(tmp_path: Path) -> None:
    """A process without a smaps_rollup, or with an empty one, gives None and no zero."""
    assert process_memory(7, tree(tmp_path, {"proc/8/smaps_rollup": ""})) is None
    assert process_memory(8, tmp_path) is None


def test_this_process_can_be_read() -> None:
    """The interpreter that runs this test holds more than a megabyte."""
    memory = process_memory(os.getpid())
    if memory is None:
        pytest.skip("this system has no smaps_rollup")
    assert memory.dirty_bytes > 1024**2
    assert memory.resident_bytes >= memory.file_bytes > 0


def test_machine_without_groups(tmp_path: Path) -> None:
    """Without control groups RAM is MemTotal and others use what is not available."""
    spec = read_linux(tree(tmp_path, {}))
    assert (spec.ram_bytes, spec.others_bytes) == (16 * GIB, 4 * GIB)
    assert spec.gpu_limit_bytes is None
    assert set(spec.sources) >= {"ram_bytes", "others_bytes", "performance_cores"}


def test_own_anonymous_memory_is_not_others(tmp_path: Path) -> None:
    """Of our own processes only anonymous memory is taken off, since file pages are available."""
    root = tree(tmp_path, {"proc/5/smaps_rollup": rollup(3, file_gib=9)})
    assert read_linux(root, own_pids=[5, 6]).others_bytes == 1 * GIB


def test_group_limit_is_ram(tmp_path: Path) -> None:
    """Under a limit, RAM is the limit and others are the group's use less inactive file pages."""
    files = {"proc/self/cgroup": "0::/box\n", "proc/self/mountinfo": V2}
    files |= at("sys/fs/cgroup/box", group(str(8 * GIB), used_gib=5, inactive_gib=2))
    spec = read_linux(tree(tmp_path, files))
    assert (spec.ram_bytes, spec.others_bytes) == (8 * GIB, 3 * GIB)
    assert spec.sources["ram_bytes"].endswith("sys/fs/cgroup/box/memory.max")


def test_own_mapped_weights_in_a_group_are_not_others(tmp_path: Path) -> None:
    """Active file pages that we map ourselves are taken off the group's use, others' are not."""
    files = {"proc/self/cgroup": "0::/box\n", "proc/self/mountinfo": V2}
    files |= at("sys/fs/cgroup/box", group(str(8 * GIB), used_gib=6, active_gib=4))
    files["proc/5/smaps_rollup"] = rollup(1, file_gib=3)
    assert read_linux(tree(tmp_path, files), own_pids=[5]).others_bytes == 2 * GIB


def test_full_machine_binds_before_the_group(tmp_path: Path) -> None:
    """Where the machine has less left than the group allows, that is what others leave."""
    files = {
        "proc/self/cgroup": "0::/box\n",
        "proc/self/mountinfo": V2,
        "proc/meminfo": f"MemTotal: {16 * 1024**2} kB\nMemAvailable: {2 * 1024**2} kB\n",
    }
    files |= at("sys/fs/cgroup/box", group(str(8 * GIB), used_gib=1))
    assert read_linux(tree(tmp_path, files)).others_bytes == 6 * GIB


def test_limits_above_count(tmp_path: Path) -> None:
    """The walk goes up to the mount point, so a limit on a group above binds as well."""
    files = {"proc/self/cgroup": "0::/a/b/c\n", "proc/self/mountinfo": V2}
    files |= at("sys/fs/cgroup/a/b/c", group("max"))
    files |= at("sys/fs/cgroup/a/b", group(str(6 * GIB), used_gib=1))
    files |= at("sys/fs/cgroup/a", group(str(4 * GIB), used_gib=3))
    root = tree(tmp_path, files)
    assert [found.limit_bytes // GIB for found in memory_groups(root)] == [6, 4]
    spec = read_linux(root)
    assert (spec.ram_bytes, spec.others_bytes) == (4 * GIB, 3 * GIB)


def test_container_sees_its_own_part_of_the_tree(tmp_path: Path) -> None:
    """A group's path that lies outside the mount is looked for at the mount point."""
    mount = "29 1 0:26 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
    files = at("sys/fs/cgroup", group(str(2 * GIB)))
    for line in ("0::/docker/abc\n", "0::/\n", "0::/../other\n"):
        files |= {"proc/self/cgroup": line, "proc/self/mountinfo": mount}
        assert read_linux(tree(tmp_path, files)).ram_bytes == 2 * GIB


def test_version_1_groups(tmp_path: Path) -> None:
    """Version 1 limits are read by their own names, and 2^63 less a page means none."""
    files = {"proc/self/cgroup": "5:memory,x:/a\n4:cpu:/\n0::/\n", "proc/self/mountinfo": V1 + V2}
    files |= {
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "1",
        "sys/fs/cgroup/memory/a/memory.limit_in_bytes": str(3 * GIB),
        "sys/fs/cgroup/memory/a/memory.usage_in_bytes": str(2 * GIB),
        "sys/fs/cgroup/memory/a/memory.stat": f"inactive_file 0\ntotal_inactive_file {GIB}\n",
    }
    spec = read_linux(tree(tmp_path, files))
    assert (spec.ram_bytes, spec.others_bytes) == (3 * GIB, 1 * GIB)


@pytest.mark.parametrize(
    ("cpu_max", "cores"), [("max 100000", None), ("150000 100000", 1.5), ("", None)]
)
def test_cpu_quota(tmp_path: Path, cpu_max: str, cores: float | None) -> None:
    """cpu.max is quota over period, and 'max' means none."""
    files = {"proc/self/cgroup": "0::/box\n", "proc/self/mountinfo": V2}
    files["sys/fs/cgroup/box/cpu.max"] = cpu_max
    quota = cpu_quota(tree(tmp_path, files))
    assert (quota and quota.num_cpus) == cores


def test_cores_are_bounded_by_the_quota(tmp_path: Path) -> None:
    """A quota of half a processor leaves one core, however many may be run on."""
    files = {
        "proc/self/cgroup": "4:cpu:/\n",
        "proc/self/mountinfo": "33 1 0:30 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
    }
    spec = read_linux(tree(tmp_path, files))
    assert spec.performance_cores == 1
    assert spec.sources["performance_cores"].endswith("cpu.cfs_quota_us")


def test_slow_cores_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a processor with two tiers the atom cores are left out."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    root = tree(
        tmp_path, {"sys/devices/cpu_atom/cpus": "4-11\n", "proc/cpuinfo": "model name\t: X"}
    )
    spec = read_linux(root)
    assert (spec.performance_cores, spec.name) == (4, "X")


def test_resident_memory_comes_from_the_kernels_counters(tmp_path: Path) -> None:
    """VmRSS in bytes, and nothing where the process is gone or says nothing."""
    files = {"proc/7/status": "Name:\tx\nVmRSS:\t  1200 kB\n", "proc/8/status": "Name:\tkernel\n"}
    root = tree(tmp_path, files)
    assert resident_bytes(7, root) == 1200 * 1024
    assert resident_bytes(8, root) is None
    assert resident_bytes(9, root) is None


@pytest.mark.parametrize(
    "meminfo", ["", "MemTotal: 16 kB\n", "MemTotal: 0 kB\nMemAvailable: 0 kB\n"]
)
def test_without_meminfo_nothing_is_promised(tmp_path: Path, meminfo: str) -> None:
    """A machine that does not say how much memory is free is refused, not taken for empty."""
    with pytest.raises(ConfigError, match=r"meminfo does not say .* mount /proc"):
        read_linux(tree(tmp_path, {"proc/meminfo": meminfo}))


def test_bytes_that_are_no_text_stop_nothing(tmp_path: Path) -> None:
    """Names in other encodings, digits that are no numbers and broken lists leave figures out."""
    root = tree(tmp_path, {"sys/devices/cpu_atom/cpus": "0-x,7-"})
    (root / "proc/7").mkdir(parents=True)
    (root / "proc/cpuinfo").write_bytes(b"model name : Z\xe9\n")
    (root / "proc/7/status").write_bytes(b"Name:\t\xff\nVmRSS:\t 8 kB\n")
    (root / "proc/7/smaps_rollup").write_bytes(b"\xff\nPss: \xc2\xb2 kB\n")
    assert read_linux(root, own_pids=[7]).name.startswith("Z")
    assert resident_bytes(7, root) == 8192
    assert process_memory(7, root) is None
