"""Attention over sequences of different lengths, each with a cache of its own.

mlx-lm's model classes hand what a cache returns straight to one function.  Here that function also
takes the rows of a batch: each is attended to with its own keys, values and mask, by the very
operations that a sequence alone would use.  So nothing is padded, no cache is merged when a
sequence comes or goes, and quantised caches batch like any other.
"""

import importlib
import sys
from typing import Any, NamedTuple

import mlx.core as mx

_BASE = "mlx_lm.models.base"
_NAME = "scaled_dot_product_attention"


class Row(NamedTuple):
    """One sequence's part of a layer."""

    cache: Any
    """mlx-lm looks here whether keys and values are quantised."""
    keys: Any
    values: Any


class Rows:
    """Stands for the keys, and again for the values, of a batch; opaque to the model."""

    __slots__ = ("rows",)

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows


class RowMasks:
    """Stands for the mask of a batch, where a sequence needs one."""

    __slots__ = ("masks",)

    def __init__(self, masks: list[Any]) -> None:
        self.masks = masks


def install() -> None:
    """Put this module's function in the place of mlx-lm's, in every model class loaded or to come.

    A module binds the function's name when it is imported, so those that are here already are
    told as well.  Idempotent.
    """
    base = importlib.import_module(_BASE)
    if base.scaled_dot_product_attention is scaled_dot_product_attention:
        return
    global _of_one
    _of_one = base.scaled_dot_product_attention
    for name, module in list(sys.modules.items()):
        if name.startswith("mlx_lm.") and getattr(module, _NAME, None) is _of_one:
            setattr(module, _NAME, scaled_dot_product_attention)


def _of_one(*arguments: Any, **options: Any) -> mx.array:
    """mlx-lm's own function, for one cache, as soon as `install` has found it."""
    raise AssertionError("attention.install() was not called")


def scaled_dot_product_attention(
    queries: mx.array,
    keys: Any,
    values: Any,
    cache: Any,
    scale: float,
    mask: Any,
    sinks: mx.array | None = None,
) -> mx.array:
    """mlx-lm's function, and for `Rows` the same of each row.

    Args:
        queries: Shape (B, heads, n, width).
        keys: An array or a tuple as mlx-lm's caches return, or Rows.
        values: The same.
        cache: The layer's cache.
        scale: Of the scores.
        mask: None, 'causal', an array that serves all rows, or RowMasks.
        sinks: Logits that take part in the softmax and bring no value; shape (heads,).

    Returns:
        Shape (B, heads, n, value width).
    """
    if not isinstance(keys, Rows):
        return _of_one(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)
    rows = keys.rows
    masks = mask.masks if isinstance(mask, RowMasks) else [mask] * len(rows)
    attended = [
        _of_one(one, row.keys, row.values, cache=row.cache, scale=scale, mask=row_mask, sinks=sinks)
        for one, row, row_mask in zip(mx.split(queries, len(rows)), rows, masks, strict=True)
    ]
    return mx.concatenate(attended)
