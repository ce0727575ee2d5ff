"""Sampling's arithmetic on the device: ranking, truncations, and the draw itself.

Everything takes a batch of rows, treats each by itself, and is lazy.  No result of one row depends
on how many rows there are, so a sequence draws the same alone and in a batch.

Candidates are ranked by (logit, token id) in one integer, because MLX promises no stable sort, and
equal logits are common where the model computes in 16 bits.
"""

import math
from typing import NamedTuple

import mlx.core as mx

_NUM_IDS = 1 << 32
_FULL_SORT_SHARE = 8
"""Ranking more than an eighth of a vocabulary sorts all of it: narrowing would save nothing."""


class Candidates(NamedTuple):
    """What a batch of rows may draw from."""

    ids: mx.array | None
    """Token ids, int32, shape (R, K), likeliest first; None for the whole vocabulary by id."""
    scores: mx.array
    """Their logits, float32, shape (R, K); -inf where a candidate is out."""


def rank_keys(scores: mx.array, ids: mx.array) -> mx.array:
    """Integers that sort as (score falling, id rising); int64, the id in the low 32 bits."""
    # Adding 0 turns -0.0, which equals 0.0 but has other bits, into it.
    bits = (scores + 0.0).view(mx.int32)
    rising = mx.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (~rising).astype(mx.int64) * _NUM_IDS + ids.astype(mx.int64)


def _blocks(scores: mx.array, size: int, fill: float) -> mx.array:
    """The rows cut into blocks, shape (R, num_blocks, size)."""
    missing = -scores.shape[-1] % size
    if missing:
        scores = mx.pad(scores, [(0, 0), (0, missing)], constant_values=fill)
    return scores.reshape(scores.shape[0], -1, size)


def _sorted_ids(scores: mx.array, ids: mx.array, num_best: int) -> mx.array:
    keys = mx.sort(rank_keys(scores, ids), axis=-1)[:, :num_best]
    return (keys & (_NUM_IDS - 1)).astype(mx.int32)


def rank(scores: mx.array, num_best: int | None = None) -> tuple[mx.array, mx.array]:
    """The `num_best` best of each row, or all, likeliest first and the lower id among equals.

    The best k lie in the k blocks with the best maxima: a block that is not among them is preceded
    by k blocks whose maxima are better or as good with lower ids.  So two sorts of a few thousand
    numbers replace one of the vocabulary.

    Args:
        scores: float32, shape (R, V).
        num_best: How many to rank; None or V and above for all.

    Returns:
        Token ids, int32, and their scores, shape (R, num_best) each.
    """
    vocab_size = scores.shape[-1]
    num_best = vocab_size if num_best is None else min(num_best, vocab_size)
    ids = mx.arange(vocab_size, dtype=mx.int32)
    if num_best * _FULL_SORT_SHARE < vocab_size:
        # Blocks of sqrt(V / k) make the two sorts equally long.
        size = 1 << round(math.log2(vocab_size / num_best) / 2)
        blocks = _blocks(scores, size, -math.inf)
        numbers = mx.arange(blocks.shape[1], dtype=mx.int32)
        best = _sorted_ids(blocks.max(axis=-1), numbers, num_best)
        narrowed = mx.take_along_axis(blocks, best[:, :, None], axis=1)
        ids = best[:, :, None] * size + mx.arange(size, dtype=mx.int32)
        chosen = _sorted_ids(narrowed.flatten(1), ids.flatten(1), num_best)
        # Padding ranks behind every token; among logits that are no numbers it may not.
        chosen = mx.minimum(chosen, vocab_size - 1)
    else:
        chosen = _sorted_ids(scores, ids, num_best)
    return chosen, mx.take_along_axis(scores, chosen, axis=-1)


def _weights(scores: mx.array) -> mx.array:
    """Probabilities up to a factor: 1 for the likeliest candidate, 0 for those that are out."""
    return mx.exp(scores - scores.max(axis=-1, keepdims=True))


def keep_typical(scores: mx.array, mass: mx.array) -> mx.array:
    """Keep the candidates whose surprise is nearest to the expected one, up to `mass`.

    Args:
        scores: float32, shape (R, K), likeliest first.
        mass: Probability to reach, shape (R, 1); the candidate that crosses it stays.
    """
    logprobs = scores - mx.logsumexp(scores, axis=-1, keepdims=True)
    probs = mx.exp(logprobs)
    # 0 times -inf is not a number, so what is out is left out of the sum.
    entropy = -mx.where(probs > 0, probs * logprobs, 0.0).sum(axis=-1, keepdims=True)
    distance = mx.abs(-logprobs - entropy)
    positions = mx.arange(scores.shape[-1], dtype=mx.int32)
    nearest = _sorted_ids(-distance, positions, scores.shape[-1])
    near = mx.take_along_axis(probs, nearest, axis=-1)
    kept = mx.cumsum(near, axis=-1, inclusive=False) <= mass
    kept = mx.put_along_axis(mx.zeros(scores.shape, mx.bool_), nearest, kept, axis=-1)
    return mx.where(kept, scores, -math.inf)


def keep_top_p(scores: mx.array, mass: mx.array) -> mx.array:
    """Keep the likeliest candidates up to `mass`; the one that crosses it stays."""
    weights = _weights(scores)
    before = mx.cumsum(weights, axis=-1, inclusive=False)
    total = before[:, -1:] + weights[:, -1:]
    return mx.where((before < mass * total) | (before == 0), scores, -math.inf)


def keep_min_p(scores: mx.array, log_share: mx.array) -> mx.array:
    """Keep candidates whose probability is at least exp(`log_share`) of the likeliest one's."""
    return mx.where(scores >= scores.max(axis=-1, keepdims=True) + log_share, scores, -math.inf)


def drop_top_choices(scores: mx.array, threshold: mx.array) -> mx.array:
    """XTC: of the candidates with a probability of at least `threshold` keep the least likely."""
    weights = _weights(scores)
    total = mx.cumsum(weights, axis=-1)[:, -1:]
    above = (weights >= threshold * total) & (scores > -math.inf)
    position = mx.cumsum(above.astype(mx.int32), axis=-1)
    return mx.where(above & (position < position[:, -1:]), -math.inf, scores)


def _pick(cumulative: mx.array, target: mx.array) -> mx.array:
    """The first position whose cumulative weight is above `target`, shape (R, 1).

    Rounding may put the target at the total: then it is the last position that has weight.
    """
    position = (cumulative <= target).astype(mx.int32).sum(axis=-1, keepdims=True)
    last = (cumulative < cumulative[:, -1:]).astype(mx.int32).sum(axis=-1, keepdims=True)
    return mx.minimum(position, last)


def pick_ranked(
    ids: mx.array, scores: mx.array, temperature: mx.array, uniform: mx.array
) -> mx.array:
    """Draw from ranked candidates by the inverse of their cumulative distribution.

    Args:
        ids: Token ids, int32, shape (R, K).
        scores: Their logits, float32, shape (R, K); -inf where a candidate is out.
        temperature: Above 0, shape (R, 1).
        uniform: At least 0 and below 1, shape (R, 1).

    Returns:
        Token ids, int32, shape (R, 1).
    """
    weights = _tempered(scores, temperature)
    cumulative = mx.cumsum(weights, axis=-1)
    position = _pick(cumulative, uniform * cumulative[:, -1:])
    return mx.take_along_axis(ids, position, axis=-1)


def pick_any(scores: mx.array, temperature: mx.array, uniform: mx.array) -> mx.array:
    """The same from a whole vocabulary in the order of its ids; shapes as in `pick_ranked`.

    In two steps, the block and then the place in it: a running sum of 150,000 floats is neither
    exact nor fast.
    """
    size = 1 << round(math.log2(scores.shape[-1]) / 2)
    blocks = _blocks(_tempered(scores, temperature), size, 0.0)
    cumulative = mx.cumsum(blocks.sum(axis=-1), axis=-1)
    target = uniform * cumulative[:, -1:]
    block = _pick(cumulative, target)
    before = mx.take_along_axis(cumulative, mx.maximum(block - 1, 0), axis=-1)
    inside = mx.take_along_axis(blocks, block[:, :, None], axis=1)[:, 0]
    place = _pick(mx.cumsum(inside, axis=-1), target - mx.where(block > 0, before, 0.0))
    return block * size + place


def _tempered(scores: mx.array, temperature: mx.array) -> mx.array:
    # The largest becomes 0 before it is divided: a bias near the largest float would overflow.
    return mx.exp((scores - scores.max(axis=-1, keepdims=True)) / temperature)
