"""What is at hand to forecast speed from: this machine's calibration, or a probe of its memory."""

import functools

from brim.core.calibration import Calibration
from brim.core.machine import MachineSpec
from brim.core.plan import Plan
from brim.errors import ConfigError
from brim.machine.calibrations import Status, find_calibration

_known: dict[tuple[str, str, int], Calibration | None] = {}
"""By engine, machine and cores: a server plans many times, and on its event loop."""


def usable_calibration(engine: str, machine: MachineSpec) -> Calibration | None:
    """What was measured of this machine with an engine; None where nothing fits it.

    Read once in a process: a server keeps to what it started with.
    """
    if not machine.is_at_hand or machine.is_simulated:
        return None
    key = (engine, machine.name, machine.performance_cores)
    if key not in _known:
        _known[key] = _read(engine, machine)
    return _known[key]


def _read(engine: str, machine: MachineSpec) -> Calibration | None:
    try:
        stored = find_calibration(machine, engine)
    except ConfigError:  # an engine without a backend here
        return None
    return stored.calibration if stored.status is Status.GOOD else None


def speed_sources(plan: Plan, machine: MachineSpec) -> tuple[Calibration | None, float | None]:
    """A calibration, or where there is none and no table knows the chip, bandwidth by a probe.

    Returns:
        The calibration and bytes a second; at most one of them is not None.
    """
    calibration = usable_calibration(plan.engine, machine)
    if calibration is not None or not machine.is_at_hand or machine.chip is not None:
        return calibration, None
    return None, _probed_bytes_per_s(machine.performance_cores)


@functools.cache
def _probed_bytes_per_s(num_threads: int) -> float:
    """Takes about 0.3 s, once in a process."""
    from brim.machine.bandwidth import read_bandwidth  # numpy, which nothing else here needs

    (sample,) = read_bandwidth((num_threads,))
    return sample.bytes_per_s
