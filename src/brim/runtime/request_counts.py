"""How many requests of one model ended in which way, since the gateway started."""

import msgspec

from brim.core.answer import Delta, FinishReason
from brim.core.cache import CacheSource
from brim.errors import BrimError, all_error_classes


class RequestCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Counters that outlive workers; those of one worker's life are in its `Stats`."""

    outcomes: dict[str, int] = {}
    """How an admitted request ended ("stop", "length", "cancelled" or "error") -> requests.  Of
    several choices the last to end counts."""
    refusals: dict[str, int] = {}
    """Class of the error, as `Busy` -> requests that were refused before they were started."""
    num_busy: int = 0
    """Of those refusals, and of the errors, how many told the client to come again (503)."""
    num_prompt_tokens: int = 0
    """Of requests that were answered."""
    num_completion_tokens: int = 0
    cached_tokens: dict[str, int] = {}
    """Source ("memory" or "disk") -> prompt tokens that were not computed."""
    misses: dict[str, int] = {}
    """Reason -> requests of which no more, or nothing, was reused for it."""
    num_removed_tokens: int = 0
    """Prompt tokens that were left out of conversations that outgrew the window."""


class RequestCounter:
    """Counts; `counts` is what there is so far."""

    def __init__(self) -> None:
        self._outcomes: dict[str, int] = {}
        self._refusals: dict[str, int] = {}
        self._cached_tokens: dict[str, int] = {}
        self._misses: dict[str, int] = {}
        self._num_busy = 0
        self._num_prompt_tokens = 0
        self._num_completion_tokens = 0
        self._num_removed_tokens = 0

    def note_refusal(self, error: BrimError) -> None:
        """A request was refused before it was started."""
        _add(self._refusals, type(error).__name__)
        self._num_busy += error.status == 503

    def note_removal(self, num_tokens: int) -> None:
        """So many tokens were left out of a prompt."""
        self._num_removed_tokens += num_tokens

    def note_delta(self, delta: Delta) -> None:
        """A choice ended; its tokens, and with the first choice those of its prompt, count."""
        timings = delta.timings
        if timings is None:
            return
        self._num_completion_tokens += timings.num_completion_tokens
        if delta.index:
            return
        self._num_prompt_tokens += timings.num_prompt_tokens
        if timings.cache.source is not CacheSource.NONE:
            _add(self._cached_tokens, timings.cache.source, timings.cache.num_tokens)
        if timings.cache.miss is not None:
            _add(self._misses, timings.cache.miss)

    def note_end(self, delta: Delta) -> None:
        """A request has ended with this delta."""
        _add(self._outcomes, delta.finish_reason or FinishReason.ERROR)
        if delta.error is not None:
            cls = all_error_classes().get(delta.error.kind, BrimError)
            self._num_busy += cls.status == 503

    def counts(self) -> RequestCounts:
        """A copy."""
        return RequestCounts(
            outcomes=dict(self._outcomes),
            refusals=dict(self._refusals),
            num_busy=self._num_busy,
            num_prompt_tokens=self._num_prompt_tokens,
            num_completion_tokens=self._num_completion_tokens,
            cached_tokens=dict(self._cached_tokens),
            misses=dict(self._misses),
            num_removed_tokens=self._num_removed_tokens,
        )


def _add(counts: dict[str, int], name: str, number: int = 1) -> None:
    counts[str(name)] = counts.get(str(name), 0) + number
