"""Linux behind the interface of every machine; `linux` and `linux_conditions` do the reading."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from brim.core.machine import Conditions, MachineSpec
from brim.machine import linux, linux_conditions
from brim.machine.process_memory import ProcessMemory


class LinuxMachine:
    """A Linux machine, read from its file tree.

    Args:
        root: Where /proc and /sys lie.
        own_pids: Processes whose memory and load are ours, asked at each reading.
        sleep: Waits between two readings of the processors.
    """

    def __init__(
        self,
        root: Path = Path("/"),
        *,
        own_pids: Callable[[], Sequence[int]] = tuple,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._root = root
        self._own_pids = own_pids
        self._sleep = sleep
        self._signals = linux_conditions.LinuxSignals(root, own_pids=own_pids)

    def read_machine(self) -> MachineSpec:
        """Memory and processors that this process may use.

        Raises:
            ConfigError: /proc/meminfo does not say how much memory there is and is free.
        """
        return linux.read_linux(self._root, own_pids=self._own_pids())

    def read_conditions(self) -> Conditions:
        """What the machine feels now, the processors watched for a quarter of a second."""
        return linux_conditions.read_linux_conditions(
            self._root, own_pids=self._own_pids(), sleep=self._sleep
        )

    def read_signals(self) -> Conditions:
        """What the machine feels, without a wait; throttling since the last call counts."""
        return self._signals.read()

    def process_memory(self, pid: int) -> ProcessMemory | None:
        """What /proc/PID/smaps_rollup says."""
        return linux.process_memory(pid, self._root)

    def resident_bytes(self, pid: int) -> int | None:
        """VmRSS of /proc/PID/status."""
        return linux.resident_bytes(pid, self._root)
