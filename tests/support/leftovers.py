"""What a process holds of the system: what it should have given back when something ended.

Linux alone: it is read from /proc.
"""

import gc
import os
import stat
import threading
from pathlib import Path
from typing import NamedTuple

import psutil

KIB = 1024


class Holdings(NamedTuple):
    """What one process holds at one moment."""

    children: int
    """Processes that it started and that still are, dead ones that nobody waited for included."""
    descriptors: int
    sockets: int
    """Of the descriptors."""
    threads: int
    """Of our own process without those of the loop's executor, which come as they are needed."""
    files: int
    """Below the directories that were named."""
    private_bytes: int
    """Anonymous memory, as the system counts it."""

    @property
    def things(self) -> "Holdings":
        """Without the bytes, which allocators give back when they like."""
        return self._replace(private_bytes=0)


def holdings(pid: int | None = None, *, directories: tuple[Path, ...] = ()) -> Holdings:
    """What a process holds; our own where none is named.

    Args:
        pid: The process.
        directories: Where it keeps files.
    """
    num_pooled = 0
    if pid is None:
        gc.collect()  # so that what only a cycle holds does not count
        pid = os.getpid()
        num_pooled = sum(each.name.startswith("asyncio_") for each in threading.enumerate())
    process = psutil.Process(pid)
    kinds = [_mode(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
    return Holdings(
        children=len(process.children(recursive=True)),
        # The listing itself has a descriptor in our own process, and it has gone.
        descriptors=sum(kind is not None for kind in kinds),
        sockets=sum(kind is not None and stat.S_ISSOCK(kind) for kind in kinds),
        threads=process.num_threads() - num_pooled,
        files=sum(len(names) for each in directories for _, _, names in os.walk(each)),
        private_bytes=_private_bytes(pid),
    )


def _mode(path: Path) -> int | None:
    try:
        return path.stat().st_mode
    except OSError:
        return None


def _private_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "Pss_Anon":
            return int(value.split()[0]) * KIB
    raise OSError(f"/proc/{pid}/smaps_rollup has no Pss_Anon")
