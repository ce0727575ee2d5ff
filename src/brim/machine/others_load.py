"""How busy other programs keep the processors while something is measured."""

import time
from collections.abc import Callable, Sequence

import psutil


class OthersLoad:
    """Watches from its making on; processes named as ours must live through the watch."""

    def __init__(
        self, own_pids: Sequence[int], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Begin to watch.

        Args:
            own_pids: Processes whose work is not others'.
            clock: Of seconds.
        """
        self._own_pids, self._clock = tuple(own_pids), clock
        self._begin_s, self._before_s = clock(), self._others_s()

    def busy_fraction(self) -> float:
        """Share of all processors that others kept busy since the watch began, 0 to 1."""
        elapsed_s = max(self._clock() - self._begin_s, 1e-3) * (psutil.cpu_count() or 1)
        return min(1.0, max(0.0, self._others_s() - self._before_s) / elapsed_s)

    def _others_s(self) -> float:
        """CPU time of everybody else since boot."""
        times = psutil.cpu_times()
        # A guest's time is part of `user`; time that the host took away is lost to us as well.
        busy = times.user + times.system + getattr(times, "nice", 0.0)
        busy += sum(getattr(times, name, 0.0) for name in ("irq", "softirq", "steal"))
        return float(busy) - sum(_own_s(pid) for pid in self._own_pids)


def _own_s(pid: int) -> float:
    """CPU time of one process; 0 where it has ended."""
    try:
        spent = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return 0.0
    return float(spent.user + spent.system)
