"""Several sequences as one batch: what a model is called with in place of one sequence's caches.

Attention layers keep each sequence's own cache and only pass rows on to it.  Recurrent state is
small and goes through the model in one piece, so it is joined for as long as the same sequences
step together, and given back to them when they part.
"""

from collections.abc import Sequence
from enum import Enum
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, CacheList

from brim.engine.mlx.attention import Row, RowMasks, Rows


class Form(Enum):
    """How a model's attention can be given the caches of several sequences."""

    ROWS = "each row with its own cache"
    PADDED = "arrays as long as the longest"
    """For model classes that compute with keys themselves, as latent attention (MLA) does: the rows
    are copied together for each step, which its short keys make cheap."""


class Offsets:
    """Positions of a batch's rows on the device, made once a step and not once a layer."""

    def __init__(self) -> None:
        self._positions: tuple[int, ...] | None = None
        self._array: mx.array = mx.array([])

    def of(self, rows: Sequence[Any]) -> mx.array:
        """The rows' positions, shape (B,)."""
        positions = tuple(row.offset for row in rows)
        if positions != self._positions:
            self._positions, self._array = positions, mx.array(positions)
        return self._array


class BatchKV:
    """One attention layer of a batch, by mlx-lm's cache protocol."""

    def __init__(self, rows: Sequence[Any], offsets: Offsets) -> None:
        self._rows = list(rows)
        self._offsets = offsets

    @property
    def offset(self) -> mx.array:
        """Position of the next token of each row, shape (B,)."""
        return self._offsets.of(self._rows)

    def let_go(self, index: int) -> None:
        """Forget a row's cache, as its memory may be wanted back; nothing can be fed any more."""
        self._rows[index] = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Rows, Rows]:
        """Give each row's new keys and values, shape (B, heads, n, width), to its own cache."""
        num_rows = len(self._rows)
        fetched = Rows(
            [
                Row(cache, *cache.update_and_fetch(new_keys, new_values))
                for cache, new_keys, new_values in zip(
                    self._rows, mx.split(keys, num_rows), mx.split(values, num_rows), strict=True
                )
            ]
        )
        return fetched, fetched

    def keys_and_values(self) -> tuple[Rows, Rows]:
        """What is held, for layers that read another layer's cache."""
        held = Rows([Row(cache, *cache.keys_and_values()) for cache in self._rows])
        return held, held

    def make_mask(self, num_tokens: int, **options: Any) -> RowMasks | None:
        """Each row's own mask; None where no row needs one."""
        masks = [cache.make_mask(num_tokens, **options) for cache in self._rows]
        return None if all(mask is None for mask in masks) else RowMasks(masks)


class PaddedKV(BatchKV):
    """One attention layer of a batch whose model class wants arrays."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """As `BatchKV`, in arrays of shape (B, heads, longest, width)."""
        return self._padded(super().update_and_fetch(keys, values)[0])

    def keys_and_values(self) -> tuple[Any, Any]:
        """As `BatchKV`, in arrays of shape (B, heads, longest, width)."""
        return self._padded(super().keys_and_values()[0])

    def make_mask(self, num_tokens: int, **options: Any) -> Any:
        """Which keys each row's one new token may see, as booleans, shape (B, 1, 1, longest).

        Raises:
            TypeError: Rows of several tokens, or windows, which nobody batches in this form.
        """
        if num_tokens != 1 or options.get("window_size") is not None:
            raise TypeError("only whole caches can be padded, and only to decode")
        longest = max(row.offset for row in self._rows) + 1
        return (mx.arange(longest) <= self.offset[:, None])[:, None, None]

    def _padded(self, fetched: Rows) -> tuple[mx.array, mx.array]:
        longest = max(row.keys.shape[2] for row in fetched.rows)

        def together(parts: list[mx.array]) -> mx.array:
            none = (0, 0)
            return mx.concatenate(
                [mx.pad(part, [none, none, (0, longest - part.shape[2]), none]) for part in parts]
            )

        return (
            together([row.keys for row in fetched.rows]),
            together([row.values for row in fetched.rows]),
        )


class BatchState:
    """One recurrent layer of a batch: the rows' states joined along the first axis.

    The joined arrays replace the rows' own until `give_back`, so that a step neither takes them
    apart nor joins them again.
    """

    def __init__(self, rows: Sequence[Any]) -> None:
        self._rows = rows
        num_parts = len(rows[0].cache)
        self.joined = ArraysCache(num_parts)
        for part in range(num_parts):
            self.joined[part] = _join([row[part] for row in rows])
        for row in rows:
            row.cache = [None] * num_parts

    def give_back(self, index: int, state: Sequence[mx.array | None]) -> None:
        """Make one row's part of the joined `state` its own again."""
        self._rows[index].cache = [
            None if part is None else part[index : index + 1] for part in state
        ]


def _join(parts: Sequence[mx.array | None]) -> mx.array | None:
    """The parts of all rows; a sequence without tokens has none yet, which means zeros."""
    known = next((part for part in parts if part is not None), None)
    if known is None:
        return None
    return mx.concatenate([mx.zeros_like(known) if part is None else part for part in parts])


States = list[list[mx.array | None]]


class Batch:
    """Sequences that step together, one token each.

    Args:
        layer_lists: Of each sequence, its layers' caches.
        form: What the model's attention takes.

    Raises:
        TypeError: A layer's cache is of a kind that cannot be batched.
    """

    def __init__(self, layer_lists: Sequence[Sequence[Any]], form: Form = Form.ROWS) -> None:
        self._view = BatchKV if form is Form.ROWS else PaddedKV
        self._offsets = Offsets()
        self._views: list[BatchKV] = []
        self._states: list[BatchState] = []
        self._made: dict[int, Any] = {}
        self.layers = [self._layer(rows) for rows in zip(*layer_lists, strict=True)]

    def states(self) -> States:
        """The joined recurrent states as they are now; to be handed to `give_back` later."""
        return [list(state.joined.cache) for state in self._states]

    def give_back(self, index: int, states: States) -> None:
        """Let a sequence go with its recurrent state, of now or of an earlier `states`.

        What is left of the batch cannot be fed; the others are to be given theirs in turn.
        """
        for layer, state in zip(self._states, states, strict=True):
            layer.give_back(index, state)
        for view in self._views:
            view.let_go(index)

    def _layer(self, rows: Sequence[Any]) -> Any:
        """The view of one layer; layers that share a cache share its view."""
        first = rows[0]
        if first is None:
            return None
        if id(first) not in self._made:
            self._made[id(first)] = self._make(rows)
        return self._made[id(first)]

    def _make(self, rows: Sequence[Any]) -> Any:
        first = rows[0]
        if isinstance(first, CacheList):
            parts = zip(*(row.caches for row in rows), strict=True)
            return CacheList(*(self._layer(part) for part in parts))
        if isinstance(first, ArraysCache):
            state = BatchState(rows)
            self._states.append(state)
            return state.joined
        if hasattr(first, "update_and_fetch") and hasattr(first, "make_mask"):
            view = self._view(rows, self._offsets)
            self._views.append(view)
            return view
        raise TypeError(f"caches of {type(first).__name__} cannot be batched")
