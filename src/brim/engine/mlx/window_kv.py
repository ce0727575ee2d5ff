"""What an attention layer that looks back over a window, or to its chunk's start, keeps.

mlx-lm's own cache writes over its oldest row, so that keys come in an order that depends on how the
prompt was cut.  Here they stay in the order of their positions, in a buffer that is moved to its
front when it is full: attention reads a plain slice, without a mask where one token is decoded,
results depend on the tokens alone, and the last few of them can be taken back.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from brim.engine.mlx.kv_cache import Parts, PlainKV, causal_mask, cells_like
from brim.planner.mlx_kv import mlx_window_cells

ROLL_BACK_TOKENS = 16
"""How many of the last tokens can surely be taken back from a window: a step that was launched
ahead takes one, a draft that was refused a few."""


class WindowKV(PlainKV):
    """Keys and values of the last tokens, as many as a layer with a window looks back.

    Args:
        window_tokens: Tokens that one attends to, itself included.
        capacity_tokens: As in the base class; no more than the window and its slack is taken.
    """

    def __init__(self, window_tokens: int, capacity_tokens: int | None = None) -> None:
        super().__init__(capacity_tokens)
        self.window_tokens = window_tokens
        self.first = 0
        self._beside: Parts = []

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """See the base class; a piece that is larger than the slack is attended to beside it."""
        self._beside = []
        num_rows, kept = keys.shape[2], self.num_rows_at(self.offset)
        if kept + num_rows <= mlx_window_cells(self.window_tokens):
            return super().update_and_fetch(keys, values)
        rows = [keys, values]
        if kept:
            held = self._last(kept)
            rows = [mx.concatenate([old, new], axis=2) for old, new in zip(held, rows, strict=True)]
        start = self._visible_from(self.offset) - (self.offset - kept)
        self._restart(rows, self.offset + num_rows)
        self._beside = [part[..., start:, :] for part in rows]
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[Any, Any]:
        """See the base class."""
        if self._beside:
            return self._beside[0], self._beside[1]
        return super().keys_and_values()

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """See the base class."""
        window = window_size or self.window_tokens
        before = min(self.window_tokens - 1, self.offset)
        if before + N > window or (return_array and N > 1):
            return causal_mask(N, before, window)
        return None if N == 1 else "causal"

    def size(self) -> int:
        """Tokens that the next one could attend to, and itself."""
        return min(self.offset, self.window_tokens)

    def is_trimmable(self, n: int = 0) -> bool:
        """Whether the last n tokens can be taken back: what they looked back to is still here."""
        left = self.offset - n
        return left == 0 or (0 <= n < self.offset and self.first <= self._visible_from(left))

    def trim(self, n: int) -> int:
        """Take back the last n tokens, which must be trimmable; how many were."""
        taken = super().trim(n)
        if self.offset == 0:
            self.clear()
        return taken

    def clear(self) -> None:
        """See the base class."""
        super().clear()
        self.first = 0
        self.settle()

    def num_rows_at(self, num_tokens: int) -> int:
        """See the base class."""
        return min(num_tokens - self.first, self.window_tokens - 1 + ROLL_BACK_TOKENS)

    def settle(self) -> None:
        """Let go of what only layers that share this one's keys could still have asked for."""
        self._beside = []

    def _place(self, first: int) -> None:
        self.offset = self.first = first

    def _visible_from(self, position: int) -> int:
        return max(0, position - self.window_tokens + 1)

    def _cells_for(self, num_tokens: int) -> int:
        return min(super()._cells_for(num_tokens), mlx_window_cells(self.window_tokens))

    def _make_room(self, num_rows: int, like: Sequence[mx.array]) -> None:
        if self.offset - self.first + num_rows > mlx_window_cells(self.window_tokens):
            self._restart(self._last(self.num_rows_at(self.offset)), self.offset)
        super()._make_room(num_rows, like)

    def _last(self, num_tokens: int) -> Parts:
        """The last tokens' rows of each part."""
        start = self.offset - num_tokens
        return [self._slice(index, start, self.offset) for index in range(len(self.parts))]

    def _restart(self, rows: Sequence[mx.array], end: int) -> None:
        """Hold the last of `rows`, which end before position `end`, in new buffers."""
        kept = min(rows[0].shape[2], self.window_tokens - 1 + ROLL_BACK_TOKENS)
        self.parts = [cells_like(part, mlx_window_cells(self.window_tokens)) for part in rows]
        self._write([part[..., part.shape[2] - kept :, :] for part in rows], 0)
        self.offset, self.first = end, end - kept


class ChunkKV(WindowKV):
    """Keys and values of a layer whose tokens look back to the start of their chunk.

    The model makes the mask itself, from `start_position`.

    Args:
        chunk_tokens: Size of a chunk.
        capacity_tokens: As in the base class.
    """

    def __init__(self, chunk_tokens: int, capacity_tokens: int | None = None) -> None:
        # mlx-lm's cache shows the model a whole chunk before the new rows.
        super().__init__(chunk_tokens + 1, capacity_tokens)
        self.chunk_size = chunk_tokens

    @property
    def start_position(self) -> int:
        """Position of the first key that the next update returns."""
        return self._visible_from(self.offset)

    def maybe_trim_front(self) -> None:
        """Nothing: an update returns no more than it should anyway."""
