"""Linux: memory and processors, from /proc and the control groups that bound this process.

Every function takes the root of the file tree, so that recorded trees can be read.
Source: https://docs.kernel.org/filesystems/proc.html
"""

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from brim.core.machine import MachineSpec
from brim.errors import ConfigError
from brim.machine.cgroup import MemoryGroup, cpu_quota, memory_groups, read_text
from brim.machine.process_memory import ProcessMemory

KIB = 1024

_NOT_ON_LINUX = ("chip", "gpu_cores", "memory_bandwidth", "fp32_flops", "cooling")
"""Figures of a maker's table, which covers Apple's chips."""


def read_linux(root: Path = Path("/"), *, own_pids: Sequence[int] = ()) -> MachineSpec:
    """Memory and processors that this process may use.

    Args:
        root: Where /proc and /sys lie.
        own_pids: Processes whose memory is ours, not others'.

    Raises:
        ConfigError: /proc/meminfo does not say how much memory there is and is free.
    """
    own = [memory for pid in own_pids if (memory := process_memory(pid, root)) is not None]
    bounds = [_machine_bound(root, own), *(_group_bound(g, own) for g in memory_groups(root))]
    smallest = min(bounds, key=lambda bound: bound.limit_bytes)
    tightest = min(bounds, key=lambda bound: bound.free_bytes)
    cores, cores_source = _cores(root)
    return MachineSpec(
        name=_name(root),
        system="linux",
        ram_bytes=smallest.limit_bytes,
        others_bytes=max(0, smallest.limit_bytes - tightest.free_bytes),
        performance_cores=cores,
        sources={
            "ram_bytes": smallest.source,
            "others_bytes": f"what {tightest.source} leaves free, and our own processes",
            "gpu_limit_bytes": "no GPU that shares the memory is known on Linux",
            "performance_cores": cores_source,
            **dict.fromkeys(_NOT_ON_LINUX, "no table of such machines; see: brim calibrate"),
        },
    )


class Bound(NamedTuple):
    """A limit on memory, and what is left of it for us, our own processes' share included."""

    limit_bytes: int
    free_bytes: int
    source: str


def _machine_bound(root: Path, own: Sequence[ProcessMemory]) -> Bound:
    meminfo = parse_kib_lines(read_text(root / "proc/meminfo"))
    if not meminfo.get("MemTotal") or "MemAvailable" not in meminfo:
        raise ConfigError(
            f"{root / 'proc/meminfo'} does not say how much memory there is and is free "
            "(MemTotal, MemAvailable), so nothing can be promised; mount /proc, and see that "
            "this process may read it"
        )
    own_bytes = sum(memory.resident_bytes - memory.file_bytes for memory in own)
    return Bound(meminfo["MemTotal"], meminfo["MemAvailable"] + own_bytes, "/proc/meminfo")


def _group_bound(group: MemoryGroup, own: Sequence[ProcessMemory]) -> Bound:
    """What a control group leaves.

    Inactive file pages go first when it is full, so they count as free.  Active ones that we map
    ourselves are our weights, which the ledger counts.
    """
    own_files = min(sum(memory.file_bytes for memory in own), group.active_file_bytes)
    own_bytes = sum(memory.resident_bytes - memory.file_bytes for memory in own) + own_files
    free = group.limit_bytes - group.used_bytes + group.inactive_file_bytes + own_bytes
    return Bound(group.limit_bytes, free, group.source)


def process_memory(pid: int, root: Path = Path("/")) -> ProcessMemory | None:
    """What /proc/PID/smaps_rollup says; None where it cannot be read."""
    fields = parse_kib_lines(read_text(root / f"proc/{pid}/smaps_rollup"))
    if "Pss" not in fields:
        return None
    # Kernels before 5.4 lack the split; then all anonymous pages count, shared or not.
    anonymous = fields.get("Pss_Anon", fields.get("Anonymous", 0)) + fields.get("Pss_Shmem", 0)
    return ProcessMemory(
        dirty_bytes=anonymous + fields.get("SwapPss", 0),
        resident_bytes=fields["Pss"],
        file_bytes=fields.get("Pss_File", 0),
    )


def resident_bytes(pid: int, root: Path = Path("/")) -> int | None:
    """VmRSS of /proc/PID/status; None where it cannot be read.

    Counters that the kernel keeps anyway.  smaps_rollup shares pages out more fairly, but walks
    every page table under the process's memory lock: 30 ms of CPU for a worker of 1.8 GB.
    """
    return parse_kib_lines(read_text(root / f"proc/{pid}/status")).get("VmRSS")


def parse_kib_lines(text: str) -> dict[str, int]:
    """Bytes by name from lines such as 'MemTotal:  24684096 kB', which mean KiB.

    Example:
        >>> parse_kib_lines("MemTotal:       24684096 kB")
        {'MemTotal': 25276514304}
    """
    values = {}
    for line in text.splitlines():
        name, colon, rest = line.partition(":")
        words = rest.split()
        if colon and len(words) == 2 and words[1] == "kB" and words[0].isdigit():
            values[name] = int(words[0]) * KIB
    return values


def _cores(root: Path) -> tuple[int, str]:
    """Processors that we may run on, less a slow tier, at most what the CPU quota pays for."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else {0}
    fast, source = allowed, "sched_getaffinity"
    slow = parse_cpu_list(read_text(root / "sys/devices/cpu_atom/cpus"))
    if slow and allowed - slow:
        fast, source = allowed - slow, "sched_getaffinity without /sys/devices/cpu_atom"
    quota = cpu_quota(root)
    if quota is not None and quota.num_cpus < len(fast):
        # Half a processor more than a whole one is no place for a second spinning thread.
        return max(1, int(quota.num_cpus)), quota.source
    return len(fast), source


def parse_cpu_list(text: str) -> set[int]:
    """Processor numbers from the kernel's list form.

    Example:
        >>> sorted(parse_cpu_list("0-2,8"))
        [0, 1, 2, 8]
    """
    cpus: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            cpus.update(range(int(first), int(last if last.isdigit() else first) + 1))
    return cpus


def _name(root: Path) -> str:
    for line in read_text(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model", "Hardware"):
            return value.strip()
    return platform.machine()
