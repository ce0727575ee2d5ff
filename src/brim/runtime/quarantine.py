"""When a model that failed again and again may be tried once more."""

import math
import time
from collections.abc import Callable

FIRST_WAIT_S = 300.0
"""What makes a model fail in a row is mostly memory that others took, and people close programs in
minutes; a load that fails costs others their place, so it is tried no sooner."""

MAX_WAIT_S = 3600.0
"""Doubled with each trial that fails, up to this: a damaged file costs one load an hour."""


class Quarantine:
    """Whether one model is kept out, over all its workers, and until when.

    Args:
        clock: Seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._num_times = 0
        self._due_s = -math.inf
        self.is_on = False
        """Whether its requests are refused, or begin the trial once that is due."""

    @property
    def is_due(self) -> bool:
        """Whether the next request may have it tried."""
        return self.is_on and self._clock() >= self._due_s

    @property
    def is_trial(self) -> bool:
        """Whether it was let out and has not answered since: one more failure puts it back."""
        return self._num_times > 0 and not self.is_on

    @property
    def left_s(self) -> float:
        """Until a trial is due; 0 where it is."""
        return max(0.0, self._due_s - self._clock())

    def begin(self) -> None:
        """Keep it out: at first for minutes, after each trial that fails for twice as long."""
        wait_s = min(FIRST_WAIT_S * 2**self._num_times, MAX_WAIT_S)
        # Beyond the longest wait there is nothing to count.
        self._num_times += wait_s < MAX_WAIT_S or not self._num_times
        self._due_s, self.is_on = self._clock() + wait_s, True

    def lift(self) -> None:
        """Let it be tried."""
        self.is_on = False

    def forget(self) -> None:
        """It has answered: what was before does not count any more."""
        self._num_times = 0

    def words(self) -> str:
        """When it is tried again, for people.

        Example:
            >>> quarantine = Quarantine(clock=lambda: 0.0)
            >>> quarantine.begin()
            >>> quarantine.words()
            'the first request in 5 min or later tries it once more'
        """
        left_s = self.left_s
        if not left_s:
            return "its next request tries it once more"
        left = f"{math.ceil(left_s)} s" if left_s < 100 else f"{math.ceil(left_s / 60)} min"
        return f"the first request in {left} or later tries it once more"
