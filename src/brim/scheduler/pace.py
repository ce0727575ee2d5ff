"""How long steps take, learnt from those that ran; and how many prompt rows fit into the next one.

A step's time is taken as that of its decoding rows alone plus so much for each prompt row.  Both
are running means of what was measured, so they follow the depth of the contexts, the heat of the
chip and other programs.
"""

from typing import NamedTuple

TILE_ROWS = 16
"""The cost of a step grows in stairs of this many rows; a step in between pays for the next stair.
Source: measured on llama.cpp's CPU backend, where 65 rows cost far more than 64."""

PREFILL_STEP_ROWS = 512
"""Rows of a step in which nothing decodes: nobody waits for it, and larger gains no speed."""

SLACK = 1.2
"""A step of whole kernel tiles may be so much longer than the target.  With flash attention on a
CPU 64 rows take 384 ms at a depth of 900 tokens where 48 take 402 and 32 take 271 (1.24 B Q4_K_M,
2 cores): the next smaller step that fits costs half as much again for each row.  What a tile is
found to take lags behind a context that grows: with a quarter more the longest pause was 0.41 s,
with a fifth it is 0.39."""

FOREIGN_CELLS = 1.8
"""A tile's rows all compute attention over every cell that one of them looks at.  Cells of others
that a prompt row computes in vain cost as much as it saves on so many of its own by being in a
tile.  By this, a tile pays from a depth of 230, 630, 1,020 tokens on beside three sequences of 150,
seven of 150 and three of 600; measured were 260, 770 and 800 (CPU time on one thread, 1.24 B
Q4_K_M).  At a depth of 0 beside seven sequences of 600 a row costs 22.5 ms in a tile and 9.8 ms in
none; alone at a depth of 1,280 it is 14 against 20."""

LEAST_FRACTION = 1 / 32
"""Of the stall target and of a prompt's rows that a limit may leave: one tile of 512 rows."""

LIKELY_GAIN = 0.8
"""Cost of a row in whole tiles to that in parts of one, before any was measured; only to try it."""

RISE, FALL = 0.5, 0.2
"""Weight of a new measurement: slower is believed sooner than faster, since a step that turns out
too long is a stall and one that turns out too short only costs a little speed."""

LIKELY_ROW_S = 1e-3
"""Of a prompt row before anything was measured; only the order of the queue is made of it."""

LEAST_ROW_S = 1e-9
"""No clock shows less; a stopped one must not divide by nothing."""

MAX_SURPRISE = 8.0
"""A step this many times longer than expected was held up by something else (a suspended machine),
and counts as no more than that."""


class Depths(NamedTuple):
    """How much attention a mixed step computes, in cells."""

    num_decode_cells: int = 0
    """Those of all decoding sequences together."""
    num_prompt_cells: int = 0
    """Those before the prompt's next row."""


SHALLOW = Depths()


class StepPace:
    """Learns the cost of steps and sizes the next one.

    Args:
        stall_target_s: Length of a step while something decodes; the tiles that come nearest.
        max_rows: Most rows of any step.
        tile_rows: Rows that the engine's kernels take together (`Capabilities.tile_rows`).
    """

    def __init__(self, stall_target_s: float, max_rows: int, tile_rows: int = TILE_ROWS) -> None:
        self._full_target_s = stall_target_s
        self._fraction = 1.0
        self._max_rows = max_rows
        self._tile_rows = tile_rows
        self._decode_s: dict[int, float] = {}
        self._row_s: float | None = None
        self._mixed_row_s: float | None = None
        self._whole_row_s: float | None = None
        """Of steps of whole kernel tiles, where those are larger than `TILE_ROWS`."""

    @property
    def stall_target_s(self) -> float:
        """Length of a step while something decodes."""
        return self._full_target_s * self._fraction

    def limit(self, fraction: float) -> None:
        """Have steps be this share of what they may be: of the target, or of rows read alone."""
        self._fraction = min(1.0, max(LEAST_FRACTION, fraction))

    @property
    def row_s(self) -> float:
        """Seconds a prompt row, as far as is known."""
        return self._whole_row_s or self._mixed_row_s or self._row_s or LIKELY_ROW_S

    def prefill_rows(
        self,
        num_decode_rows: int,
        spent_s: float = 0.0,
        *,
        is_background: bool = False,
        depths: Depths = SHALLOW,
    ) -> int:
        """Prompt rows for the next step.

        Args:
            num_decode_rows: Rows that decode in it.
            spent_s: Time that has gone into this round already, on restoring or keeping KV.
            is_background: Whether nobody waits for the prompts that are read: a question that
                comes meanwhile must not wait longer than an answer may pause.
            depths: How deep the sequences are; without them tiles are judged by their time alone.
        """
        if num_decode_rows == 0 and not is_background:
            num_tiles = int(self._fraction * PREFILL_STEP_ROWS) // TILE_ROWS
            return min(num_tiles * TILE_ROWS, self._max_rows)
        room_s = self.stall_target_s - spent_s - self._decode_only_s(num_decode_rows)
        total = self._whole_tiles(num_decode_rows, room_s)
        if total == 0 or self._is_spoilt(total - num_decode_rows, depths):
            total = self._tiles(num_decode_rows, room_s)
        return min(total - num_decode_rows, PREFILL_STEP_ROWS, self._max_rows - num_decode_rows)

    def _tiles(self, num_decode_rows: int, room_s: float) -> int:
        """Rows in all: the number of tiles that comes nearest, and half a one for the prompt.

        The nearest, because always the number below would cost a third of the speed where tiles
        are dear.
        """
        row_s = self._mixed_row_s or self._row_s
        num_rows = TILE_ROWS if row_s is None else max(0, int(room_s / max(row_s, LEAST_ROW_S)))
        least = -(-(num_decode_rows + TILE_ROWS // 2) // TILE_ROWS)
        num_tiles = round((num_decode_rows + num_rows) / TILE_ROWS)
        if self._tile_rows > TILE_ROWS:
            # From a whole kernel tile on, its kernel takes the rest too.
            num_tiles = min(num_tiles, self._tile_rows // TILE_ROWS - 1)
        return TILE_ROWS * max(least, num_tiles)

    def _whole_tiles(self, num_decode_rows: int, room_s: float) -> int:
        """Rows in all as whole kernel tiles; 0 where none fits or none is larger than usual."""
        known = self._mixed_row_s or self._row_s
        if self._tile_rows == TILE_ROWS or known is None:
            return 0
        row_s = self._whole_row_s or min(self._row_s or known, LIKELY_GAIN * known)
        room_s += (SLACK - 1) * self.stall_target_s
        num_rows = num_decode_rows + int(room_s / max(row_s, LEAST_ROW_S))
        total = num_rows // self._tile_rows * self._tile_rows
        return total if total > num_decode_rows and total <= self._max_rows else 0

    def _is_spoilt(self, num_prompt_rows: int, depths: Depths) -> bool:
        """Whether the decoding rows' cells make a kernel tile dearer than it is worth."""
        num_vain = depths.num_decode_cells * self._tile_rows / num_prompt_rows
        return num_vain > FOREIGN_CELLS * (depths.num_prompt_cells + num_prompt_rows / 2)

    def observe(self, num_decode_rows: int, num_prefill_rows: int, step_s: float) -> None:
        """Learn from a step that ran."""
        if num_prefill_rows == 0:
            known = self._decode_s.get(num_decode_rows)
            self._decode_s[num_decode_rows] = _mean(known, step_s)
        elif num_decode_rows == 0:
            self._row_s = _mean(self._row_s, step_s / num_prefill_rows)
        elif num_prefill_rows >= TILE_ROWS // 2:
            # Of a few rows nothing can be told: they ride along in the decoding rows' tile.
            rest_s = max(0.0, step_s - self._decode_only_s(num_decode_rows))
            row_s = rest_s / num_prefill_rows
            if self._tile_rows > TILE_ROWS and self._is_whole(num_decode_rows + num_prefill_rows):
                self._whole_row_s = _mean(self._whole_row_s, row_s)
            else:
                self._mixed_row_s = _mean(self._mixed_row_s, row_s)
                if self._whole_row_s is not None:
                    # What whole tiles cost in a deep context must not keep them from being tried
                    # again in a shallow one.
                    likely_s = min(self._whole_row_s, LIKELY_GAIN * row_s)
                    self._whole_row_s = _mean(self._whole_row_s, likely_s)

    def _is_whole(self, num_rows: int) -> bool:
        return num_rows % self._tile_rows == 0

    def _decode_only_s(self, num_rows: int) -> float:
        """Of a step in which so many sequences decode and nothing is read."""
        known = 0.0 if num_rows == 0 else self._decode_s.get(num_rows)
        if known is not None or not self._decode_s:
            return known or 0.0
        nearest = min(self._decode_s, key=lambda other: abs(other - num_rows))
        return self._decode_s[nearest]


def _mean(known: float | None, new: float) -> float:
    if known is None or known <= 0.0:
        return new
    new = min(new, MAX_SURPRISE * known)
    return known + (RISE if new > known else FALL) * (new - known)
