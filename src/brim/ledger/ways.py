"""What would make a model fit: smaller options, a smaller file, another model stopped."""

from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import NamedTuple

import msgspec

from brim.core.machine import MachineSpec
from brim.core.memory import MemoryTerms
from brim.core.plan import Objective, Plan
from brim.core.units import GIB, gib
from brim.ledger.budget import Limit, budget_of
from brim.planner.plan import largest_context, make_plan

MAX_WAYS = 3
"""As many as one sentence holds."""

QUANTS = {
    "Q8_0": 8.50,
    "Q6_K": 6.56,
    "Q5_K_M": 5.70,
    "Q4_K_M": 4.89,
    "Q3_K_M": 4.00,
    "Q2_K": 3.16,
}
"""Usual recipes, largest first, with the bits per weight of a whole file: good enough to say which
quant is worth looking for.  Source: llama.cpp, tools/quantize/README.md, Llama 3.1 8B."""

MLX_QUANTS = {"MLX 8bit": 8.5, "MLX 6bit": 6.5, "MLX 5bit": 5.5, "MLX 4bit": 4.5, "MLX 3bit": 3.5}
"""The same for MLX: groups of 64 share half a bit of scale and bias for each weight."""

RAM_SIZES_GIB = (8, 16, 18, 24, 32, 36, 48, 64, 96, 128, 192, 256, 512)
"""Sizes that machines with one memory are sold with."""


class Cost(IntEnum):
    """What a way costs the user, cheapest first."""

    OPTIONS = 0
    """Load options alone; the whole context stays."""
    LONG_CONTEXT = 1
    """Half of the context or more stays."""
    EVICT = 2
    """Another model has to be loaded again later."""
    QUANT = 3
    """A download, and some quality."""
    SHORT_CONTEXT = 4
    """Less than half of the context stays."""
    PROGRAMS = 5
    """The user's own work has to go."""
    SMALL_QUANT = 6
    """Below four bits a weight."""
    MODEL = 7
    """Another model altogether."""
    MACHINE = 8


class Way(NamedTuple):
    """One thing to do."""

    cost: Cost
    text: str


def ways_to_fit(
    wanted: Plan | MemoryTerms,
    limit: Limit,
    charges: Mapping[str, int],
    machine: MachineSpec,
    *,
    asked_bytes: int,
) -> tuple[str, ...]:
    """The three cheapest things to do, each of which alone brings the wish under the limit.

    Args:
        wanted: What was asked for.
        limit: The bound that it went over.
        charges: What each granted model costs, by name.
        machine: The reading that the limit came from.
        asked_bytes: What the wish costs there: more than planned where past errors or a load peak
            count; another plan's bytes are taken to grow alike.
    """
    free = limit.num_bytes - sum(charges.values())
    terms = wanted.memory if isinstance(wanted, Plan) else wanted
    ways = list(_by_evicting(asked_bytes, free, charges))
    if isinstance(wanted, Plan):
        planned_free = free * min(terms.total_bytes, asked_bytes) // max(1, asked_bytes)
        ways += _by_options(wanted, planned_free, machine)
        ways += _by_file(wanted, planned_free)
    if limit.num_bytes >= budget_of(machine).tight.num_bytes:
        # What fits, if not with comfort, needs no other machine.
        ways += _by_machine(asked_bytes, sum(charges.values()), machine)
    short = asked_bytes - free
    if limit.binding.startswith("ram minus others") and machine.others_bytes >= short:
        ways.append(Way(Cost.PROGRAMS, f"close other programs that use {gib(short)}"))
    # Sorting is stable: of equal cost, the order above stays.
    return tuple(way.text for way in sorted(ways, key=lambda way: way.cost)[:MAX_WAYS])


def replan(
    plan: Plan,
    machine: MachineSpec,
    *,
    context_tokens: int | None = None,
    objective: Objective | None = None,
) -> Plan:
    """The same model planned again with another context or objective; None keeps the plan's."""
    return make_plan(
        plan.model,
        machine,
        engine=plan.engine,
        objective=plan.objective if objective is None else objective,
        context_tokens=plan.context_tokens if context_tokens is None else context_tokens,
        max_sequences=plan.max_sequences,
    )


def _by_evicting(asked_bytes: int, free_bytes: int, charges: Mapping[str, int]) -> Iterable[Way]:
    """Models of which one alone gives enough back, smallest first."""
    for name, charged in sorted(charges.items(), key=lambda item: item[1]):
        if free_bytes + charged >= asked_bytes:
            yield Way(Cost.EVICT, f"stop {name} ({gib(charged)})")


def _by_options(plan: Plan, free_bytes: int, machine: MachineSpec) -> Iterable[Way]:
    """A shorter context, and load options that favour memory: alone, then together."""
    context = largest_context(plan, machine, free_bytes)
    if context:
        yield Way(_context_cost(context, plan), f"a context of {context} tokens (--ctx {context})")
    if plan.engine == "toy":
        return
    frugal = replan(plan, machine, objective=Objective.MEMORY)
    if frugal.memory.total_bytes >= plan.memory.total_bytes:
        return
    mapped = ", weights mapped" if frugal.memory.mapped_bytes else ""
    kinds = f"{frugal.kv_type_k} KV{mapped}"
    if frugal.memory.total_bytes <= free_bytes:
        text = f"{kinds} (--objective memory, {gib(frugal.memory.total_bytes)})"
        yield Way(Cost.OPTIONS, text)
    elif not context and (context := largest_context(frugal, machine, free_bytes)):
        flags = f"--objective memory --ctx {context}"
        text = f"{kinds} and a context of {context} tokens ({flags})"
        yield Way(_context_cost(context, plan), text)


def _context_cost(context_tokens: int, plan: Plan) -> Cost:
    is_long = 2 * context_tokens >= plan.context_tokens
    return Cost.LONG_CONTEXT if is_long else Cost.SHORT_CONTEXT


def _by_file(plan: Plan, free_bytes: int) -> Iterable[Way]:
    """A smaller quant: the largest usual one whose weights have room beside everything else."""
    terms, num_parameters = plan.memory, plan.model.num_parameters
    room = free_bytes - (terms.total_bytes - terms.weights_bytes - terms.repacked_bytes)
    if room <= 0 or not terms.weights_bytes or not num_parameters:
        return
    own_bits = 8 * terms.weights_bytes / num_parameters
    quants = MLX_QUANTS if plan.engine == "mlx" else QUANTS
    for name, bits in quants.items():
        num_bytes = int(num_parameters * bits / 8)
        if bits < own_bits and num_bytes <= room:
            cost = Cost.QUANT if bits > 4 else Cost.SMALL_QUANT
            yield Way(
                cost,
                f"a smaller quant, such as {name} (about {gib(num_bytes)} of weights instead of "
                f"{gib(terms.weights_bytes)})",
            )
            break
    yield Way(
        Cost.MODEL,
        f"a smaller model: at most {gib(room)} of weights, this one has {gib(terms.weights_bytes)}",
    )


def _by_machine(asked_bytes: int, charged: int, machine: MachineSpec) -> Iterable[Way]:
    """The smallest usual machine that would have room, its GPU's share as it is here."""
    needed = charged + asked_bytes
    for size in RAM_SIZES_GIB:
        ram_bytes, share = size * GIB, machine.gpu_limit_bytes
        if share is not None:
            share = share * ram_bytes // max(1, machine.ram_bytes)
        larger = msgspec.structs.replace(machine, ram_bytes=ram_bytes, gpu_limit_bytes=share)
        if ram_bytes > machine.ram_bytes and needed <= budget_of(larger).tight.num_bytes:
            yield Way(Cost.MACHINE, f"a machine with {size} GB of memory")
            return
