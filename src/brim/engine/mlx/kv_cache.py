"""What an attention layer without a window keeps of one sequence, by mlx-lm's cache protocol.

Keys and values lie in buffers that are written in place, taken at once at the bound that the
sequence was admitted with.  Updates return what those of mlx-lm's own caches return, to the bit.

Buffers are written in place only while nobody else holds them: see the note in caches.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from brim.planner.kv import BLOCK_TOKENS
from brim.planner.mlx_kv import GROUP_SIZES, QUANTISED_BITS

KV_BITS = QUANTISED_BITS
"""Bits of a value in each quantised KV type."""

GROWTH_TOKENS = 256
"""Growing copies what is held, so a sequence of unknown length takes this many cells at a time:
mlx-lm's step, a copy of a thousand tokens of context per 256 decoded ones costs under 1 %."""

Parts = list[mx.array]
"""Arrays of shape (1, heads, cells, width): keys and values, or what their quantisation gives."""


def padded_tokens(num_tokens: int, block_tokens: int = BLOCK_TOKENS) -> int:
    """Cells that are taken for so many tokens.

    Example:
        >>> padded_tokens(65)
        128
    """
    return -(-num_tokens // block_tokens) * block_tokens


def group_size_for(*widths: int) -> int | None:
    """The largest group that divides all heads' widths; None where they cannot be quantised.

    Example:
        >>> group_size_for(128, 96)
        32
    """
    return next((size for size in GROUP_SIZES if not any(width % size for width in widths)), None)


def causal_mask(num_rows: int, num_before: int, window_tokens: int | None) -> mx.array:
    """Which of the keys each new row may see, as booleans.

    Args:
        num_rows: New rows.
        num_before: Keys that are held before the first of them.
        window_tokens: Tokens that a row sees, itself included; None for all.

    Returns:
        Shape (num_rows, num_before + num_rows).
    """
    rows = mx.arange(num_before, num_before + num_rows)[:, None]
    keys = mx.arange(num_before + num_rows)[None]
    mask = rows >= keys
    return mask if window_tokens is None else mask & (rows < keys + window_tokens)


class LayerKV(ABC):
    """Buffers of one layer and the tokens that they hold.

    Args:
        capacity_tokens: Tokens that will be stored at most, where that is known; more is allowed,
            and copies.

    Attributes:
        offset: Tokens that were fed: the position of the next one.
        parts: The buffers, once there are any.
    """

    def __init__(self, capacity_tokens: int | None = None) -> None:
        self.offset = 0
        self.parts: Parts = []
        self._capacity_tokens = capacity_tokens
        self._seen_from = 0

    # --- mlx-lm's protocol ---------------------------------------------------------------------

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Store new rows; all keys and values that they may attend to.

        Args:
            keys: Shape (1, heads, n, width).
            values: Shape (1, heads, n, value width).
        """
        rows = self._encode(keys, values)
        num_rows = keys.shape[2]
        self._make_room(num_rows, rows)
        self._write(rows, self.offset - self.first)
        self._seen_from = self._visible_from(self.offset)
        self.offset += num_rows
        return self._fetched(self._seen_from, self.offset)

    def keys_and_values(self) -> tuple[Any, Any]:
        """What the last update returned, for layers that attend to this one's keys and values."""
        return self._fetched(self._seen_from, self.offset)

    @abstractmethod
    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """The mask of N rows that are about to come, as mlx-lm's attention takes it."""

    @property
    def state(self) -> Any:
        """The arrays, for whoever evaluates them."""
        return self.parts

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, whatever they hold."""
        return sum(part.nbytes for part in self.parts)

    def size(self) -> int:
        """Tokens that the next one could attend to."""
        return self.offset

    def empty(self) -> bool:
        """Whether there are no buffers yet."""
        return not self.parts

    def is_trimmable(self, n: int = 0) -> bool:
        """Whether the last n tokens can be taken back."""
        return 0 <= n <= self.offset

    def trim(self, n: int) -> int:
        """Take back the last n tokens; how many were."""
        n = min(n, self.offset)
        self.offset -= n
        return n

    # --- what brim adds ------------------------------------------------------------------------

    first = 0
    """Position of the token in the buffers' first cell."""

    def clear(self) -> None:
        """Start anew, with no buffers."""
        self.offset = 0
        self.parts = []

    def num_rows_at(self, num_tokens: int) -> int:
        """Rows that a copy of the first `num_tokens` has."""
        return num_tokens

    def rows_at(self, num_tokens: int) -> tuple[int, int]:
        """Cells [start, end) of the buffers that hold those rows."""
        end = num_tokens - self.first
        return end - self.num_rows_at(num_tokens), end

    def put(self, parts: Sequence[mx.array], num_tokens: int) -> None:
        """Fill an empty cache with the rows of another at `num_tokens`.

        Args:
            parts: Shape (1, heads, rows, width) each.
            num_tokens: Position of the next token.
        """
        num_rows = parts[0].shape[2]
        self._place(num_tokens - num_rows)
        self._make_room(num_rows, parts)
        self._write(parts, 0)
        self.offset = num_tokens

    def append(self, parts: Sequence[mx.array]) -> None:
        """Add the rows of another cache that follow what is held here.

        Args:
            parts: Shape (1, heads, rows, width) each.
        """
        num_rows = parts[0].shape[2]
        self._make_room(num_rows, parts)
        self._write(parts, self.offset - self.first)
        self.offset += num_rows

    def expect(self, capacity_tokens: int | None) -> None:
        """Be for so many tokens from now on; taken when what is there is full."""
        self._capacity_tokens = capacity_tokens

    def _place(self, first: int) -> None:
        """The position of the first token to be `put` where nothing was before."""
        self.offset = first

    @abstractmethod
    def _encode(self, keys: mx.array, values: mx.array) -> Parts:
        """New rows as they are stored."""

    @abstractmethod
    def _fetched(self, start: int, end: int) -> tuple[Any, Any]:
        """Keys and values at positions [start, end) as the model's attention takes them."""

    def _visible_from(self, position: int) -> int:
        """The first position that a token at `position` attends to."""
        return 0

    def _cells_for(self, num_tokens: int) -> int:
        """Cells to take when so many tokens are to be held."""
        if self._capacity_tokens is not None and num_tokens <= self._capacity_tokens:
            return padded_tokens(self._capacity_tokens)
        return padded_tokens(num_tokens, GROWTH_TOKENS)

    def _make_room(self, num_rows: int, like: Sequence[mx.array]) -> None:
        """Have cells for `num_rows` more tokens, shaped `like` the rows that are coming."""
        held = self.offset - self.first
        if self.parts and held + num_rows <= self.parts[0].shape[2]:
            return
        cells = self._cells_for(held + num_rows)
        old, self.parts = self.parts, [cells_like(part, cells) for part in like]
        if old and held:
            self._write([part[..., :held, :] for part in old], 0)

    def _write(self, rows: Sequence[mx.array], at: int) -> None:
        for index, part in enumerate(rows):
            self.parts[index][..., at : at + part.shape[2], :] = part

    def _slice(self, index: int, start: int, end: int) -> mx.array:
        """Positions [start, end) of one part; the buffer itself where that is all of it."""
        part = self.parts[index]
        at, to = start - self.first, end - self.first
        return part if at == 0 and to == part.shape[2] else part[..., at:to, :]


def cells_like(rows: mx.array, cells: int) -> mx.array:
    """An empty buffer for rows of that shape and type."""
    shape = (*rows.shape[:2], cells, rows.shape[3])
    return mx.zeros(shape, rows.dtype)


class PlainKV(LayerKV):
    """Keys and values of all tokens, in the model's own float type."""

    # mlx-lm's sparse attention and pipelines wrap the buffers, so they can be set.
    @property
    def keys(self) -> mx.array | None:
        """The buffer of keys, once there is one."""
        return self.parts[0] if self.parts else None

    @keys.setter
    def keys(self, keys: mx.array) -> None:
        self.parts[0] = keys

    @property
    def values(self) -> mx.array | None:
        """The buffer of values, once there is one."""
        return self.parts[1] if self.parts else None

    @values.setter
    def values(self, values: mx.array) -> None:
        self.parts[1] = values

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """See the base class."""
        return _unbounded_mask(self.offset, N, return_array, window_size)

    def _encode(self, keys: mx.array, values: mx.array) -> Parts:
        return [keys, values]

    def _fetched(self, start: int, end: int) -> tuple[Any, Any]:
        return self._slice(0, start, end), self._slice(1, start, end)


class QuantisedKV(LayerKV):
    """Keys and values of all tokens in 8 or 4 bits.

    Args:
        bits: Of a value.
        group_size: Values that share a scale and a bias; divides both heads' widths.
        capacity_tokens: As in the base class.
    """

    def __init__(self, bits: int, group_size: int, capacity_tokens: int | None = None) -> None:
        super().__init__(capacity_tokens)
        # mlx-lm's attention takes a cache that has `bits` for a quantised one.
        self.bits = bits
        self.group_size = group_size

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """See the base class."""
        return _unbounded_mask(self.offset, N, return_array, window_size)

    def _encode(self, keys: mx.array, values: mx.array) -> Parts:
        return [
            part
            for rows in (keys, values)
            for part in mx.quantize(rows, group_size=self.group_size, bits=self.bits)
        ]

    def _fetched(self, start: int, end: int) -> tuple[Any, Any]:
        parts = tuple(self._slice(index, start, end) for index in range(len(self.parts)))
        return parts[:3], parts[3:]


def _unbounded_mask(
    offset: int, num_rows: int, return_array: bool, window_size: int | None
) -> mx.array | str | None:
    if window_size is not None or (return_array and num_rows > 1):
        return causal_mask(num_rows, offset, window_size)
    return None if num_rows == 1 else "causal"
