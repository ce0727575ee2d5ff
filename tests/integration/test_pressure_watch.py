"""Pressure as this kernel signals it: a real control group of version 1, and real PSI triggers."""

import contextlib
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from brim.core.machine import Conditions, Pressure
from brim.machine.cgroup import hierarchies, memory_group
from brim.machine.pressure_sources import GroupPressure, StallTrigger
from brim.machine.pressure_watch import IN_FORCE, NUM_GROUP_SIGNALS, PressureWatch

MIB = 1024**2
LIMIT_BYTES = 64 * MIB
WAIT_S = 60.0

FILL = """
import os, sys
from pathlib import Path
(Path(sys.argv[1]) / "cgroup.procs").write_text(str(os.getpid()))
held = []
while True:
    held.append(b"x" * 1024**2)
"""
"""Takes what it can.  Anonymous memory, so that no disk decides when signals come."""


@pytest.fixture
def group() -> Iterator[Path]:
    """A memory group of version 1 with a limit, empty."""
    tops = [found.directories[-1] for found in hierarchies("memory") if found.version == 1]
    if not tops:
        pytest.skip("this machine has no memory groups of version 1")
    path = tops[0] / f"brim-test-{uuid.uuid4().hex}"
    try:
        path.mkdir()
    except OSError as exc:
        pytest.skip(f"memory groups cannot be made here ({exc.strerror}); that takes root")
    try:
        for name in ("memory.pressure_level", "memory.oom_control"):
            if not (path / name).exists():
                pytest.skip(f"this kernel's groups have no {name}")
        (path / "memory.limit_in_bytes").write_text(str(LIMIT_BYTES))
        # Who finds nothing to reclaim waits until there is room, instead of being killed.
        (path / "memory.oom_control").write_text("1")
        yield path
    finally:
        if path.exists():
            path.rmdir()


class Signals:
    """Counts the calls of a watch."""

    def __init__(self) -> None:
        self._come = threading.Semaphore(0)

    def __call__(self) -> None:
        self._come.release()

    def wait(self) -> None:
        assert self._come.acquire(timeout=WAIT_S), "no signal came"


def descriptors() -> set[str]:
    """Those of this process; what earlier tests left open may be collected at any time."""
    return {path.name for path in Path("/dev/fd").iterdir()}


@contextlib.contextmanager
def watching(watch: PressureWatch) -> Iterator[None]:
    """Start a watch, and close it whatever happens."""
    watch.start()
    try:
        yield
    finally:
        watch.close()


@contextlib.contextmanager
def filling(group: Path) -> Iterator[None]:
    """A process in the group that takes all that the limit gives it, and waits for more."""
    with subprocess.Popen([sys.executable, "-S", "-c", FILL, str(group)]) as child:
        try:
            yield
        finally:
            child.kill()


def test_a_group_at_its_limit_is_noticed(group: Path) -> None:
    """Each time that a group meets its limit there is a signal; many are a warning."""
    signals, limit_bytes = Signals(), LIMIT_BYTES
    # With a clock that stands still: signals come as fast as a busy machine lets them.
    watch = PressureWatch(signals, opened=lambda: [GroupPressure(group)], clock=lambda: 0.0)
    with watching(watch):
        assert watch.completed(Conditions()).pressure is Pressure.NORMAL
        with filling(group):
            for _ in range(NUM_GROUP_SIGNALS):
                signals.wait()
                found = memory_group(group, 1)
                limit_bytes += 4 * MIB
                (group / "memory.limit_in_bytes").write_text(str(limit_bytes))
        assert watch.completed(Conditions()).pressure is Pressure.WARNING
    assert found is not None
    assert found.limit_bytes == limit_bytes - 4 * MIB
    assert found.available_bytes() < 4 * MIB


def test_a_neighbours_limit_is_not_ours(group: Path) -> None:
    """A group at its own limit, which nobody watches, signals nothing to the group above it."""
    above = GroupPressure(group.parent)
    with filling(group):
        while "under_oom 1" not in (group / "memory.oom_control").read_text():
            pass
    with pytest.raises(BlockingIOError):
        above.take()
    above.close()


def test_a_group_that_is_removed_is_left_out(group: Path) -> None:
    """Its removal is an event: the watch goes on without it and says what became of it."""
    signals, kept = Signals(), GroupPressure(group.parent)
    watch = PressureWatch(signals, opened=lambda: [GroupPressure(group), kept])
    name = GroupPressure.name_of(group)
    with watching(watch):
        assert watch.sources[name] == IN_FORCE
        group.rmdir()
        while watch.sources[name] == IN_FORCE:
            pass
        assert watch.sources == {kept.name: IN_FORCE, name: f"{group} was removed"}


def test_stall_triggers_open_and_close() -> None:
    """The kernel takes the trigger without root's window, and closing gives the file back."""
    path = Path("/proc/pressure/memory")
    if not path.exists():
        pytest.skip("this kernel does not measure stalls")
    before = descriptors()
    try:
        watch = PressureWatch(lambda: None, opened=lambda: [StallTrigger(path)])
        watch.start()
    except OSError as exc:
        pytest.skip(f"stall triggers are not for us here ({exc.strerror})")
    assert watch.sources == {f"stalls, {path}": IN_FORCE}
    watch.close()
    assert descriptors() <= before


def test_this_machine_is_watched() -> None:
    """Whatever this system signals by is opened and closed, or says why not."""
    before = descriptors()
    for _ in range(20):
        watch = PressureWatch(lambda: None)
        watch.start()
        assert watch.sources
        watch.close()
    assert descriptors() <= before
