"""What would make a model fit: smaller options, a smaller file, another model stopped."""

from collections.abc import Mapping

from brim.core.machine import MachineSpec
from brim.core.memory import MemoryTerms
from brim.core.plan import Objective, Plan
from brim.ledger.budget import Limit
from brim.planner.plan import largest_context, make_plan

GIB = 1024**3


def gib(num_bytes: int) -> str:
    """Bytes for a reader.

    Example:
        >>> gib(3 * 2**30 // 2)
        '1.50 GiB'
    """
    return f"{num_bytes / GIB:.2f} GiB"


def ways_to_fit(
    wanted: Plan | MemoryTerms, limit: Limit, charges: Mapping[str, int], machine: MachineSpec
) -> tuple[str, ...]:
    """Things to do, each of which alone brings the wish under the limit; cheapest first.

    Args:
        wanted: What was asked for.
        limit: The bound that it went over.
        charges: What each granted model costs, by name.
        machine: The reading that the limit came from.
    """
    free = limit.num_bytes - sum(charges.values())
    ways: list[str] = []
    if isinstance(wanted, Plan):
        ways += _by_options(wanted, free, machine)
    terms = wanted.memory if isinstance(wanted, Plan) else wanted
    ways += [
        f"stop {name} ({gib(charged)})"
        for name, charged in sorted(charges.items(), key=lambda item: item[1])
        if free + charged >= terms.total_bytes
    ]
    if isinstance(wanted, Plan) and not ways:
        ways += _by_file(wanted, free)
    short = terms.total_bytes - free
    if limit.binding.startswith("ram minus others") and machine.others_bytes >= short:
        ways.append(f"close other programs that use {gib(short)}")
    return tuple(ways)


def _by_options(plan: Plan, free_bytes: int, machine: MachineSpec) -> list[str]:
    """A shorter context, and load options that favour memory: alone, then together."""
    ways = []
    if context := largest_context(plan, machine, free_bytes):
        ways.append(f"a context of {context} tokens (--ctx {context})")
    if plan.engine == "toy":
        return ways
    frugal = make_plan(
        plan.model,
        machine,
        engine=plan.engine,
        objective=Objective.MEMORY,
        context_tokens=plan.context_tokens,
        max_sequences=plan.max_sequences,
    )
    kinds = f"{frugal.kv_type_k} KV, weights mapped"
    if frugal.memory.total_bytes < plan.memory.total_bytes:
        if frugal.memory.total_bytes <= free_bytes:
            ways.append(f"{kinds} (--objective memory, {gib(frugal.memory.total_bytes)})")
        elif not ways and (context := largest_context(frugal, machine, free_bytes)):
            flags = f"--objective memory --ctx {context}"
            ways.append(f"{kinds} and a context of {context} tokens ({flags})")
    return ways


def _by_file(plan: Plan, free_bytes: int) -> list[str]:
    """A smaller quant, where the file itself is what is too large."""
    terms = plan.memory
    room = free_bytes - (terms.total_bytes - terms.weights_bytes - terms.repacked_bytes)
    if room <= 0 or not terms.weights_bytes:
        return []
    return [
        f"a smaller quant or model: at most {gib(room)} of weights, "
        f"this one has {gib(terms.weights_bytes)}"
    ]
