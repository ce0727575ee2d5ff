"""What changes logits before candidates are chosen: bias, token masks, penalties, DRY.

What the host knows (which tokens, how often) goes to the device as short lists of (row, token,
value), all rows of a step in one; nothing here is as large as the vocabulary but a mask.
"""

import math
from collections import Counter
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from brim.core.sampling import SamplingParams
from brim.engine.dry import Breakers, dry_penalties

_FLOAT32_MAX = float(np.finfo(np.float32).max)

Penalty = tuple[int, float, float, float]
"""(token, factor of a repeated token, what presence and frequency take, what DRY takes)"""


def penalties_of(
    history: Sequence[int], params: SamplingParams, breakers: Breakers
) -> list[Penalty]:
    """All penalties of one sequence, one entry a token; costs O(window), not O(history)."""
    if not params.needs_history:
        return []
    window = params.repeat_last_n
    counts = Counter(history[-window:] if window > 0 else ())
    dry = dry_penalties(history, params, breakers)
    repeated = [
        (
            token,
            params.repeat_penalty,
            count * params.frequency_penalty + params.presence_penalty,
            dry.pop(token, 0.0),
        )
        for token, count in counts.items()
    ]
    return repeated + [(token, 1.0, 0.0, value) for token, value in dry.items()]


def add_biases(scores: mx.array, biases: Sequence[tuple[np.ndarray, np.ndarray]]) -> mx.array:
    """Add each row's (tokens, values), which name no token twice.

    Args:
        scores: float32, shape (R, V).
        biases: int32 tokens and float32 values, shape (N,) each, one pair a row.
    """
    if not any(len(tokens) for tokens, _ in biases):
        return scores
    rows = np.repeat(np.arange(len(biases)), [len(tokens) for tokens, _ in biases])
    tokens = np.concatenate([tokens for tokens, _ in biases])
    values = np.concatenate([values for _, values in biases])
    return scores.at[mx.array(rows), mx.array(tokens)].add(mx.array(values))


def apply_masks(scores: mx.array, masks: Sequence[bytes | None]) -> mx.array:
    """Set what a row's mask forbids to -inf; None allows all.

    Args:
        scores: float32, shape (R, V).
        masks: Bit sets as in `Feed.mask`, one a row.
    """
    if all(mask is None for mask in masks):
        return scores
    vocab_size = scores.shape[-1]
    num_bytes = (vocab_size + 7) // 8
    everything = b"\xff" * num_bytes
    packed = b"".join(everything if mask is None else mask for mask in masks)
    rows = mx.array(np.frombuffer(packed, np.uint8).reshape(len(masks), num_bytes, 1))
    bits = (rows >> mx.arange(8, dtype=mx.uint8)) & 1
    allowed = bits.flatten(1)[:, :vocab_size].astype(mx.bool_)
    return mx.where(allowed, scores, -math.inf)


def penalise(scores: mx.array, penalties: Sequence[Sequence[Penalty]]) -> mx.array:
    """Logits after penalties and DRY, in that order; `scores` stays as it is.

    A penalty neither forbids a token nor overflows: it stops at the largest float.

    Args:
        scores: float32, shape (R, V).
        penalties: What `penalties_of` gave, one list a row.
    """
    vocab_size = scores.shape[-1]
    entries = [
        (row * vocab_size + token, factor, minus, dry)
        for row, of_row in enumerate(penalties)
        for token, factor, minus, dry in of_row
    ]
    if not entries:
        return scores
    at = mx.array(np.array([entry[0] for entry in entries], np.int32))
    numbers = np.clip([entry[1:] for entry in entries], -_FLOAT32_MAX, _FLOAT32_MAX)
    numbers = numbers.astype(np.float32)
    factor, minus, dry = (mx.array(numbers[:, column]) for column in range(3))
    flat = scores.flatten()
    before = flat[at]
    after = _held(mx.where(before > 0, before / factor, before * factor))
    after = _held(_held(after - minus) - dry)
    after = mx.where(before == -math.inf, before, after)
    return mx.put_along_axis(flat, at, after, axis=0).reshape(scores.shape)


def _held(scores: mx.array) -> mx.array:
    return mx.clip(scores, -_FLOAT32_MAX, _FLOAT32_MAX)
