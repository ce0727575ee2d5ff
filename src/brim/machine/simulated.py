"""A machine that goes through a scenario: the same questions, answered from a file.

Whatever it gives is marked as simulated, in `is_simulated`, in the name and in every source.
"""

from collections.abc import Callable

import msgspec

from brim.core.machine import Conditions, MachineSpec
from brim.machine.interface import Machine, Reading, conditions_of
from brim.machine.process_memory import ProcessMemory
from brim.machine.scenario import Scenario, ScenarioProcess

_NOT_READINGS = frozenset({"is_simulated", "sources"})


class SimulatedMachine:
    """A machine of the chip table, driven by a scenario.

    Args:
        scenario: What happens.
        now_s: Seconds since the scenario began; a constant function stops time.
        behind: Answers for processes that the scenario does not name, such as real workers.
    """

    def __init__(
        self, scenario: Scenario, now_s: Callable[[], float], *, behind: Machine | None = None
    ) -> None:
        self._scenario = scenario
        self._now_s = now_s
        self._behind = behind

    def read_machine(self) -> MachineSpec:
        """The machine with what others use at this moment of the scenario."""
        idle, seconds = self._scenario.machine, self._now_s()
        others = self._scenario.value_at("others_bytes", seconds)
        others_bytes = idle.others_bytes if others is None else others[0]
        processes_bytes = sum(process.dirty_bytes for process in self._processes(seconds))
        sources = {name: f"simulated: {source}" for name, source in idle.sources.items()}
        if others is not None or processes_bytes:
            sources["others_bytes"] = f"simulated: {self._scenario.where} at {seconds:g} s"
        return msgspec.structs.replace(
            idle,
            name=f"simulated {idle.name}",
            others_bytes=others_bytes + processes_bytes,
            is_simulated=True,
            sources=sources,
        )

    def read_conditions(self) -> Conditions:
        """What the scenario says that the machine feels at this moment."""
        seconds = self._now_s()
        fields = [name for name in Conditions.__struct_fields__ if name not in _NOT_READINGS]
        readings = {name: self._reading(name, seconds) for name in fields}
        return msgspec.structs.replace(conditions_of(readings), is_simulated=True)

    def read_signals(self) -> Conditions:
        """As `read_conditions`, which takes no time here."""
        return self.read_conditions()

    def process_memory(self, pid: int) -> ProcessMemory | None:
        """What the scenario gives the process at this moment."""
        for process in self._processes(self._now_s()):
            if process.pid == pid:
                return ProcessMemory(
                    dirty_bytes=process.dirty_bytes,
                    resident_bytes=process.resident_bytes,
                    file_bytes=process.file_bytes,
                )
        return None if self._behind is None else self._behind.process_memory(pid)

    def resident_bytes(self, pid: int) -> int | None:
        """The resident part of `process_memory`."""
        memory = self.process_memory(pid)
        return None if memory is None else memory.resident_bytes

    def _processes(self, seconds: float) -> tuple[ScenarioProcess, ...]:
        found = self._scenario.value_at("process", seconds)
        return () if found is None else found[0]

    def _reading(self, name: str, seconds: float) -> Reading:
        found = self._scenario.value_at(name, seconds)
        if found is None:
            return Reading(None, f"simulated: {self._scenario.where} does not say")
        value, since_s = found
        return Reading(value, f"simulated: {self._scenario.where}, step at {since_s:g} s")
