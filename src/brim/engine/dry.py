"""DRY: penalties for tokens that would continue a repetition, computed from the history alone.

For engines that sample without llama.cpp's chain; what it gives is what that chain gives.  A
sequence breaker (a newline, a quote) ends a repetition.  Which tokens break is read from a token's
bytes when it first occurs, never from the whole vocabulary: for 152,000 tokens that would hold up
everybody's decoding for a second.

Source: the DRY sampler by p-e-w and pi6am, as in llama.cpp's `llama-sampler.cpp`.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from brim.core.sampling import SamplingParams
from brim.core.tokenizer import Tokenizer

_MAX_BREAKER_BYTES = 40
_MAX_TAIL_TOKENS = 20
"""llama.cpp's limits: with them the search for a breaker is linear in the history."""

_MAX_SETS = 8
"""Sets of breakers that are kept; clients mostly use the default one."""

_FLOAT32_MAX = float(np.finfo(np.float32).max)

Tail = tuple[int, ...]
"""Tokens that must follow for a breaker to be whole; empty where one token holds all of it."""


class Breakers:
    """Where repetitions end, in one vocabulary.

    Args:
        breakers: Each breaker's bytes, with the tail behind its first byte, its first two, ...
        piece: Bytes of a token, control tokens included.
    """

    def __init__(
        self, breakers: Sequence[tuple[bytes, Sequence[Tail]]], piece: Callable[[int], bytes]
    ) -> None:
        self._breakers = breakers
        self._piece = piece
        self._tails: dict[int, frozenset[Tail]] = {}

    def tails(self, token: int) -> frozenset[Tail]:
        """What makes a breaker whole behind this token; empty where it starts none."""
        tails = self._tails.get(token)
        if tails is None:
            tails = self._tails[token] = self._tails_of(self._piece(token))
        return tails

    def repeat_limit(self, recent: Sequence[int]) -> int:
        """How many of the newest tokens lie behind the last breaker; all where there is none."""
        if not self._breakers:
            return len(recent)
        for age, token in enumerate(reversed(recent)):
            tails = self.tails(token)
            if tails:
                after = tuple(recent[len(recent) - age :][:_MAX_TAIL_TOKENS])
                matches = [len(tail) for tail in tails if after[: len(tail)] == tail]
                if matches:
                    return age - max(matches)
        return len(recent)

    def _tails_of(self, piece: bytes) -> frozenset[Tail]:
        found: set[Tail] = set()
        for breaker, tails in self._breakers:
            if breaker in piece:
                found.add(())
                continue
            for num_bytes, tail in enumerate(tails, start=1):
                if piece.endswith(breaker[:num_bytes]):
                    found.add(tail)
        return frozenset(found)


NO_BREAKERS = Breakers((), lambda _token: b"")


def dry_penalties(
    history: Sequence[int], params: SamplingParams, breakers: Breakers
) -> dict[int, float]:
    """What DRY takes from logits, by token; costs O(dry_penalty_last_n).

    Args:
        history: Everything that was fed, the prompt included.
        params: The `dry_` fields count.
        breakers: Of `params.dry_sequence_breakers`.

    Example:
        >>> params = SamplingParams(dry_multiplier=1.0, dry_base=2.0)
        >>> dry_penalties([5, 6, 7, 8, 5, 6, 7], params, NO_BREAKERS)
        {8: 2.0}
    """
    allowed, window = params.dry_allowed_length, params.dry_penalty_last_n
    if params.dry_multiplier == 0.0 or params.dry_base < 1.0 or window == 0:
        return {}
    recent = history[-window:]
    if not recent:
        return {}
    limit = breakers.repeat_limit(recent)
    max_exponent = _max_exponent(params.dry_base)
    if max_exponent > 0:
        limit = min(limit, allowed + max_exponent)
    longest: dict[int, int] = {}
    tokens = np.asarray(recent, np.int64)
    lengths = _repeat_lengths(tokens, limit)
    ends = np.flatnonzero(lengths >= allowed)
    for token, length in zip(tokens[ends + 1].tolist(), lengths[ends].tolist(), strict=True):
        if length > longest.get(token, -1):
            longest[token] = length
    return {
        token: _penalty(params.dry_multiplier, params.dry_base, length - allowed)
        for token, length in longest.items()
        if () not in breakers.tails(token)
    }


def _max_exponent(base: float) -> int:
    """The largest power of `base` that a float holds; 0 where no power grows out of it."""
    return int(88.7228391 / math.log(base)) if base > 1.000001 else 0


def _penalty(multiplier: float, base: float, exponent: int) -> float:
    try:
        return min(multiplier * base**exponent, _FLOAT32_MAX)
    except OverflowError:
        return _FLOAT32_MAX


def _repeat_lengths(tokens: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
    """For each position but the last: how many tokens up to there repeat the newest ones.

    Only positions that still match are looked at, so that text without repetitions costs one
    comparison of the window.
    """
    last = len(tokens) - 1
    lengths = np.zeros(last, np.int64)
    ends = np.arange(last)
    for length in range(limit):
        ends = ends[np.searchsorted(ends, length) :]
        ends = ends[tokens[ends - length] == tokens[last - length]]
        if not len(ends):
            break
        lengths[ends] = length + 1
    return lengths


class DryBreakers:
    """The sets of sequence breakers that are in use with one vocabulary.

    Args:
        tokenizer: Of the model.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._sets: dict[tuple[str, ...], Breakers] = {}

    def find(self, params: SamplingParams) -> Breakers:
        """The breakers of these parameters; none where they do without DRY.

        Raises:
            InvalidRequest: A breaker cannot be written in this vocabulary.
        """
        if params.dry_multiplier == 0.0:
            return NO_BREAKERS
        texts = params.dry_sequence_breakers
        known = self._sets.get(texts)
        if known is not None:
            return known
        cut = (text.encode("utf-8", "replace")[:_MAX_BREAKER_BYTES] for text in texts)
        breakers = Breakers([(text, self._tails(text)) for text in cut if text], self._piece)
        if len(self._sets) == _MAX_SETS:
            del self._sets[next(iter(self._sets))]
        self._sets[texts] = breakers
        return breakers

    def _piece(self, token: int) -> bytes:
        return self._tokenizer.piece(token, special=True)

    def _tails(self, breaker: bytes) -> list[Tail]:
        """What the rest behind each byte becomes when it is written by itself.

        A rest that starts inside a character is read with U+FFFD in its place, as llama.cpp does.
        """
        return [
            tuple(
                self._tokenizer.encode(
                    breaker[start:].decode("utf-8", "replace"),
                    add_special=False,
                    parse_special=False,
                )[:_MAX_TAIL_TOKENS]
            )
            for start in range(1, len(breaker))
        ]
