"""How long the rest of a run takes, by what its turns took so far."""

import statistics
from collections.abc import Sequence


class Pace:
    """Counts turns of known kinds; tell it what each took, in order.

    Example:
        >>> pace = Pace([("cold", "a"), ("cold", "b"), ("cold", "a")])
        >>> pace.took(10.0)
        >>> pace.left_s()
        20.0
    """

    def __init__(self, turns: Sequence[tuple[str, str]]) -> None:
        """Every turn as (workload, server), in the order in which they are taken."""
        self._turns = list(turns)
        self._took: list[float] = []

    def took(self, duration_s: float) -> None:
        """The next turn is done."""
        self._took.append(duration_s)

    def left_s(self) -> float | None:
        """Seconds of the turns that are left; None before the first is done."""
        if not self._took:
            return None
        return sum(self._guess_s(turn) for turn in self._turns[len(self._took) :])

    def left_in_words(self) -> str:
        """The same for a line of progress; empty before the first turn is done."""
        left_s = self.left_s()
        if left_s is None:
            return ""
        words = f"{left_s:.0f} s" if left_s < 90 else f"{left_s / 60:.0f} min"
        return f" (about {words} left)"

    def _guess_s(self, turn: tuple[str, str]) -> float:
        """What the same turn took, or else the same workload elsewhere, or else any turn."""
        done = list(zip(self._turns, self._took, strict=False))
        same = [took for other, took in done if other == turn]
        alike = [took for (workload, _), took in done if workload == turn[0]]
        return statistics.fmean(same or alike or self._took)
