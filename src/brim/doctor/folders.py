"""Where models lie: the file system under them, how fast it reads, and whether search indexes them.

The read is past the page cache and bounded: it drops nothing that a running model has in memory.
"""

import contextlib
import fcntl
import mmap
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from brim.doctor.facts import Folder
from brim.machine.cgroup import read_text

READ_BYTES = 64 * 1024 * 1024
READ_LIMIT_S = 0.5
"""A disk that reads less in it than 64 MB is slow, and is known by then."""

CHUNK_BYTES = 4 * 1024 * 1024
MIN_READ_BYTES = 16 * 1024 * 1024
"""A smaller file says nothing about the rate."""

COMMAND_LIMIT_S = 1.5
_F_NOCACHE = 48
"""Source: sys/fcntl.h of macOS."""

NEVER_INDEX = ".metadata_never_index"
"""A file of that name keeps Spotlight out of a folder."""


def read_folders(paths: Sequence[Path]) -> tuple[Folder, ...]:
    """The folders that hold these model files.

    Args:
        paths: Model files; the largest of each folder is read.
    """
    by_folder: dict[Path, Path] = {}
    for path in paths:
        # The hub's cache has links in one folder to files in another, on the same disk.
        try:
            real = path.resolve(strict=True)
        except OSError:
            continue
        if real.is_file():
            best = by_folder.get(path.parent)
            if best is None or real.stat().st_size > best.stat().st_size:
                by_folder[path.parent] = real
    mounts = mount_table()
    return tuple(_folder(folder, largest, mounts) for folder, largest in by_folder.items())


def _folder(folder: Path, largest: Path, mounts: Sequence[tuple[str, str]]) -> Folder:
    return Folder(
        path=str(folder),
        file_system=file_system_of(largest, mounts),
        is_indexed=is_indexed(folder),
        is_rotational=_is_rotational(largest),
        read_bytes_per_s=read_rate(largest),
    )


def mount_table() -> list[tuple[str, str]]:
    """(mount point, file system) of everything that is mounted."""
    if platform.system() == "Linux":
        return parse_mountinfo(read_text(Path("/proc/self/mountinfo")))
    return parse_mount(_output("/sbin/mount"))


def parse_mountinfo(text: str) -> list[tuple[str, str]]:
    """From /proc/self/mountinfo.

    Example:
        >>> parse_mountinfo("36 35 98:0 / /models rw - nfs4 box:/m rw")
        [('/models', 'nfs4')]
    """
    found = []
    for line in text.splitlines():
        before, separator, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if separator and len(fields) >= 5 and kind:
            found.append((fields[4].replace("\\040", " "), kind[0]))
    return found


def parse_mount(text: str) -> list[tuple[str, str]]:
    """From macOS's `mount`.

    Example:
        >>> parse_mount("//me@nas/m on /Volumes/m (smbfs, nodev, nosuid, mounted by me)")
        [('/Volumes/m', 'smbfs')]
    """
    found = []
    for line in text.splitlines():
        head, bracket, options = line.rpartition(" (")
        _, on, point = head.partition(" on ")
        if bracket and on:
            found.append((point, options.rstrip(")").split(",")[0].strip()))
    return found


def file_system_of(path: Path, mounts: Sequence[tuple[str, str]]) -> str:
    """The type of the file system that a path is on.

    Example:
        >>> mounts = [("/", "apfs"), ("/Volumes/m", "smbfs")]
        >>> file_system_of(Path("/Volumes/m/a.gguf"), mounts)
        'smbfs'
        >>> file_system_of(Path("/Volumes/more"), mounts)
        'apfs'
    """
    # Of two mounts on one point, the later one hides the other.
    holding = [m for m in mounts if path.is_relative_to(m[0])]
    return max(enumerate(holding), key=lambda m: (len(m[1][0]), m[0]))[1][1] if holding else ""


def is_indexed(folder: Path) -> bool | None:
    """Whether macOS's search reads a folder; None elsewhere, or where it does not say."""
    if platform.system() != "Darwin":
        return None
    if is_hidden_from_search(folder):
        return False
    return parse_mdutil(_output("/usr/bin/mdutil", "-s", str(folder)))


def is_hidden_from_search(folder: Path) -> bool:
    """Whether a folder, or one that it lies in, is marked or named so that it is passed over."""
    for part in (folder, *folder.parents):
        if part.name.startswith(".") or part.name.endswith(".noindex"):
            return True
        with contextlib.suppress(OSError):
            if (part / NEVER_INDEX).exists():
                return True
    return False


def parse_mdutil(text: str) -> bool | None:
    r"""What `mdutil -s` says of a volume.

    Example:
        >>> parse_mdutil("/:\n\tIndexing enabled. \n")
        True
        >>> parse_mdutil("Error: unknown indexing state.") is None
        True
    """
    if "Indexing enabled" in text:
        return True
    return False if "disabled" in text else None


def read_rate(path: Path) -> float | None:
    """Bytes a second of a read past the page cache; None where that cannot be measured."""
    flags = os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_DIRECT", 0)
    try:
        size = path.stat().st_size
        if size < MIN_READ_BYTES:
            return None
        descriptor = os.open(path, flags)
    except OSError:  # such as a file system that has no direct reads
        return None
    try:
        if platform.system() == "Darwin":
            fcntl.fcntl(descriptor, _F_NOCACHE, 1)
        elif not hasattr(os, "O_DIRECT"):
            return None
        return _timed_read(descriptor, size)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _timed_read(descriptor: int, size: int) -> float | None:
    """Read from the middle on, which nobody has read just before as they have the header."""
    num_chunks = size // CHUNK_BYTES
    offset, total = num_chunks // 2 * CHUNK_BYTES, 0
    with mmap.mmap(-1, CHUNK_BYTES) as buffer:  # aligned, as direct reads need
        begin_s = time.monotonic()
        while total < READ_BYTES and offset + CHUNK_BYTES <= size:
            total += os.preadv(descriptor, [buffer], offset)
            offset += CHUNK_BYTES
            if time.monotonic() - begin_s > READ_LIMIT_S:
                break
        took_s = time.monotonic() - begin_s
    return total / max(took_s, 1e-9) if total else None


def _is_rotational(path: Path) -> bool | None:
    """Whether Linux says that the disk turns."""
    try:
        device = path.stat().st_dev
    except OSError:
        return None
    link = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    for directory in (link, link.resolve().parent):  # a partition's queue is its disk's
        text = read_text(directory / "queue/rotational").strip()
        if text in ("0", "1"):
            return text == "1"
    return None


def _output(*words: str) -> str:
    """What a command prints, with its errors; empty where it cannot be run."""
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=COMMAND_LIMIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr
