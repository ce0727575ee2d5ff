"""Which engine a model runs on: by the forms it is at hand in, the machine, and what was asked."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from brim.cli.speed_sources import usable_calibration
from brim.core.machine import MachineSpec
from brim.core.model import ModelSpec
from brim.core.plan import Objective
from brim.engine.factory import available_engines, check_name, how_to_install
from brim.errors import BrimError, ConfigError
from brim.planner.engine_choice import choose_engine
from brim.planner.fit import Room
from brim.registry.catalogue import perplexity_increase_percent
from brim.registry.forms import Form, how_to_get_gguf

ENGINE_OF_FORMAT = {"gguf": "llamacpp", "safetensors": "mlx", "toy": "toy"}
"""The engine that loads each form."""

FORM_OF_ENGINE = {
    "llamacpp": "in GGUF form",
    "mlx": "in safetensors form",
    "toy": "the teaching engine's, without weights",
}
"""Of a model that the engine loads, as it stands in a sentence."""

ASKED_FOR = "asked for"


class Chosen(NamedTuple):
    """The form of a model that is taken, and the engine that loads it."""

    form: Form
    engine: str
    reason: str


def choose_form(
    forms: Sequence[Form],
    machine: MachineSpec,
    *,
    engine: str | None = None,
    is_loaded: bool = True,
    room: Room | None = None,
    objective: Objective = Objective.DECODE,
    context_tokens: int | None = None,
    max_sequences: int = 1,
    kv_type: str | None = None,
) -> Chosen:
    """The form of a model for this machine, or for one that is planned for.

    Args:
        forms: At least one.
        machine: Where it will run.
        engine: The one asked for; None leaves it to the planner.
        is_loaded: Whether the model is to be loaded now, by an engine that must be installed.
        room: As in `planner.engine_choice.choose_engine`, like the rest; counts where the planner
            has a choice.
        objective: What to favour.
        context_tokens: A context that was asked for.
        max_sequences: Most sequences at once.
        kv_type: A KV type that was asked for.

    Raises:
        ConfigError: The engine that was asked for does not load any of them, or none is installed
            that does.
        BrimError: No form can be described.
    """
    by_engine = {ENGINE_OF_FORMAT[form.format]: form for form in forms}
    installed = available_engines()
    if engine is not None:
        return _asked_for(by_engine, engine, installed if is_loaded else None)
    if not is_loaded and not machine.is_at_hand:
        installed = frozenset(by_engine)  # what another machine has is its owner's to install
    usable = {name: form for name, form in by_engine.items() if name in installed}
    if not usable:
        (name, form), *_ = by_engine.items()
        if is_loaded:
            raise ConfigError(_without_engine(name, form), param="engine")
        return Chosen(form, name, f"{_form_reason(name)}; {how_to_install(name)}")
    if len(usable) == 1:
        ((name, form),) = usable.items()
        return Chosen(form, name, _reason_of_single(name, by_engine))
    specs = _described(usable)
    choice = choose_engine(
        specs,
        machine,
        available=frozenset(specs),
        room=room,
        objective=objective,
        context_tokens=context_tokens,
        max_sequences=max_sequences,
        kv_type=kv_type,
        perplexity_increase_percent={
            name: perplexity_increase_percent(spec.quant) for name, spec in specs.items()
        },
        calibrations={name: usable_calibration(name, machine) for name in specs},
    )
    return Chosen(usable[choice.engine], choice.engine, choice.reason)


def _asked_for(
    by_engine: Mapping[str, Form], engine: str, installed: frozenset[str] | None
) -> Chosen:
    check_name(engine)
    if engine not in by_engine:
        raise ConfigError(_without_form(by_engine, engine), param="engine")
    if installed is not None and engine not in installed:
        if not installed.isdisjoint(by_engine):  # another form is at hand, and can be loaded
            raise ConfigError(f"{how_to_install(engine)}, or leave --engine out", param="engine")
        raise ConfigError(_without_engine(engine, by_engine[engine]), param="engine")
    return Chosen(by_engine[engine], engine, ASKED_FOR)


def _reason_of_single(name: str, by_engine: Mapping[str, Form]) -> str:
    missing = [other for other in by_engine if other != name]
    if missing:
        return f"the {missing[0]} engine, which loads its other form, is not installed here"
    return _form_reason(name)


def _form_reason(engine: str) -> str:
    return f"the model is {FORM_OF_ENGINE[engine]}, which this engine loads"


def _without_form(by_engine: Mapping[str, Form], engine: str) -> str:
    """Why an engine cannot have this model, and what to do."""
    (other, form), *_ = by_engine.items()
    spec = form.describe()
    start = f"{spec.name} is {FORM_OF_ENGINE[other]}, which the {engine} engine does not load: "
    if other == "toy" or engine == "toy":
        return f"{start}leave --engine out"
    if engine == "llamacpp":
        return f"{start}leave --engine out, or {how_to_get_gguf(spec)}"
    return (
        f"{start}leave --engine out, or name the model in safetensors form "
        "(its directory, or a repository such as those of hf:mlx-community)"
    )


def _without_engine(engine: str, form: Form) -> str:
    text = how_to_install(engine)
    return f"{text}, or {how_to_get_gguf(form.describe())}" if engine == "mlx" else text


def _described(forms: Mapping[str, Form]) -> dict[str, ModelSpec]:
    """The forms that can be described, by engine.

    Raises:
        BrimError: None can be; says what the first one lacks.
    """
    specs: dict[str, ModelSpec] = {}
    problems: list[BrimError] = []
    for engine, form in forms.items():
        try:
            specs[engine] = form.describe()
        except BrimError as exc:  # such as a repository with several GGUF files of one quant
            problems.append(exc)
    if not specs:
        raise problems[0]
    return specs
