"""From what was asked on the command line to a plan; shared by `run` and `serve`."""

import re
from collections.abc import Sequence
from pathlib import Path

import msgspec

from brim.cli.dispatch import ENGINE_OF_FORMAT as ENGINE_OF_FORMAT
from brim.cli.dispatch import choose_form
from brim.cli.speed_sources import usable_calibration
from brim.config.tree import Settings
from brim.core.machine import MachineSpec
from brim.core.plan import Grant, Objective, Plan, Verdict
from brim.errors import ConfigError
from brim.ledger.budget import budget_of
from brim.planner.fit import Room
from brim.planner.plan import make_plan
from brim.registry.sources import forms_of

DEMO = "demo"

HOW_TO_GET_A_MODEL = "for a real one: -m FILE.gguf, -m MODEL_DIR or -m hf:ORG/REPO"


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
        max_sequences: By the settings unless given.
        is_only_model: Whether no other model is loaded or will be.

    Raises:
        BrimError: The model cannot be found or read, or a wish contradicts it.
    """
    objective = settings.models.objective if objective is None else objective
    max_sequences = settings.models.max_sequences if max_sequences is None else max_sequences
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


def room_note(grant: Grant) -> str:
    """What to say of a model that was loaded without comfort; empty where there is room."""
    if grant.verdict is Verdict.COMFORTABLE:
        return ""
    ways = " or ".join(grant.ways_to_fit) or "a smaller model"
    if grant.verdict is Verdict.TIGHT:
        return f"memory is tight; to make room: {ways}"
    return f"it does not fit and was loaded all the same; to make room: {ways}"
