"""Sampling on the host in numpy: the reference that states what each parameter means.

The toy engine samples with it, and the contract suite holds the backends' own samplers against it.
Order as in `SamplingParams`: bias and mask, penalties, DRY, top-k, typical, top-p, min-p, XTC,
temperature, draw.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from brim.core.sampling import SamplingParams
from brim.core.step import Feed, Sampled
from brim.engine.dry import NO_BREAKERS, Breakers, DryBreakers, dry_penalties
from brim.errors import EngineError

SAMPLERS = frozenset(SamplingParams.__struct_fields__)
"""Every field has an effect."""

Logits = NDArray[np.float32]

_FLOAT32_MAX = np.finfo(np.float32).max


class Numbers(NamedTuple):
    """What chance has decided about one draw, before the distribution is known."""

    uniform: float
    """Where in the cumulative distribution the token lies; at least 0, less than 1."""
    xtc: bool
    """Whether XTC acts on this token."""


def roll(params: SamplingParams, rng: np.random.Generator) -> Numbers:
    """One draw's random numbers: one, and one more where XTC is asked for.

    They come before the logits are looked at, so that a sequence's numbers do not depend on them.
    The uniform one has a float's 24 bits: then it stays below 1 on a device that has no doubles.
    """
    xtc = (
        params.xtc_probability > 0.0
        # A token more likely than another one that is above a half does not exist.
        and params.xtc_threshold <= 0.5
        and rng.random() <= params.xtc_probability
    )
    return Numbers(float(rng.random(dtype=np.float32)), xtc)


def is_ranked(params: SamplingParams, numbers: Numbers) -> bool:
    """Whether the candidates of a draw lie likeliest first, rather than by token id.

    Where no sampler needs them ranked they are not: ranking a whole vocabulary costs more than
    everything else.
    """
    return params.top_k > 0 or params.typical_p < 1.0 or params.top_p < 1.0 or numbers.xtc


def allowed_tokens(mask: bytes, vocab_size: int) -> NDArray[np.bool_]:
    """The bit set of `Feed.mask` as booleans, shape (vocab_size,).

    Raises:
        EngineError: The mask has the wrong length or allows nothing, which no backend survives.
    """
    if len(mask) != (vocab_size + 7) // 8:
        raise EngineError(
            f"a token mask of {len(mask)} bytes; {vocab_size} tokens need {(vocab_size + 7) // 8}"
        )
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), count=vocab_size, bitorder="little")
    if not bits.any():
        raise EngineError(
            "the token mask allows no token at all; the grammar has reached a dead end"
        )
    return bits.astype(np.bool_)


def check_possible(biased: Logits) -> None:
    """Refuse logits that leave no token, which samplers answer with a forbidden one.

    Raises:
        EngineError: Mask and bias together forbid everything.
    """
    if not np.isfinite(biased).any():
        raise EngineError("mask and logit bias together allow no token at all")


def bias_by_token(params: SamplingParams, eog_tokens: frozenset[int]) -> dict[int, float]:
    """What is added to logits, by token: logit bias, and -inf for ends that are ignored."""
    biases: dict[int, float] = {}
    for token, bias in params.logit_bias:
        total = biases.get(token, 0.0) + bias
        # Two biases that fit a float may add to one that does not.
        biases[token] = (
            total if total == -np.inf else float(np.clip(total, -_FLOAT32_MAX, _FLOAT32_MAX))
        )
    if params.ignore_eos:
        biases.update(dict.fromkeys(sorted(eog_tokens), -np.inf))
    return biases


def apply_bias(logits: Logits, params: SamplingParams, eog_tokens: frozenset[int]) -> Logits:
    """A copy of `logits` with logit bias added and, with ignore_eos, the end tokens forbidden."""
    biased = logits.copy()
    biases = bias_by_token(params, eog_tokens)
    if biases:
        biased[list(biases)] += np.array(list(biases.values()), np.float32)
    return biased


def logprobs_of(logits: Logits) -> Logits:
    """Log-probabilities of the whole vocabulary, shape (vocab_size,)."""
    with np.errstate(over="ignore"):
        shifted: Logits = logits - logits.max()
    return shifted - np.float32(np.log(np.exp(shifted, dtype=np.float64).sum()))


def top_logprobs(
    logprobs: Logits, token: int, num_top: int
) -> tuple[float, tuple[tuple[int, float], ...]]:
    """The chosen token's logprob and the `num_top` likeliest, ties broken by the lower id."""
    if num_top == 0:
        return float(logprobs[token]), ()
    num_top = min(num_top, len(logprobs))
    least = np.partition(logprobs, -num_top)[-num_top]
    candidates = np.flatnonzero(logprobs >= least)
    order = np.lexsort((candidates, -logprobs[candidates]))[:num_top]
    top = tuple((int(t), float(logprobs[t])) for t in candidates[order])
    return float(logprobs[token]), top


def apply_penalties(logits: Logits, history: Sequence[int], params: SamplingParams) -> Logits:
    """Repetition, frequency and presence penalties over the last `repeat_last_n` tokens."""
    recent = history[-params.repeat_last_n :] if params.repeat_last_n > 0 else ()
    if not recent or not params.needs_history:
        return logits
    tokens, counts = np.unique(np.asarray(recent), return_counts=True)
    penalised = logits.copy()
    values = penalised[tokens]
    with np.errstate(over="ignore"):
        values = np.where(
            values > 0,
            values / np.float32(params.repeat_penalty),
            values * np.float32(params.repeat_penalty),
        )
        # In doubles, where the two may cancel; held before they meet the logits, since infinity
        # less infinity is no number.
        minus = counts * params.frequency_penalty + params.presence_penalty
        values = _held(values) - _held(minus).astype(np.float32)
    penalised[tokens] = held_finite(values, logits[tokens])
    return penalised


def apply_dry(
    logits: Logits, history: Sequence[int], params: SamplingParams, breakers: Breakers
) -> Logits:
    """DRY's penalties over the last `dry_penalty_last_n` tokens."""
    penalties = dry_penalties(history, params, breakers)
    if not penalties:
        return logits
    penalised = logits.copy()
    tokens = np.fromiter(penalties.keys(), np.intp)
    with np.errstate(over="ignore"):
        values = logits[tokens] - np.fromiter(penalties.values(), np.float32)
    penalised[tokens] = held_finite(values, logits[tokens])
    return penalised


def held_finite(values: Logits, before: Logits) -> Logits:
    """Penalised logits, which neither overflow nor forbid what was possible before."""
    return np.where(np.isfinite(before), _held(values), before)


def _held(values: Logits) -> Logits:
    return np.clip(values, -_FLOAT32_MAX, _FLOAT32_MAX)


def truncated_probs(
    logits: Logits, params: SamplingParams, *, xtc: bool = False
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Candidates left by top-k, typical, top-p, min-p and XTC, with probabilities at temperature.

    Args:
        logits: After bias, mask and penalties.
        params: The truncations and the temperature.
        xtc: Whether XTC acts on this token.

    Returns:
        Token ids, likeliest first and the lower first among equals, and their probabilities, which
        sum to 1.
    """
    order = np.argsort(-logits, kind="stable")
    order = order[np.isfinite(logits[order])]
    if params.top_k > 0:
        order = order[: params.top_k]
    if params.typical_p < 1.0:
        logprobs = logprobs_of(logits[order]).astype(np.float64)
        probs = np.exp(logprobs)
        distance = np.abs(-logprobs + (probs * logprobs).sum())
        by_typicality = np.argsort(distance, kind="stable")
        mass = np.cumsum(probs[by_typicality])
        keep = int(np.searchsorted(mass, params.typical_p, side="right")) + 1
        order = order[np.sort(by_typicality[:keep])]
    if params.top_p < 1.0:
        probs = np.exp(logprobs_of(logits[order]), dtype=np.float64)
        order = order[: int(np.searchsorted(np.cumsum(probs), params.top_p)) + 1]
    if params.min_p > 0.0:
        order = order[logits[order] >= logits[order[0]] + np.float32(np.log(params.min_p))]
    if xtc:
        probs = np.exp(logprobs_of(logits[order]), dtype=np.float64)
        num_above = int((probs >= params.xtc_threshold).sum())
        order = order[max(num_above - 1, 0) :]
    # The largest becomes 0 before it is divided: a bias near the largest float would overflow.
    with np.errstate(over="ignore"):
        scaled = (logits[order] - logits[order[0]]) / np.float32(params.temperature)
    weights = np.exp(scaled, dtype=np.float64)
    return order, weights / weights.sum()


def choose(
    logits: Logits,
    history: Sequence[int],
    params: SamplingParams,
    rng: np.random.Generator,
    breakers: Breakers = NO_BREAKERS,
) -> int:
    """Draw one token from logits that already have bias and mask applied."""
    penalised = apply_penalties(logits, history, params)
    penalised = apply_dry(penalised, history, params, breakers)
    if params.is_greedy:
        return int(penalised.argmax())
    numbers = roll(params, rng)
    tokens, probs = truncated_probs(penalised, params, xtc=numbers.xtc)
    if not is_ranked(params, numbers):
        by_id = np.argsort(tokens)
        tokens, probs = tokens[by_id], probs[by_id]
    position = int(np.searchsorted(np.cumsum(probs), numbers.uniform, side="right"))
    return int(tokens[min(position, len(tokens) - 1)])


class HostSequence(Protocol):
    """What a host-sampled engine keeps of a sequence."""

    sampling: SamplingParams
    rng: np.random.Generator
    logits: Logits
    """Raw, behind the last fed token."""

    @property
    def tokens(self) -> Sequence[int]:
        """Everything that was fed."""
        ...


def draw(
    feed: Feed, sequence: HostSequence, eog_tokens: frozenset[int], dry_breakers: DryBreakers
) -> Sampled:
    """The whole chain for one feed, from raw logits to the token and its logprobs."""
    params = sequence.sampling
    biased = apply_bias(sequence.logits, params, eog_tokens)
    if feed.mask is not None:
        biased[~allowed_tokens(feed.mask, len(biased))] = -np.inf
    check_possible(biased)
    breakers = dry_breakers.find(params)
    token = choose(biased, sequence.tokens, params, sequence.rng, breakers)
    if params.num_logprobs is None:
        return Sampled(feed.seq_id, token)
    return Sampled(
        feed.seq_id, token, *top_logprobs(logprobs_of(biased), token, params.num_logprobs)
    )
