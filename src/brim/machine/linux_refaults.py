"""What a Linux machine reads again from disk because memory had dropped it, and who waits for it.

Mapped weights are clean pages: a machine that is short of memory drops them and reads them again
for the next token, without any swap.  Every function takes the root of the file tree, so that
recorded trees can be read.  Source: https://docs.kernel.org/admin-guide/cgroup-v2.html (memory.stat
workingset_refault_file), filesystems/proc.html (table 1-4, maj_flt).
"""

import resource
from collections.abc import Iterable, Sequence
from pathlib import Path

from brim.machine.cgroup import Hierarchy, memory_group, parse_pairs, read_text
from brim.machine.interface import Reading

REFAULTS = "workingset_refault_file"

_MAJOR_FAULTS_FIELD = 12
"""Of /proc/PID/stat, counted from 1; the name, field 2, may hold spaces and brackets."""


def refaulted_bytes(root: Path, groups: Sequence[Hierarchy], ram_bytes: int | None) -> Reading:
    """Bytes of files that were dropped and read again: of the group that binds us, else of all.

    The kernel books a page on the group of whoever reads it again, whichever limit had it dropped;
    so our innermost group with a limit tells of our own pages, and the machine of everybody's.

    Args:
        root: Where /proc lies.
        groups: Of the memory controller.
        ram_bytes: A limit from here on is none.
    """
    page_bytes = resource.getpagesize()
    for hierarchy in groups:
        name = f"total_{REFAULTS}" if hierarchy.version == 1 else REFAULTS
        for directory in hierarchy.directories:
            if memory_group(directory, hierarchy.version, below_bytes=ram_bytes) is None:
                continue
            pages = parse_pairs(read_text(directory / "memory.stat")).get(name)
            if pages is not None:
                source = f"{directory / 'memory.stat'}: {name}, since the group was made"
                return Reading(pages * page_bytes, source)
    pages = parse_pairs(read_text(root / "proc/vmstat")).get(REFAULTS)
    if pages is None:
        return Reading(None, f"/proc/vmstat has no {REFAULTS}")
    return Reading(pages * page_bytes, f"/proc/vmstat: {REFAULTS}, since boot")


class MajorFaults:
    """Counts how often processes waited for the disk to get at their memory, over all their lives.

    Args:
        root: Where /proc lies.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._seen: dict[int, int] = {}
        self._total = 0

    def read(self, pids: Iterable[int]) -> Reading:
        """All faults of these processes and of those that were asked for before."""
        counts = {pid: count for pid in pids if (count := self._count(pid)) is not None}
        for pid, count in counts.items():
            before = self._seen.get(pid, 0)
            # Fewer than before are another process's, which was given the same number.
            self._total += count - before if count >= before else count
        self._seen = counts
        if not counts:
            return Reading(None, "/proc/PID/stat of none of our processes can be read")
        return Reading(self._total, "/proc/PID/stat: maj_flt of our own processes")

    def _count(self, pid: int) -> int | None:
        fields = read_text(self._root / f"proc/{pid}/stat").rpartition(")")[2].split()
        # What is behind the name begins with field 3.
        index = _MAJOR_FAULTS_FIELD - 3
        return int(fields[index]) if len(fields) > index and fields[index].isdigit() else None
