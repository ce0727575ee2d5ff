"""Tells the gateway how far loading is, seldom enough to cost nothing."""

import time
from collections.abc import Callable

from brim.worker.protocol import LoadProgress

PERIOD_S = 0.1
"""Between two reports: a bar that moves ten times a second looks steady."""


class ProgressReports:
    """Sends `LoadProgress`, always rising, to whoever waits.

    Args:
        send: Takes a frame.
        clock: Seconds; only differences count.
    """

    def __init__(
        self, send: Callable[[LoadProgress], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._send = send
        self._clock = clock
        self._told = 0.0
        self._told_s = -PERIOD_S

    def __call__(self, fraction: float) -> None:
        """Report that this share of the loading is done."""
        now_s, fraction = self._clock(), min(fraction, 1.0)
        if fraction > self._told and now_s - self._told_s >= PERIOD_S:
            self._told, self._told_s = fraction, now_s
            self._send(LoadProgress(fraction))
