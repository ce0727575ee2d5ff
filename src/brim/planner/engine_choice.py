"""Picks the engine, and with it the form, of a model that is at hand in several; says why.

In this order: what exists and is installed, what can be planned as wished, what fits, what is much
faster at no worse quality, and otherwise the platform's default: MLX on Apple silicon, llama.cpp
everywhere else.  Answers are as good as forecasts are, so a default gives way to large differences
alone.
"""

from collections.abc import Mapping

import msgspec

from brim.core.calibration import Calibration
from brim.core.forecast import SpeedRange
from brim.core.machine import MachineSpec
from brim.core.model import ModelSpec
from brim.core.plan import Objective, Plan
from brim.core.units import gib
from brim.errors import ConfigError
from brim.planner.fit import Room, fit_plan
from brim.planner.forecast import forecast_plan

FASTER = 1.3
"""What another engine must be forecast to gain before it takes the default's place.

Forecasts for Apple silicon are within 20 % for most published rows, so of two of them a difference
below 30 % may be none; and a default that changes with every prompt length helps nobody.
"""

NAMES = {"mlx": "MLX", "llamacpp": "llama.cpp", "toy": "the toy engine"}


class EngineChoice(msgspec.Struct, frozen=True, kw_only=True):
    """The engine that a model is to run on, and why."""

    engine: str
    reason: str
    """One clause, without a full stop."""


class _Outlook(msgspec.Struct, frozen=True):
    """What became of planning one form."""

    plan: Plan | None
    problem: str
    decode_tok_s: SpeedRange | None


def default_engine(machine: MachineSpec) -> str:
    """MLX where macOS lets a GPU share the memory, llama.cpp everywhere else.

    Example:
        >>> linux = MachineSpec(name="x", system="linux", ram_bytes=2**34, others_bytes=0)
        >>> default_engine(linux)
        'llamacpp'
    """
    is_apple_gpu = machine.system == "darwin" and machine.gpu_limit_bytes is not None
    return "mlx" if is_apple_gpu else "llamacpp"


def choose_engine(
    forms: Mapping[str, ModelSpec],
    machine: MachineSpec,
    *,
    available: frozenset[str],
    room: Room | None = None,
    objective: Objective = Objective.DECODE,
    context_tokens: int | None = None,
    max_sequences: int = 1,
    kv_type: str | None = None,
    perplexity_increase_percent: Mapping[str, float | None] | None = None,
    calibrations: Mapping[str, Calibration | None] | None = None,
) -> EngineChoice:
    """The engine for a model on a machine.

    Args:
        forms: The model by the engine that loads it in that form.
        machine: Where it will run.
        available: Engines that are installed; for a machine that is not at hand, all of them.
        room: What is left to be granted; None leaves fit out of the choice.
        objective: As in `make_plan`, like the next three.
        context_tokens: A context that was asked for.
        max_sequences: Most sequences at once.
        kv_type: A KV type that was asked for.
        perplexity_increase_percent: By engine, what its form's quant is known to cost; an engine
            whose cost is not known never counts as no worse.
        calibrations: By engine, what was measured of this machine with it.

    Raises:
        ConfigError: No engine is installed that loads one of the forms.
    """
    usable = {name: forms[name] for name in sorted(forms) if name in available}
    if not usable:
        raise ConfigError(_none_usable(forms), param="engine")
    default = default_engine(machine)
    first = default if default in usable else min(usable)
    if len(usable) == 1:
        return EngineChoice(engine=first, reason=_only(first, default, forms, available))
    outlooks = {
        name: _outlook(
            spec, machine, name, room, objective, context_tokens, max_sequences, kv_type,
            (calibrations or {}).get(name),
        )
        for name, spec in usable.items()
    }  # fmt: skip
    others = [name for name in usable if name != first]
    for name in others:
        if reason := _why_instead(first, name, outlooks, room):
            return EngineChoice(engine=name, reason=reason)
    costs = perplexity_increase_percent or {}
    faster = [
        (gain, name) for name in others if (gain := _gain(first, name, outlooks, costs)) >= FASTER
    ]
    if faster:
        gain, name = max(faster)
        reason = (
            f"{NAMES[name]} is forecast {gain:.1f} times as fast as {NAMES[first]} here, "
            "at no worse quality"
        )
        return EngineChoice(engine=name, reason=reason)
    return EngineChoice(engine=first, reason=_by_default(first, default))


def _outlook(
    spec: ModelSpec,
    machine: MachineSpec,
    engine: str,
    room: Room | None,
    objective: Objective,
    context_tokens: int | None,
    max_sequences: int,
    kv_type: str | None,
    calibration: Calibration | None,
) -> _Outlook:
    try:
        plan = fit_plan(
            spec,
            machine,
            room or Room(machine.ram_bytes, machine.ram_bytes),
            engine=engine,
            objective=objective,
            context_tokens=context_tokens,
            max_sequences=max_sequences,
            kv_type=kv_type,
            calibration=calibration,
        )
    except ConfigError as exc:
        return _Outlook(None, exc.message, None)
    speed = forecast_plan(plan, machine, calibration=calibration).speed
    return _Outlook(plan, "", None if speed is None else speed.decode_tok_s)


def _why_instead(
    first: str, other: str, outlooks: Mapping[str, _Outlook], room: Room | None
) -> str | None:
    """Why another engine must take the place of the first; None where it need not or cannot."""
    mine, theirs = outlooks[first], outlooks[other]
    if theirs.plan is None:
        return None
    if mine.plan is None:
        return f"{NAMES[first]} cannot have it as asked: {mine.problem}"
    if room is None:
        return None
    for free, word in ((room.tight_bytes, "fits"), (room.comfortable_bytes, "fits in comfort")):
        needed, their_bytes = mine.plan.memory.total_bytes, theirs.plan.memory.total_bytes
        if needed > free >= their_bytes:
            return (
                f"{_form(theirs.plan)} {word} with {gib(their_bytes)}; "
                f"{_form(mine.plan)} needs {gib(needed)} of {gib(free)}"
            )
    return None


def _gain(
    first: str,
    other: str,
    outlooks: Mapping[str, _Outlook],
    costs: Mapping[str, float | None],
) -> float:
    """Times that another engine decodes as fast, where its answers are no worse; otherwise 0."""
    mine, theirs = outlooks[first].decode_tok_s, outlooks[other].decode_tok_s
    my_cost, their_cost = costs.get(first), costs.get(other)
    if mine is None or theirs is None or my_cost is None or their_cost is None:
        return 0.0
    return theirs.expected / mine.expected if their_cost <= my_cost else 0.0


def _form(plan: Plan) -> str:
    return f"{plan.model.quant} in {NAMES[plan.engine]}"


def _only(
    engine: str, default: str, forms: Mapping[str, ModelSpec], available: frozenset[str]
) -> str:
    missing = [name for name in sorted(forms) if name not in available]
    if missing:
        what = " and ".join(NAMES[name] for name in missing)
        return f"{what}, which would load another form of the model, is not installed here"
    if engine == default:
        return f"{_by_default(engine, default)}, and the model is at hand in its form alone"
    return f"the model is at hand in a form that only {NAMES[engine]} loads"


def _by_default(engine: str, default: str) -> str:
    if engine != default:
        return f"{NAMES[default]}, the default here, does not load any form of the model"
    if engine == "mlx":
        return "MLX is the default on Apple silicon"
    return "llama.cpp is the default where there is no Apple GPU"


def _none_usable(forms: Mapping[str, ModelSpec]) -> str:
    if not forms:
        return "the model is at hand in no form that an engine loads; name its file or directory"
    engines = " or ".join(NAMES[name] for name in sorted(forms))
    return (
        f"the model needs {engines}, which is not installed here; "
        "install it, or name another form of the model"
    )
