"""Deltas that wait for a slow reader, merged so that waiting costs no memory beyond the text.

The worker keeps one for its socket and the gateway one for each answer, so that neither a slow
gateway nor a slow client makes a queue that grows with every step.
"""

from collections.abc import Iterable

from brim.core.answer import Delta, TokenLogprob


class DeltaBuffer:
    """What each choice has produced since the last `take`: at most one delta a choice."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[int, int], Delta | _Merged] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, deltas: Iterable[tuple[int, Delta]]) -> None:
        """Append (ticket, delta) pairs, in the order in which they were made."""
        waiting = self._waiting
        for ticket, delta in deltas:
            key = (ticket, delta.index)
            held = waiting.get(key)
            if held is None:
                waiting[key] = delta
            else:
                if isinstance(held, Delta):
                    held = waiting[key] = _Merged(held)
                held.append(delta)

    def take(self) -> list[tuple[int, Delta]]:
        """Everything that waits, one delta a choice, and forget it."""
        waiting, self._waiting = self._waiting, {}
        return [
            (ticket, held if isinstance(held, Delta) else held.delta())
            for (ticket, _), held in waiting.items()
        ]


class _Merged:
    """Several deltas of one choice; lists, so that the thousandth costs what the second did."""

    __slots__ = ("last", "logprobs", "num_tokens", "texts")

    def __init__(self, first: Delta) -> None:
        self.texts: list[str] = []
        self.logprobs: list[TokenLogprob] = []
        self.num_tokens = 0
        self.append(first)

    def append(self, delta: Delta) -> None:
        self.texts.append(delta.text)
        self.logprobs += delta.logprobs
        self.num_tokens += delta.num_tokens
        self.last = delta

    def delta(self) -> Delta:
        # Only a choice's last delta has the fields of an ending, and it was merged last.
        return Delta(
            index=self.last.index,
            text="".join(self.texts),
            num_tokens=self.num_tokens,
            logprobs=tuple(self.logprobs),
            finish_reason=self.last.finish_reason,
            stop_string=self.last.stop_string,
            timings=self.last.timings,
            error=self.last.error,
        )
