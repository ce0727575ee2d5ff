"""From what was asked on the command line to a plan; shared by `run` and `serve`."""

import re
from collections.abc import Sequence
from pathlib import Path

import msgspec

from brim.cli.dispatch import ENGINE_OF_FORMAT as ENGINE_OF_FORMAT
from brim.cli.dispatch import choose_form
from brim.cli.speed_sources import usable_calibration
from brim.config.tree import ModelSettings, Settings
from brim.core.machine import MachineSpec
from brim.core.plan import Grant, Objective, Plan, Verdict
from brim.errors import ConfigError
from brim.ledger.budget import budget_of
from brim.planner.fit import Room
from brim.planner.plan import make_plan
from brim.registry.sources import forms_of

DEMO = "demo"

HOW_TO_GET_A_MODEL = "for a real one: -m FILE.gguf, -m MODEL_DIR or -m hf:ORG/REPO"


MAX_SEQUENCES = 256
"""As many as llama.cpp takes."""

MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]*")
"""Names that a model may be served under; no slash, so that a path is not taken for one."""


def split_name(text: str) -> tuple[str | None, str]:
    """The name in NAME=REF, if there is one, and the reference.

    A file whose path contains '=' is that file.

    Raises:
        ConfigError: What stands before the '=' is no name, and there is no such file.

    Example:
        >>> split_name("small=demo"), split_name("hf:ORG/REPO")
        (('small', 'demo'), (None, 'hf:ORG/REPO'))
    """
    name, separator, reference = text.partition("=")
    if not separator or text.startswith("hf:") or _exists(text):
        return None, text
    if not MODEL_NAME.fullmatch(name):
        raise ConfigError(
            f"there is no file '{text:.200}', and '{name:.100}' is no name for a model: "
            "give NAME=REF with a NAME of letters, digits and . _ : -",
            param="model",
        )
    return name, reference


def _exists(text: str) -> bool:
    try:
        return Path(text).expanduser().exists()
    except (OSError, RuntimeError):  # too long for a path, or no such user's home
        return False


def plan_model(
    reference: str,
    machine: MachineSpec,
    settings: Settings,
    *,
    name: str | None = None,
    engine: str | None = None,
    objective: Objective | None = None,
    context_tokens: int | None = None,
    max_sequences: int | None = None,
    is_only_model: bool = False,
) -> Plan:
    """How the model that `reference` names is loaded; flags that are None follow the settings.

    Args:
        reference: What the user typed.
        machine: A fresh reading.
        settings: The settings.
        name: What clients will call it; by the reference unless given.
        engine: By the forms the model is at hand in, and the machine, unless given.
        objective: By the settings unless given.
        context_tokens: A wish, which must suit the model; the setting's value gives way to it.
        max_sequences: By the settings, for this model or for all, unless given.
        is_only_model: Whether no other model is loaded or will be.

    Raises:
        BrimError: The model cannot be found or read, or a wish contradicts it.
    """
    objective = settings.models.objective if objective is None else objective
    num_wished = max_sequences
    if max_sequences is None:
        max_sequences = sequences_of(settings.models, name)
    budget = budget_of(machine)
    chosen = choose_form(
        forms_of(reference, name=name),
        machine,
        engine=engine,
        room=Room(budget.comfortable.num_bytes, budget.tight.num_bytes),
        objective=objective,
        context_tokens=context_tokens,
        max_sequences=max_sequences,
    )
    spec = chosen.form.fetch()
    if num_wished is None:
        max_sequences = sequences_of(settings.models, spec.name)  # known by its name only now
    if context_tokens is None:
        context_tokens = min(settings.models.context_tokens, spec.trained_context_tokens)
    plan = make_plan(
        spec,
        machine,
        engine=chosen.engine,
        objective=objective,
        context_tokens=context_tokens,
        max_sequences=max_sequences,
        calibration=usable_calibration(chosen.engine, machine),
        is_only_model=is_only_model,
        exact_profile=settings.models.exact_profile,
    )
    return with_engine_reason(plan, chosen.reason)


def sequences_of(settings: ModelSettings, name: str | None) -> int:
    """Most sequences of one model: what `models.parallel` gives it, else `models.max_sequences`.

    Raises:
        ConfigError: It is named twice, or has more than an engine takes.

    Example:
        >>> sequences_of(ModelSettings(parallel=("chat=4",)), "chat")
        4
    """
    given = [each.rpartition("=") for each in settings.parallel]
    numbers = [int(number) for named, _, number in given if named == name]
    if len(numbers) > 1 or any(number > MAX_SEQUENCES for number in numbers):
        raise ConfigError(
            f"models.parallel gives '{name}' {' and '.join(map(str, numbers))} sequences; give it "
            f"one number of at most {MAX_SEQUENCES}",
            param="models.parallel",
        )
    return numbers[0] if numbers else settings.max_sequences


def with_engine_reason(plan: Plan, reason: str) -> Plan:
    """The plan, which says why it is for its engine."""
    return msgspec.structs.replace(plan, reasons={"engine": reason} | plan.reasons)


def check_names(plans: Sequence[Plan]) -> None:
    """Refuse models that clients could not tell apart.

    Raises:
        ConfigError: Two have one name.
    """
    seen: set[str] = set()
    for plan in plans:
        if (name := plan.model.name) in seen:
            where = plan.model.paths[0] if plan.model.paths else name
            raise ConfigError(
                f"two models are named '{name}'; give one another name: -m NAME={where}",
                param="model",
            )
        seen.add(name)


def names_not_served(settings: ModelSettings, plans: Sequence[Plan]) -> list[str]:
    """A sentence for each setting that names a model which is not served, as a misspelt one is.

    Nothing is refused: one file of settings may be for several servers.

    Example:
        >>> names_not_served(ModelSettings(keep_loaded=("chat",)), [])
        ["models.keep_loaded names 'chat', which is not served here, and has no effect"]
    """
    served = {plan.model.name for plan in plans}
    named = {
        "keep_loaded": settings.keep_loaded,
        "pairs": [name for pair in settings.pairs for name in pair.split("+")],
        "parallel": [each.rpartition("=")[0] for each in settings.parallel],
    }
    return [
        f"models.{key} names '{name}', which is not served here, and has no effect"
        for key, names in named.items()
        for name in dict.fromkeys(names)
        if name not in served
    ]


def room_note(grant: Grant) -> str:
    """What to say of a model that was loaded without comfort; empty where there is room."""
    if grant.verdict is Verdict.COMFORTABLE:
        return ""
    ways = " or ".join(grant.ways_to_fit) or "a smaller model"
    if grant.verdict is Verdict.TIGHT:
        return f"memory is tight; to make room: {ways}"
    return f"it does not fit and was loaded all the same; to make room: {ways}"
