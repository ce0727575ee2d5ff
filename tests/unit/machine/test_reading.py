"""One reading of the machine that runs the tests."""

import os

from brim.core.machine import MachineSpec
from brim.machine.process import process_memory, resident_bytes
from brim.machine.reading import own_pids, read_machine

ABOUT_ITSELF = {"name", "system", "is_at_hand", "is_simulated", "sources"}


def test_reading_of_this_machine() -> None:
    """The machine has RAM, others use less than all of it, and every figure has a source."""
    spec = read_machine()
    assert spec.ram_bytes > 2**28
    assert 0 <= spec.others_bytes < spec.ram_bytes
    assert spec.performance_cores >= 1
    assert spec.is_at_hand
    assert set(spec.sources) == set(MachineSpec.__struct_fields__) - ABOUT_ITSELF


def test_own_processes_include_this_one() -> None:
    """Our own processes are at least this one, and it is resident."""
    assert os.getpid() in own_pids()
    assert (resident_bytes(os.getpid()) or 0) > 0
    assert process_memory(2**22 + 1) is None
