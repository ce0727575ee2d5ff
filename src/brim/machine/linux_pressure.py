"""How short a Linux machine is of memory: stalls, headroom, swap, and files that are read again.

Every function takes the root of the file tree, so that recorded trees can be read.
Source: https://docs.kernel.org/accounting/psi.html, filesystems/proc.html.
"""

import re
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path

from brim.machine.cgroup import Hierarchy, hierarchies, memory_group, parse_pairs, read_text
from brim.machine.interface import Reading
from brim.machine.linux import parse_kib_lines
from brim.machine.linux_refaults import refaulted_bytes


def memory_readings(root: Path = Path("/")) -> dict[str, Reading]:
    """Stalls, what is available, swap and what is read again, under the names of `Conditions`."""
    groups = list(hierarchies("memory", root))
    meminfo = parse_kib_lines(read_text(root / "proc/meminfo"))
    return {
        "stalled_percent": stalled_percent(root, groups),
        "available_bytes": available_bytes(meminfo, groups),
        **_swap(root, meminfo),
        "refaulted_bytes": refaulted_bytes(root, groups, meminfo.get("MemTotal")),
    }


def stalled_percent(root: Path, groups: Sequence[Hierarchy]) -> Reading:
    """Share of the last 10 s in which a task waited for memory: ours, or any of the machine's.

    A group of ours may stall at its limit while the machine has room, so the largest counts.
    """
    paths = [root / "proc/pressure/memory"]
    for hierarchy in groups:
        if hierarchy.version == 2:
            paths += [directory / "memory.pressure" for directory in hierarchy.directories]
    found = []
    for path in paths:
        match = re.search(r"^some avg10=(\d+(?:\.\d+)?) ", read_text(path), re.M)
        if match:
            found.append(Reading(float(match[1]), f"{path}: some avg10"))
    none = Reading(None, "no /proc/pressure/memory: this kernel does not measure stalls")
    return max(found, key=lambda reading: float(reading.value), default=none)


def available_bytes(meminfo: Mapping[str, int], groups: Sequence[Hierarchy]) -> Reading:
    """What can be taken before something in use has to go: of the machine, or of a group of ours.

    The kernel's own MemAvailable counts all file pages as free, those of mapped weights too, which
    a model then reads from disk for every token; so what is mapped comes off, libraries included.
    """
    available, total = meminfo.get("MemAvailable"), meminfo.get("MemTotal")
    if available is None or not total:
        return Reading(None, "/proc/meminfo has no MemAvailable")
    files = meminfo.get("Active(file)", 0) + meminfo.get("Inactive(file)", 0)
    mapped = min(meminfo.get("Mapped", 0), files)
    found = [Reading(max(0, available - mapped), "/proc/meminfo: MemAvailable - Mapped")]
    for hierarchy in groups:
        for directory in hierarchy.directories:
            group = memory_group(directory, hierarchy.version, below_bytes=total)
            if group is not None:
                source = f"{group.source} - usage + file pages that nobody has mapped"
                found.append(Reading(group.available_bytes(), source))
    return min(found, key=lambda reading: int(reading.value))


def _swap(root: Path, meminfo: Mapping[str, int]) -> dict[str, Reading]:
    used: int | None = None
    if "SwapTotal" in meminfo and "SwapFree" in meminfo:
        # A container may be told its own total and the machine's free bytes.
        used = max(0, meminfo["SwapTotal"] - meminfo["SwapFree"])
    pages = parse_pairs(read_text(root / "proc/vmstat"))
    page_bytes = resource.getpagesize()

    def bytes_of(counter: str) -> Reading:
        if counter not in pages:
            return Reading(None, f"/proc/vmstat has no {counter}")
        return Reading(pages[counter] * page_bytes, f"/proc/vmstat: {counter}, since boot")

    return {
        "swap_used_bytes": Reading(used, "/proc/meminfo: SwapTotal - SwapFree"),
        "swapped_out_bytes": bytes_of("pswpout"),
        "swapped_in_bytes": bytes_of("pswpin"),
    }
