"""How long a worker rests between steps, so that they take a given share of the time."""

import time
from collections.abc import Callable

LEAST_FRACTION = 0.05
"""Less would rest for a minute after a long prompt's step, and look like a hang."""


class Pacing:
    """Counts the rest that a step is owed.

    Args:
        clock: Seconds; only differences count.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._fraction = 1.0
        self._began_s = 0.0
        self._ended_s = 0.0

    def limit(self, fraction: float) -> None:
        """Have steps take this share of the time, from the one that has just ended on."""
        self._fraction = min(1.0, max(LEAST_FRACTION, fraction))

    def begin(self) -> None:
        """Note that a step begins."""
        self._began_s = self._clock()

    def end(self) -> None:
        """Note that it has ended."""
        self._ended_s = self._clock()

    @property
    def rest_s(self) -> float:
        """Seconds that are left of the last step's rest; 0 or less where there are none."""
        if self._fraction == 1.0:
            return 0.0
        owed_s = (self._ended_s - self._began_s) * (1 / self._fraction - 1)
        return self._ended_s + owed_s - self._clock()
