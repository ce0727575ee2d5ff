"""What every machine answers: this one on Linux, this one on macOS, or a simulated one."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from brim.core.machine import Conditions, MachineSpec
from brim.machine.process_memory import ProcessMemory


class Machine(Protocol):
    """Where readings come from.  What a system does not say is None, and `sources` says why."""

    def read_machine(self) -> MachineSpec:
        """What the machine is, and what others use now; our own processes are not others.

        Raises:
            ConfigError: Memory in use cannot be read, so that nothing may be promised.
        """
        ...

    def read_conditions(self) -> Conditions:
        """What the machine feels now; never fails, and may take as long as its window."""
        ...

    def read_signals(self) -> Conditions:
        """The part of it that answers at once, for whoever asks every second; never fails.

        It waits for nothing and runs no command: a few milliseconds.  The load of others is left
        out.
        """
        ...

    def process_memory(self, pid: int) -> ProcessMemory | None:
        """What a process holds; None where it is gone or not ours to read."""
        ...

    def resident_bytes(self, pid: int) -> int | None:
        """What a process has in RAM; cheap enough to be asked every few seconds."""
        ...


class Reading(NamedTuple):
    """One figure and its source, or None and the reason."""

    value: Any
    source: str


def conditions_of(readings: Mapping[str, Reading]) -> Conditions:
    """The value that named readings make.

    Example:
        >>> conditions_of({"is_on_battery": Reading(False, "pmset")}).sources
        {'is_on_battery': 'pmset'}
    """
    values = {name: reading.value for name, reading in readings.items()}
    return Conditions(**values, sources={name: r.source for name, r in readings.items()})
