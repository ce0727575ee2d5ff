"""From counters of swap, and of what is read again without it, to rates a second.  Pure."""

from typing import NamedTuple

from brim.core.machine import Conditions

MIN_SPAN_S = 0.5
"""Counters move in bursts: over less, one burst is a rate of its own."""


class Rates(NamedTuple):
    """What happened in a second; None where it is not known."""

    swapped_in_bytes_per_s: float | None = None
    swapped_out_bytes_per_s: float | None = None
    refaulted_bytes_per_s: float | None = None
    major_faults_per_s: float | None = None


class CounterRates:
    """Remembers the last counters, to hold the next ones against them."""

    def __init__(self) -> None:
        self._at_s: float | None = None
        self._counts: tuple[int | None, ...] = ()
        self._rates = Rates()

    def after(self, conditions: Conditions, at_s: float) -> Rates:
        """The rates by one more reading.

        Example:
            >>> rates = CounterRates()
            >>> rates.after(Conditions(swapped_out_bytes=1000), 1.0).swapped_out_bytes_per_s
            >>> rates.after(Conditions(swapped_out_bytes=5000), 3.0).swapped_out_bytes_per_s
            2000.0
        """
        counts = (
            conditions.swapped_in_bytes,
            conditions.swapped_out_bytes,
            conditions.refaulted_bytes,
            conditions.major_faults,
        )
        if self._at_s is None:
            self._at_s, self._counts = at_s, counts
            return self._rates
        span_s = at_s - self._at_s
        if span_s < MIN_SPAN_S:
            return self._rates
        pairs = zip(self._counts, counts, strict=True)
        self._rates = Rates(*(_rate(before, now, span_s) for before, now in pairs))
        self._at_s, self._counts = at_s, counts
        return self._rates


def _rate(before: int | None, now: int | None, span_s: float) -> float | None:
    """None where a counter is missing, or ran backwards: then it is another counter."""
    if before is None or now is None or now < before:
        return None
    return (now - before) / span_s
