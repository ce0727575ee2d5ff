"""How one model is loaded: decided before a byte of it is read, with the reason for each choice."""

from enum import StrEnum

import msgspec

from brim.core.memory import MemoryTerms
from brim.core.model import ModelSpec


class Objective(StrEnum):
    """What a plan is good at where one thing costs another."""

    DECODE = "decode"
    PREFILL = "prefill"
    MEMORY = "memory"


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Every load option of one model, and what it will cost."""

    model: ModelSpec
    engine: str
    objective: Objective
    context_tokens: int
    """Longest prompt plus answer of one sequence."""
    kv_tokens: int
    """Cells of the KV pool that all sequences share."""
    max_sequences: int
    max_batch_tokens: int
    """Most rows of one step."""
    micro_batch_tokens: int
    """Most rows that the backend computes at once; sizes its scratch buffers."""
    kv_type_k: str
    kv_type_v: str
    flash_attention: bool
    repack_weights: bool
    num_threads: int
    """Threads of a step with one row: a single sequence that decodes."""
    num_batch_threads: int
    """Threads of a step with more rows: prefill, and several sequences at once."""
    wire_weights: bool = False
    """Hold the weights in memory against the system's wish (MLX on Metal): for a single model that
    takes most of the machine.  Beside other allocations it is what panics kernels."""
    environment: dict[str, str]
    """Set in the worker's environment before it starts (thread wait policy and the like)."""
    memory: MemoryTerms
    reasons: dict[str, str]
    """Option -> why."""


class Verdict(StrEnum):
    """How a plan stands against the budget."""

    COMFORTABLE = "comfortable"
    TIGHT = "tight"
    NO = "no"


class Grant(msgspec.Struct, frozen=True, kw_only=True):
    """The ledger's answer to one `ask`."""

    verdict: Verdict
    asked_bytes: int
    planned_bytes: int = 0
    """What the planner forecast, before past errors of its forecasts were counted in."""
    budget_bytes: int
    """Bytes that were free to be granted under the binding limit."""
    short_bytes: int = 0
    binding: str = ""
    """The term that binds: 'gpu limit', 'ram minus others and reserve', ..."""
    ways_to_fit: tuple[str, ...] = ()
