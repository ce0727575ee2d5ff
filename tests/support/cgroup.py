"""A control group that limits the memory of a tree of processes, with swap that is made for it.

For tests and benches that need real pressure: root, Linux, and a memory controller, version 1 or 2.
`unavailable_reason` says what is missing.  Whatever is still in a group when it is closed is ended.
"""

import contextlib
import errno
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Self

from brim.machine.cgroup import Hierarchy, hierarchies
from brim.machine.reading import machine_at_hand

CLOSE_LIMIT_S = 5.0
"""For the kernel to reap what was killed; a group with members cannot be removed."""

MIB = 2**20

JOIN = """
import ctypes, os, sys
open(sys.argv[1], "w").write(str(os.getpid()))
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)
os.execvp(sys.argv[2], sys.argv[2:])
"""
"""Joins the group before the program begins, so that its children are in it too.

41 is PR_SET_THP_DISABLE.  Linux 6.12 and later take pages of zeros back out of huge pages, and so
an unused KV pool would weigh nothing under pressure; one that conversations have filled does, and
without huge pages so does ours.  Source: Documentation/admin-guide/mm/transhuge.rst.
"""


class Usage(NamedTuple):
    """One look at a group, members below it included; counters since it was made."""

    used_bytes: int
    peak_bytes: int
    swap_bytes: int
    num_oom_kills: int
    num_limit_hits: int
    """Times that an allocation met the limit and memory had to be reclaimed for it."""
    num_major_faults: int
    """Pages that were waited for: from swap, or of files that were reclaimed."""


class _Files(NamedTuple):
    """What a version calls its files."""

    limit: str
    used: str
    peak: str


_FILES = {
    1: _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.max_usage_in_bytes"),
    2: _Files("memory.max", "memory.current", "memory.peak"),
}


def unavailable_reason(*, with_swap: bool = False, needs_bytes: int = 0) -> str:
    """Why no group can be made here, or used; empty where one can.

    Args:
        with_swap: A swap file is needed too; a small one is tried out.
        needs_bytes: Memory that must be free: a group's limit promises none.
    """
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "limiting memory needs root"
    parent = _parent()
    if parent is None:
        return "no memory controller of control groups can be written here"
    if with_swap and any(shutil.which(program) is None for program in ("mkswap", "swapon")):
        return "mkswap and swapon are not installed"
    available_bytes = machine_at_hand().read_signals().available_bytes
    if needs_bytes and (available_bytes is None or available_bytes < needs_bytes):
        return f"less than {needs_bytes / 1e9:.1f} GB of memory are free"
    return _no_swap_reason() if with_swap else ""


@functools.cache
def _no_swap_reason() -> str:
    """Why no swap file can be used here; empty where one was."""
    try:
        with swap_file(16 * MIB):
            return ""
    except OSError as exc:
        return f"no swap file can be used here ({exc})"


def _parent() -> tuple[int, Path] | None:
    """(version, directory) below which a group can be made: our own, or the nearest above it.

    In version 2 a group with members may not hand a controller to groups below it, so the nearest
    that does is taken.
    """
    for hierarchy in sorted(hierarchies("memory"), key=_version):
        for directory in hierarchy.directories:
            if not os.access(directory, os.W_OK):
                continue
            if hierarchy.version == 1:
                return 1, directory
            handed_on = directory / "cgroup.subtree_control"
            if handed_on.exists() and "memory" in handed_on.read_text().split():
                return 2, directory
    return None


def _version(hierarchy: Hierarchy) -> int:
    return hierarchy.version


class MemoryGroup:
    """A group with a limit; use it as a context manager.

    Args:
        limit_bytes: Most memory of all members together, page cache included.
        swap_bytes: What they may have in swap beyond it.
        name: Of its directory, which begins with 'brim-'.
    """

    def __init__(self, limit_bytes: int, *, swap_bytes: int = 0, name: str = "test") -> None:
        found = _parent()
        assert found is not None, unavailable_reason()
        self.version, parent = found
        self.path = parent / f"brim-{name}-{os.getpid()}-{time.monotonic_ns()}"
        self.limit_bytes = limit_bytes
        self._files = _FILES[self.version]
        self._swap_bytes = swap_bytes

    def __enter__(self) -> Self:
        self.path.mkdir()
        try:
            self._write(self._files.limit, self.limit_bytes)
            if self.version == 1:
                # Where the kernel does not account for swap there is no such file.
                self._write_where_possible(
                    "memory.memsw.limit_in_bytes", self.limit_bytes + self._swap_bytes
                )
            else:
                self._write_where_possible("memory.swap.max", self._swap_bytes)
        except BaseException:
            self.path.rmdir()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        deadline_s = time.monotonic() + CLOSE_LIMIT_S
        while True:
            for pid in self.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            try:
                self.path.rmdir()
            except OSError as exc:
                if exc.errno != errno.EBUSY or time.monotonic() > deadline_s:
                    raise
                time.sleep(0.02)
            else:
                return

    def command(self, command: Sequence[str]) -> list[str]:
        """The command line of a program that is a member from its first instruction on."""
        return [sys.executable, "-c", JOIN, str(self.path / "cgroup.procs"), *command]

    def pids(self) -> list[int]:
        """Its members."""
        try:
            return [int(line) for line in (self.path / "cgroup.procs").read_text().split()]
        except OSError:
            return []

    def usage(self) -> Usage:
        """How much it uses, and how often it was in need."""
        stat = self._pairs("memory.stat")
        if self.version == 1:
            return Usage(
                used_bytes=self._number(self._files.used),
                peak_bytes=self._number(self._files.peak),
                swap_bytes=stat.get("total_swap", 0),
                num_oom_kills=self._pairs("memory.oom_control").get("oom_kill", 0),
                num_limit_hits=self._number("memory.failcnt"),
                num_major_faults=stat["total_pgmajfault"],
            )
        events = self._pairs("memory.events")
        return Usage(
            used_bytes=self._number(self._files.used),
            peak_bytes=self._number(self._files.peak),
            swap_bytes=self._number("memory.swap.current"),
            num_oom_kills=events.get("oom_kill", 0),
            num_limit_hits=events.get("max", 0),
            num_major_faults=stat["pgmajfault"],
        )

    def _write(self, name: str, value: int) -> None:
        (self.path / name).write_text(f"{value}\n")

    def _write_where_possible(self, name: str, value: int) -> None:
        with contextlib.suppress(FileNotFoundError, PermissionError):
            self._write(name, value)

    def _number(self, name: str) -> int:
        """A counter; 0 where this kernel does not keep it."""
        try:
            return int((self.path / name).read_text())
        except FileNotFoundError:
            return 0

    def _pairs(self, name: str) -> dict[str, int]:
        words = (line.split() for line in (self.path / name).read_text().splitlines())
        return {pair[0]: int(pair[1]) for pair in words if len(pair) == 2}


@contextlib.contextmanager
def swap_file(num_bytes: int, directory: Path | None = None) -> Iterator[Path]:
    """A swap file of the whole machine while the context lasts.

    Args:
        num_bytes: Its size.
        directory: Where it lies; on a file system that can hold one.

    Raises:
        OSError: The file system, or this container, does not let us.
    """
    descriptor, name = tempfile.mkstemp(prefix="brim-swap-", dir=directory)
    path = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), 0o600)
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        _run("mkswap", name)
        _run("swapon", name)
        try:
            yield path
        finally:
            _run("swapoff", name)
    finally:
        path.unlink()


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{command[0]} failed: {done.stderr.strip()}")
