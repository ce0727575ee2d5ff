"""The processor cores that this process may use, and which of them its threads run on (Linux).

Elsewhere there are no such calls: no cores are reported, and nothing can be bound.
"""

import os
import sys
from collections.abc import Collection
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")
_THREADS = Path("/proc/self/task")


def usable_cores(cpus_directory: Path = _CPUS) -> tuple[frozenset[int], ...]:
    """The logical processors of each core that this process may run on; empty where unknown."""
    if sys.platform != "linux":
        return ()
    usable = os.sched_getaffinity(0)
    found: dict[frozenset[int], None] = {}
    for cpu in sorted(usable):
        siblings = cpus_directory / f"cpu{cpu}" / "topology" / "thread_siblings_list"
        try:
            together = _parse_list(siblings.read_text())
        except (OSError, ValueError):
            return ()
        found[frozenset(together & usable)] = None
    return tuple(found)


def own_threads() -> frozenset[int]:
    """The system's numbers of this process's threads; empty where unknown."""
    try:
        return frozenset(int(path.name) for path in _THREADS.iterdir())
    except OSError:
        return frozenset()


def bind(thread_id: int, cpus: Collection[int]) -> bool:
    """Let a thread run on these logical processors alone; whether the system did so.

    Args:
        thread_id: The system's number; 0 is the calling thread.
        cpus: Logical processors, at least one of them usable.
    """
    if sys.platform != "linux":
        return False
    try:
        os.sched_setaffinity(thread_id, cpus)
    except OSError:  # the thread has ended, or a sandbox forbids it
        return False
    return True


def _parse_list(text: str) -> set[int]:
    """Numbers and ranges as Linux lists them.

    Example:
        >>> sorted(_parse_list("0-1,8"))
        [0, 1, 8]
    """
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found
