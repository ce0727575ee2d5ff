"""Tells at once when the system says that memory is short, so that nobody waits for the next look.

Notifications come beside polling and never instead of it: a system may have none, and none says
that pressure is over.
"""

import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

import msgspec

from brim.core.machine import Conditions, Pressure
from brim.machine.pressure_sources import Missing, PressureSource, open_sources
from brim.telemetry.events import log_event

MIN_INTERVAL_S = 0.1
"""Between two calls: a version 1 group under pressure signals for every 2 MiB that is scanned, and
ten looks a second are as many as anything can be done about."""

NUM_GROUP_SIGNALS = 8
GROUP_SIGNALS_S = 5.0
"""So many signals of a group in so long are a warning.  A group that thrashed had eight in one
second, one that only wrote a large file three or four in all.  macOS smooths the fall of its own
level for five seconds as well.
"""

JOIN_LIMIT_S = 5.0
"""For a callback to return; the thread is a daemon and ends with the process in any case."""

IN_FORCE = "in force"

Opener = Callable[[], Iterable[PressureSource | Missing]]


class PressureWatch:
    """Calls back, from a thread of its own, when the system signals pressure.

    Args:
        on_pressure: Called from the watch's thread, at most ten times a second.  With asyncio:
            `lambda: loop.call_soon_threadsafe(governor.wake)`.
        opened: Gives the sources.
        min_interval_s: Between two calls.
        clock: Of seconds.
    """

    def __init__(
        self,
        on_pressure: Callable[[], None],
        *,
        opened: Opener = open_sources,
        min_interval_s: float = MIN_INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._on_pressure = on_pressure
        self._opened = opened
        self._min_interval_s = min_interval_s
        self._clock = clock
        self._thread: threading.Thread | None = None
        self._in_force: dict[int, PressureSource] = {}
        self._left_out: dict[str, str] = {}
        self._group_signals_s: deque[float] = deque(maxlen=NUM_GROUP_SIGNALS)
        self._stop_read = self._stop_write = -1

    @property
    def sources(self) -> dict[str, str]:
        """Each source and `IN_FORCE`, or the reason why it is not."""
        in_force = {source.name: IN_FORCE for source in tuple(self._in_force.values())}
        return {**in_force, **self._left_out}

    @property
    def is_watching(self) -> bool:
        """Whether any source is in force."""
        return bool(self._in_force)

    def start(self) -> None:
        """Open the sources, and watch them if there are any; again does nothing."""
        if self._thread is not None:
            return
        self._left_out.clear()
        for source in self._opened():
            if isinstance(source, Missing):
                self._left_out[source.name] = source.reason
            else:
                self._in_force[source.fileno()] = source
        if not self._in_force:
            return
        self._stop_read, self._stop_write = os.pipe()
        self._thread = threading.Thread(target=self._run, name="brim-pressure-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread and give the descriptors back; again does nothing."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        os.write(self._stop_write, b"x")
        thread.join(JOIN_LIMIT_S)
        if thread.is_alive():  # its callback hangs; descriptors that it polls must stay
            return
        for source in self._in_force.values():
            source.close()
        self._in_force.clear()
        os.close(self._stop_read)
        os.close(self._stop_write)

    def completed(self, conditions: Conditions) -> Conditions:
        """Conditions with a level of pressure where there is none to read but a group signals.

        A warning at most: such signals say that reclaim is hard, not that it fails.
        """
        has_group = any(source.is_group for source in tuple(self._in_force.values()))
        if conditions.is_simulated or conditions.pressure is not None or not has_group:
            return conditions
        times_s, now_s = tuple(self._group_signals_s), self._clock()
        is_short = len(times_s) == NUM_GROUP_SIGNALS and now_s - times_s[0] < GROUP_SIGNALS_S
        return msgspec.structs.replace(
            conditions,
            pressure=Pressure.WARNING if is_short else Pressure.NORMAL,
            sources={**conditions.sources, "pressure": "memory.pressure_level of our groups"},
        )

    def _run(self) -> None:
        poll, stop = select.poll(), select.poll()
        poll.register(self._stop_read, select.POLLIN)
        stop.register(self._stop_read, select.POLLIN)
        for descriptor, source in self._in_force.items():
            poll.register(descriptor, source.poll_mask)
        while True:
            ready = dict(poll.poll())
            if self._stop_read in ready:
                return
            if self._take(poll, ready):
                self._call()
            if stop.poll(1000 * self._min_interval_s):
                return

    def _take(self, poll: select.poll, ready: dict[int, int]) -> bool:
        """Take the signals; whether there was one."""
        is_signalled = False
        for descriptor, mask in ready.items():
            source = self._in_force[descriptor]
            try:
                if mask & (select.POLLERR | select.POLLHUP | select.POLLNVAL):
                    raise OSError("the system has ended it")
                source.take()
            except OSError as exc:
                self._drop(poll, descriptor, exc)
                continue
            is_signalled = True
            if source.is_group:
                self._group_signals_s.append(self._clock())
        return is_signalled

    def _drop(self, poll: select.poll, descriptor: int, exc: OSError) -> None:
        """Leave out a source that is gone, such as that of a group that was removed."""
        poll.unregister(descriptor)
        source = self._in_force[descriptor]
        # The reason first: whoever asks from another thread finds the source in one or the other.
        self._left_out[source.name] = exc.strerror or str(exc)
        del self._in_force[descriptor]
        source.close()

    def _call(self) -> None:
        try:
            self._on_pressure()
        except Exception as exc:  # whatever it is, the next signal may go through
            log_event("pressure_callback_failed", reason=exc)
