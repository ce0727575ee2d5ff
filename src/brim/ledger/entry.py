"""What stands in the account: one entry for each granted model, transients, and their sum by term.

Values only; `account` owns the arithmetic of granting.
"""

from enum import StrEnum

import msgspec

from brim.core.memory import MemoryTerms
from brim.core.plan import Verdict


class Phase(StrEnum):
    """How much of its grant a model can hold already."""

    GRANTED = "granted"
    """Nothing is loaded yet: the bytes are set aside."""
    LOADING = "loading"
    """It may take its load peak."""
    LOADED = "loaded"


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One grant in force."""

    name: str
    planned: MemoryTerms
    """What the planner forecast."""
    terms: MemoryTerms
    """What is charged: the forecast with its past errors counted in."""
    verdict: Verdict
    full_kv_bytes: int = 0
    """Of the whole planned pool; `terms.kv_bytes` follows the pool when it is resized."""
    phase: Phase = Phase.GRANTED
    is_forced: bool = False
    """Whether it was entered although it did not fit."""
    measured_bytes: int | None = None
    """What the process was last seen to hold; None before the first reading."""

    @property
    def charged_bytes(self) -> int:
        """What the entry costs the account: its grant, or what it was seen to hold if more."""
        return max(self.terms.total_bytes, self.measured_bytes or 0)

    @property
    def peak_bytes(self) -> int:
        """What it may hold at this moment, its load peak while it loads."""
        if self.phase is Phase.GRANTED:
            return 0
        if self.phase is Phase.LOADING:
            return max(self.charged_bytes, self.terms.load_peak_bytes)
        return self.charged_bytes

    @property
    def held_bytes(self) -> int:
        """What it holds as far as anybody knows: measured, or all of its charge until then."""
        return self.charged_bytes if self.measured_bytes is None else self.measured_bytes


class TransientKind(StrEnum):
    """Bytes that are needed for a moment, beside what models hold."""

    KV_GROWTH = "kv_growth"
    """What a pool takes more once it has grown, and the copy of what it holds meanwhile."""
    PREFIX_CACHE_WRITE = "prefix_cache_write"
    """KV on its way to a file."""


class Transient(msgspec.Struct, frozen=True):
    """One reservation of bytes for a moment; owner and kind name it."""

    owner: str
    kind: TransientKind
    num_bytes: int


class EntryLine(msgspec.Struct, frozen=True, kw_only=True):
    """One model in a `Statement`."""

    name: str
    verdict: Verdict
    phase: Phase
    is_forced: bool
    planned_bytes: int
    """The planner's own forecast."""
    charged_bytes: int
    """What it costs the account."""
    measured_bytes: int | None
    kv_pool_tokens: int
    kv_reserved_tokens: int
    kv_reserved_bytes: int
    """Share of the pool that admitted requests hold; part of `charged_bytes`, not beside it."""


class Statement(msgspec.Struct, frozen=True, kw_only=True):
    """The whole account by one reading of the machine; all terms of all models summed."""

    ram_bytes: int
    others_bytes: int
    reserve_bytes: int
    comfortable_bytes: int
    comfortable_binding: str
    tight_bytes: int
    tight_binding: str
    charged_bytes: int
    """What all entries and transients cost; the terms below add up to it, but for overruns and
    load peaks."""
    weights_mapped_bytes: int
    weights_dirty_bytes: int
    """Weights in anonymous memory, rearranged copies included."""
    kv_committed_bytes: int
    """KV pools of all models."""
    kv_reserved_bytes: int
    """What admitted requests hold of those pools."""
    compute_reserved_bytes: int
    compute_touched_bytes: int
    """The part of the reserved scratch memory that is forecast to be used."""
    overhead_bytes: int
    prefix_cache_bytes: int
    """Writes in flight."""
    transient_bytes: int
    """KV pools that grow."""
    is_simulated: bool = False
    entries: tuple[EntryLine, ...] = ()

    @property
    def free_bytes(self) -> int:
        """What could still be granted."""
        return max(0, self.tight_bytes - self.charged_bytes)
