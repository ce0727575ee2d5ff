"""Control groups, version 1 and 2: the bounds that a container or a service puts on us.

A process is bound by its own group and by every group above it, so each question walks up to the
mount point.  Source: https://docs.kernel.org/admin-guide/cgroup-v2.html and cgroup-v1/memory.html
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple


class MemoryGroup(NamedTuple):
    """A control group that bounds memory, and what its members use."""

    limit_bytes: int
    used_bytes: int
    active_file_bytes: int
    inactive_file_bytes: int
    source: str
    mapped_file_bytes: int = 0
    """File pages that some process has mapped, such as a model's weights."""

    def available_bytes(self) -> int:
        """What its members may still take before it reclaims something that is in use.

        File pages go first when the group is full, whichever list they are on, unwritten ones
        after a wait for the disk.  Those that are mapped do not count: they are weights that a
        model reads for every token.
        """
        files = self.active_file_bytes + self.inactive_file_bytes
        spare = max(0, files - self.mapped_file_bytes)
        return max(0, self.limit_bytes - self.used_bytes + spare)


class CpuQuota(NamedTuple):
    """Processors' worth of time that a group may use."""

    num_cpus: float
    source: str


class Hierarchy(NamedTuple):
    """Where one controller's groups of this process are."""

    version: int
    directories: tuple[Path, ...]
    """Our group first, then each one above it up to the mount point."""


def memory_groups(root: Path = Path("/")) -> list[MemoryGroup]:
    """Every group with a limit that this process is in, innermost first."""
    return [
        group
        for hierarchy in hierarchies("memory", root)
        for directory in hierarchy.directories
        if (group := memory_group(directory, hierarchy.version)) is not None
    ]


def memory_group(
    directory: Path, version: int, *, below_bytes: int | None = None
) -> MemoryGroup | None:
    """One group; None where it has no limit.

    Args:
        directory: Of the group.
        version: Of its hierarchy.
        below_bytes: A limit from here on is none: version 1 writes 2^63 where there is none.
    """
    # Above `high` a group's members are slowed down until it has reclaimed: no place to plan for.
    limit_names, used_name = ["memory.max", "memory.high"], "memory.current"
    prefix, mapped = "", "file_mapped"
    if version == 1:
        limit_names, used_name = ["memory.limit_in_bytes"], "memory.usage_in_bytes"
        # The total_ fields include the groups below, as usage_in_bytes does.
        prefix, mapped = "total_", "mapped_file"
    limits = [(n, name) for name in limit_names if (n := _number(directory / name)) is not None]
    limit, limit_name = min(limits, default=(None, ""))
    if limit is None or (below_bytes is not None and limit >= below_bytes):
        return None
    used = _number(directory / used_name)
    if used is None:
        return None
    stat = parse_pairs(read_text(directory / "memory.stat"))

    def bytes_of(name: str) -> int:
        return stat.get(prefix + name, 0)

    return MemoryGroup(
        limit,
        used,
        bytes_of("active_file"),
        bytes_of("inactive_file"),
        str(directory / limit_name),
        bytes_of(mapped),
    )


def cpu_quota(root: Path = Path("/")) -> CpuQuota | None:
    """The smallest bound on processor time over all groups; None where there is none."""
    found = []
    for hierarchy in hierarchies("cpu", root):
        for directory in hierarchy.directories:
            if hierarchy.version == 2:
                path = directory / "cpu.max"
                words = read_text(path).split()
                quota, period = words if len(words) == 2 else ("max", "0")
            else:
                path = directory / "cpu.cfs_quota_us"
                quota = read_text(path).strip()
                period = read_text(directory / "cpu.cfs_period_us").strip()
            # 'max' and -1 mean none.
            if quota.isdigit() and period.isdigit() and int(period):
                found.append(CpuQuota(int(quota) / int(period), str(path)))
    return min(found, default=None)


def hierarchies(controller: str, root: Path = Path("/")) -> Iterator[Hierarchy]:
    """The version 2 hierarchy, and the version 1 one of the controller, as far as mounted."""
    mounts = list(_mounts(root))
    for line in read_text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        version = 2 if number == "0" and not controllers else 1
        if version == 1 and controller not in controllers.split(","):
            continue
        for kind, options, mounted, mount_point in mounts:
            if kind == "cgroup2" if version == 2 else controller in options:
                yield Hierarchy(version, tuple(_upwards(root, mount_point, mounted, group)))
                break


def _mounts(root: Path) -> Iterator[tuple[str, list[str], str, str]]:
    """(file system, its options, root of the mount, mount point) of every cgroup mount."""
    for line in read_text(root / "proc/self/mountinfo").splitlines():
        before, separator, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if separator and len(fields) >= 5 and len(kind) >= 3 and kind[0].startswith("cgroup"):
            yield kind[0], kind[2].split(","), fields[3], fields[4]


def _upwards(root: Path, mount_point: str, mounted: str, group: str) -> Iterator[Path]:
    """The group's directory and all above it.

    In a container the mount shows a part of the tree only (`mounted`), and the group's path may
    name what lies outside: then the mount point itself is the innermost group that can be seen.
    """
    top = root / mount_point.lstrip("/")
    try:
        below = PurePosixPath(group).relative_to(mounted)
    except ValueError:
        below = PurePosixPath()
    if ".." in below.parts:
        below = PurePosixPath()
    for depth in range(len(below.parts), 0, -1):
        directory = top.joinpath(*below.parts[:depth])
        if directory.is_dir():
            yield directory
    yield top


def _number(path: Path) -> int | None:
    text = read_text(path).strip()
    return int(text) if text.isdigit() else None


def parse_pairs(text: str) -> dict[str, int]:
    r"""Values by name from lines such as 'inactive_file 4096'.

    Example:
        >>> parse_pairs("pswpin 3\npswpout 5")
        {'pswpin': 3, 'pswpout': 5}
    """
    words = [line.split() for line in text.splitlines()]
    return {pair[0]: int(pair[1]) for pair in words if len(pair) == 2 and pair[1].isdigit()}


def read_text(path: Path) -> str:
    """A file's text, empty where there is none; bytes beyond ASCII, which no figure has, go."""
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
