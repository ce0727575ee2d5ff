"""Sampling on the host in numpy: the reference that states what each parameter means.

The toy engine samples with it, and the contract suite holds the backends' own samplers against it.
Order as in `SamplingParams`: bias and mask, penalties, top-k, typical, top-p, min-p, temperature,
draw.  DRY and XTC are not here: an engine that samples with this does not list them.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from brim.core.sampling import SamplingParams
from brim.core.step import Feed, Sampled
from brim.errors import EngineError

SAMPLERS = frozenset(
    {
        "temperature", "top_k", "top_p", "min_p", "typical_p", "repeat_penalty", "presence_penalty",
        "frequency_penalty", "repeat_last_n", "logit_bias", "seed", "num_logprobs", "ignore_eos",
    }
)  # fmt: skip

Logits = NDArray[np.float32]


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


def apply_bias(logits: Logits, params: SamplingParams, eog_tokens: frozenset[int]) -> Logits:
    """A copy of `logits` with logit bias added and, with ignore_eos, the end tokens forbidden."""
    biased = logits.copy()
    for token, bias in params.logit_bias:
        biased[token] += bias
    if params.ignore_eos:
        biased[list(eog_tokens)] = -np.inf
    return biased


def logprobs_of(logits: Logits) -> Logits:
    """Log-probabilities of the whole vocabulary, shape (vocab_size,)."""
    top = logits.max()
    shifted: Logits = logits - top
    return shifted - np.float32(np.log(np.exp(shifted, dtype=np.float64).sum()))


def top_logprobs(
    logprobs: Logits, token: int, num_top: int
) -> tuple[float, tuple[tuple[int, float], ...]]:
    """The chosen token's logprob and the `num_top` likeliest, ties broken by the lower id."""
    if num_top == 0:
        return float(logprobs[token]), ()
    num_top = min(num_top, len(logprobs))
    candidates = np.argpartition(-logprobs, num_top - 1)[:num_top]
    order = np.lexsort((candidates, -logprobs[candidates]))
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
    values = np.where(values > 0, values / params.repeat_penalty, values * params.repeat_penalty)
    values -= counts * params.frequency_penalty + params.presence_penalty
    penalised[tokens] = values
    return penalised


def truncated_probs(logits: Logits, params: SamplingParams) -> tuple[NDArray[np.intp], Logits]:
    """Candidates left after top-k, typical, top-p and min-p, with probabilities at temperature.

    Returns:
        Token ids, likeliest first, and their probabilities, which sum to 1.
    """
    order = np.argsort(-logits, kind="stable")
    order = order[np.isfinite(logits[order])]
    if params.top_k > 0:
        order = order[: params.top_k]
    if params.typical_p < 1.0:
        probs = np.exp(logprobs_of(logits[order]))
        surprise = -np.log(probs)
        by_typicality = np.argsort(np.abs(surprise - (probs * surprise).sum()), kind="stable")
        keep = int(np.searchsorted(np.cumsum(probs[by_typicality]), params.typical_p)) + 1
        order = order[np.sort(by_typicality[:keep])]
    if params.top_p < 1.0:
        probs = np.exp(logprobs_of(logits[order]))
        order = order[: int(np.searchsorted(np.cumsum(probs), params.top_p)) + 1]
    if params.min_p > 0.0:
        probs = np.exp(logprobs_of(logits[order]))
        order = order[probs >= params.min_p * probs[0]]
    probs = np.exp(logprobs_of(logits[order] / np.float32(params.temperature)))
    return order, probs / probs.sum()


def choose(
    logits: Logits, history: Sequence[int], params: SamplingParams, rng: np.random.Generator
) -> int:
    """Draw one token from logits that already have bias and mask applied."""
    penalised = apply_penalties(logits, history, params)
    if params.is_greedy:
        return int(penalised.argmax())
    tokens, probs = truncated_probs(penalised, params)
    return int(tokens[min(int(np.searchsorted(np.cumsum(probs), rng.random())), len(tokens) - 1)])


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


def draw(feed: Feed, sequence: HostSequence, eog_tokens: frozenset[int]) -> Sampled:
    """The whole chain for one feed, from raw logits to the token and its logprobs."""
    params = sequence.sampling
    biased = apply_bias(sequence.logits, params, eog_tokens)
    if feed.mask is not None:
        biased[~allowed_tokens(feed.mask, len(biased))] = -np.inf
    check_possible(biased)
    token = choose(biased, sequence.tokens, params, sequence.rng)
    if params.num_logprobs is None:
        return Sampled(feed.seq_id, token)
    return Sampled(
        feed.seq_id, token, *top_logprobs(logprobs_of(biased), token, params.num_logprobs)
    )
