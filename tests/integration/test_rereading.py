"""A program in a group smaller than the file that it maps: the kernel's own counts tell of it."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.cgroup import MIB, MemoryGroup, unavailable_reason

from brim.config.tree import GovernorSettings
from brim.core.machine import Conditions, Pressure
from brim.governor.counter_rates import CounterRates
from brim.governor.levels import Levels
from brim.governor.readings import Readings
from brim.machine.cgroup import Hierarchy
from brim.machine.file_system import is_in_memory
from brim.machine.linux_refaults import MajorFaults, refaulted_bytes

UNAVAILABLE = unavailable_reason()

pytestmark = pytest.mark.skipif(bool(UNAVAILABLE), reason=UNAVAILABLE)

LIMIT_S = 60.0
FILE_MIB = 192
NUM_ROUNDS = 2000

READ = """
import mmap, sys
with open(sys.argv[1], "rb") as file:
    weights = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
for _ in range(int(sys.argv[2])):
    sum(weights[::4096])
"""
"""Maps a file and touches all of it, again and again, as a model does for its tokens."""


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    if is_in_memory(tmp_path):
        pytest.skip("temporary files lie in memory here, so none can be read again from a disk")
    path = tmp_path / "weights"
    with path.open("wb") as file:
        for number in range(FILE_MIB):
            file.write(bytes([number]) * MIB)
        # Pages that stay are on our own account, and the group would have them for nothing.
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path


@contextlib.contextmanager
def reading(
    group: MemoryGroup, weights: Path, num_rounds: int
) -> Iterator[subprocess.Popen[bytes]]:
    """The program, a member of the group; it is ended with the context."""
    command = group.command([sys.executable, "-c", READ, str(weights), str(num_rounds)])
    with subprocess.Popen(command) as process:
        try:
            yield process
        finally:
            process.kill()


def levels_of(group: MemoryGroup, *, until: Callable[[Levels], bool]) -> Levels:
    """Where looks at a group lead."""
    faults, rates, levels = MajorFaults(), CounterRates(), Levels()
    hierarchy = Hierarchy(group.version, (group.path,))
    end_s = time.monotonic() + LIMIT_S
    while not until(levels):
        assert time.monotonic() < end_s, f"the level is {levels.memory.level} and stays"
        conditions = Conditions(
            refaulted_bytes=refaulted_bytes(Path("/"), [hierarchy], None).value,
            major_faults=faults.read(group.pids()).value,
        )
        at_s = time.monotonic()
        seen = rates.after(conditions, at_s)
        look = Readings(at_s=at_s, conditions=conditions, **seen._asdict())
        levels = levels.after(look, GovernorSettings())
        time.sleep(0.1)
    return levels


def test_mapped_weights_that_do_not_fit_are_seen_without_swap(weights: Path) -> None:
    """The counts of the real group raise the level to critical, and name what happens."""
    with (
        MemoryGroup(FILE_MIB * MIB // 2, name="reread") as group,
        reading(group, weights, 10**9),
    ):
        levels = levels_of(group, until=lambda levels: levels.memory.level is Pressure.CRITICAL)
    assert "weights are read from disk again" in levels.memory.cause


def test_weights_that_fit_are_read_once(weights: Path) -> None:
    """In a group that holds it, a file that is touched again and again raises nothing."""
    with (
        MemoryGroup(2 * FILE_MIB * MIB, name="read") as group,
        reading(group, weights, NUM_ROUNDS) as process,
    ):
        levels = levels_of(group, until=lambda _: process.poll() is not None)
        assert process.returncode == 0
    assert levels.memory.level is Pressure.NORMAL
