"""One reading of the machine that runs the tests."""

import os

from brim.machine.process import resident_bytes
from brim.machine.reading import own_pids, read_machine


def test_reading_of_this_machine() -> None:
    """The machine has RAM, others use less than all of it, and there is a core to run on."""
    spec = read_machine()
    assert spec.ram_bytes > 2**28
    assert 0 <= spec.others_bytes < spec.ram_bytes
    assert spec.performance_cores >= 1
    assert set(spec.sources) == {
        "ram_bytes", "others_bytes", "gpu_limit_bytes", "performance_cores",
    }  # fmt: skip


def test_own_processes_include_this_one() -> None:
    """Our own processes are at least this one, and it is resident."""
    assert os.getpid() in own_pids()
    assert (resident_bytes(os.getpid()) or 0) > 0
