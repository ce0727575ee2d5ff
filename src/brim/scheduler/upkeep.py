"""Lets idle sequences go once keeping them has cost others what having them again would cost.

Where all sequences share one pool, each row of a step passes over the cells of all of them: beside
10,240 idle cells a step of one row takes 1.26 times as long, one of eight rows 1.18 times (1.24 B
Q4_K_M, one x86-64 core, `make bench-steps`).  Whether a conversation will go on nobody knows.
Keeping its sequence until the rent has reached the price is at most twice as dear as what was best,
known afterwards: the rule for renting skis or buying them.
"""

from brim.core.plan import Plan
from brim.engine.base import Engine
from brim.scheduler.pool import Held, Pool
from brim.scheduler.reuse import Reuse

LEAST_CELLS = 512
"""So many idle cells are kept whatever they cost: they make a row 1.3 % longer, measured as above,
and the questions that follow each other at once stay in memory."""

PERIOD_ROWS = 64
"""Rows between two looks: the cheapest sequences to have again are due after some hundreds."""

RESTORED_BYTES_S = 1e9
"""From disk into cells: 10 GB/s where the file is in the page cache, 0.3 from a slow disk."""

FILE_S = 0.002
"""To find, open and check an entry's file, whatever it holds."""


class Upkeep:
    """Counts rents, and evicts what has paid its price.

    Args:
        engine: Says what a cell of another sequence costs a row.
        plan: Its plan, for the bytes of a token.
        pool: The sequences.
        reuse: Knows what of them is on disk.
    """

    def __init__(self, engine: Engine, plan: Plan, pool: Pool, reuse: Reuse) -> None:
        self._cell_s = engine.capabilities.foreign_cell_s
        self._restored_s = plan.memory.kv_bytes / max(1, plan.kv_tokens) / RESTORED_BYTES_S
        self._pool = pool
        self._reuse = reuse
        self._next_rows = 0

    def settle(self, row_s: float) -> None:
        """Let those go that are due, the longest overdue first; between two steps.

        Args:
            row_s: Seconds that a prompt token takes.
        """
        pool = self._pool
        if not self._cell_s or pool.num_rows < self._next_rows:
            return
        self._next_rows = pool.num_rows + PERIOD_ROWS
        if pool.num_idle_cells <= LEAST_CELLS:
            return
        due = [(self._rent_s(held) / self._price_s(held, row_s), held) for held in pool.idle()]
        for ratio, held in sorted(due, key=lambda pair: pair[0], reverse=True):
            if ratio < 1.0 or pool.num_idle_cells <= LEAST_CELLS:
                return
            if not self._reuse.is_waiting(held):
                pool.evict(held)

    def _rent_s(self, held: Held) -> float:
        """What steps were longer by since it went idle.

        Cells that others hold too cost nothing: they would be there without it.
        """
        num_rows = self._pool.num_rows - held.idle_since_rows
        return self._pool.num_own_cells(held) * self._cell_s * num_rows

    def _price_s(self, held: Held, row_s: float) -> float:
        """What it takes to have its tokens again, as often as it was of use before."""
        num_kept = self._reuse.num_on_disk(held)
        price_s = (len(held.tokens) - num_kept) * row_s
        if num_kept:
            price_s += FILE_S + num_kept * self._restored_s
        return max(price_s, FILE_S) * (1 + held.num_uses)
