"""From counters since boot to bytes a second.  Pure."""

from brim.core.machine import Conditions

MIN_SPAN_S = 0.5
"""Counters move in bursts: over less, one burst is a rate of its own."""


class SwapRates:
    """Remembers the last counters; gives rates in and out, None where they are not known."""

    def __init__(self) -> None:
        self._at_s: float | None = None
        self._counts: tuple[int | None, int | None] = (None, None)
        self._rates: tuple[float | None, float | None] = (None, None)

    def after(self, conditions: Conditions, at_s: float) -> tuple[float | None, float | None]:
        """The rates by one more reading.

        Example:
            >>> rates = SwapRates()
            >>> rates.after(Conditions(swapped_out_bytes=1000), 1.0)
            (None, None)
            >>> rates.after(Conditions(swapped_out_bytes=5000), 3.0)
            (None, 2000.0)
        """
        counts = (conditions.swapped_in_bytes, conditions.swapped_out_bytes)
        if self._at_s is None:
            self._at_s, self._counts = at_s, counts
            return self._rates
        span_s = at_s - self._at_s
        if span_s < MIN_SPAN_S:
            return self._rates
        before_in, before_out = self._counts
        self._rates = (_rate(before_in, counts[0], span_s), _rate(before_out, counts[1], span_s))
        self._at_s, self._counts = at_s, counts
        return self._rates


def _rate(before: int | None, now: int | None, span_s: float) -> float | None:
    """None where a counter is missing, or ran backwards: then it is another counter."""
    if before is None or now is None or now < before:
        return None
    return (now - before) / span_s
