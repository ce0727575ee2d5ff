"""Which file systems keep their files in memory, where writing a file frees none."""

import re
from pathlib import Path

_IN_MEMORY = frozenset({"tmpfs", "ramfs", "devtmpfs"})

_MOUNTS = Path("/proc/self/mounts")


def is_in_memory(path: Path, mounts: Path = _MOUNTS) -> bool:
    """Whether files below `path` take memory or swap; False where the system does not say.

    macOS has no such file system unless somebody makes a RAM disk.

    Args:
        path: A directory that exists.
        mounts: The system's table of what is mounted where.
    """
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
        resolved = path.resolve()
    except OSError:
        return False
    kind, depth = "", -1
    for line in lines:
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        # Blanks and the like stand there as octal numbers.
        point = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[1]))
        # Later lines cover earlier ones.
        if resolved.is_relative_to(point) and len(point.parts) >= depth:
            kind, depth = fields[2], len(point.parts)
    return kind in _IN_MEMORY
