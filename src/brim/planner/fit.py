"""Shortens a context that nobody asked for until the plan fits: only ever down, and it says so."""

import msgspec

from brim.core.calibration import Calibration
from brim.core.machine import MachineSpec
from brim.core.model import ModelSpec
from brim.core.plan import Objective, Plan
from brim.planner.plan import largest_context, make_plan

LEAST_CONTEXT_TOKENS = 2048
"""A question with its answer; a window below it is not worth loading a model for unasked."""


class Room(msgspec.Struct, frozen=True):
    """What is left to be granted, gladly and at most."""

    comfortable_bytes: int
    tight_bytes: int


def fit_plan(
    spec: ModelSpec,
    machine: MachineSpec,
    room: Room,
    *,
    engine: str,
    objective: Objective = Objective.DECODE,
    context_tokens: int | None = None,
    max_sequences: int = 1,
    kv_type: str | None = None,
    calibration: Calibration | None = None,
    is_draft: bool = False,
    is_only_model: bool = False,
) -> Plan:
    """The plan that suits the room: load options give way first, then a context not asked for.

    Where nothing fits, the plan is the one that was wanted, for the account to refuse with the
    ways to make it fit.

    Args:
        spec: The model.
        machine: Where it will run.
        room: What is left to be granted.
        engine: As in `make_plan`, like the rest.
        objective: What to favour.
        context_tokens: A context that was asked for is kept; None for the default, which shrinks.
        max_sequences: Most sequences at once.
        kv_type: Type of K and V, or both as 'K/V'.
        calibration: What was measured of this machine with this engine.
        is_draft: As in `make_plan`, like the next.
        is_only_model: Whether no other model will be loaded beside it.

    Raises:
        ConfigError: A wish contradicts the model, the machine or another wish.
    """

    def planned(objective: Objective, context: int | None, free_bytes: int) -> Plan:
        return make_plan(
            spec,
            machine,
            engine=engine,
            objective=objective,
            context_tokens=context,
            max_sequences=max_sequences,
            kv_type=kv_type,
            free_bytes=free_bytes,
            calibration=calibration,
            is_draft=is_draft,
            is_only_model=is_only_model,
        )

    wanted = planned(objective, context_tokens, room.comfortable_bytes)
    if wanted.memory.total_bytes <= room.comfortable_bytes:
        return wanted
    frugal = planned(Objective.MEMORY, context_tokens, room.tight_bytes)
    for free_bytes, word in ((room.comfortable_bytes, "comfortably"), (room.tight_bytes, "at all")):
        if frugal.memory.total_bytes <= free_bytes:
            return planned(objective, context_tokens, free_bytes)
        if context_tokens is None:
            shorter = largest_context(frugal, machine, free_bytes)
            if shorter is not None and shorter >= LEAST_CONTEXT_TOKENS:
                plan = planned(Objective.MEMORY, shorter, free_bytes)
                return _with_reason(plan, f"the longest that fits {word}: {_full(wanted)}")
    return wanted


def _full(wanted: Plan) -> str:
    return f"{wanted.context_tokens} tokens would take {wanted.memory.total_bytes} bytes"


def _with_reason(plan: Plan, reason: str) -> Plan:
    return msgspec.structs.replace(plan, reasons=plan.reasons | {"context_tokens": reason})
