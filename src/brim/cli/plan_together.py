"""From references and wishes to one report: models planned one after the other on one machine."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from brim.cli.dispatch import choose_form
from brim.cli.neighbours import forecast_history
from brim.cli.output import gib
from brim.cli.plan_report import ModelReport, PlanReport, model_report, plan_report
from brim.cli.planning import with_engine_reason
from brim.cli.speed_sources import speed_sources, usable_calibration
from brim.core.machine import MachineSpec
from brim.core.model import ModelSpec
from brim.core.plan import Grant, Objective, Plan
from brim.engine.factory import defects_of_plan
from brim.errors import ConfigError
from brim.ledger.account import Account
from brim.ledger.budget import budget_of
from brim.ledger.correction import NO_ERRORS, PastErrors
from brim.planner.fit import Room, fit_plan
from brim.planner.forecast import forecast_plan
from brim.registry.families import is_listed
from brim.registry.forms import Form
from brim.registry.sources import forms_of
from brim.runtime.forecast_errors import subject_of


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked of `brim plan`."""

    models: tuple[str, ...]
    draft: str | None = None
    machine: str | None = None
    """As typed; None for this machine."""
    objective: Objective = Objective.DECODE
    context_tokens: int | None = None
    max_sequences: int = 1
    kv_type: str | None = None
    quant: str | None = None
    engine: str | None = None
    depth_tokens: int = 0
    prompt_tokens: int = 512
    is_beside_servers: bool = False
    is_checked: bool = True
    """Whether files that are here are shown to the backend, which says what it would allocate."""


def plan_together(wanted: Wanted) -> PlanReport:
    """Plan every model, each in the room that the ones before it leave.

    Raises:
        BrimError: A model or machine cannot be found or read, or a wish contradicts it.
    """
    machine = _machine(wanted)
    wishes = _wishes(wanted)
    account = Account()
    models: list[ModelReport] = []
    grants: list[Grant] = []
    notes: list[str] = []
    formats: list[str] = []
    for number, (forms, role) in enumerate(wishes):
        if role == "draft":  # in the process of its target, whose engine is known by now
            forms = [form for form in forms if form.format == formats[0]] or forms
        plan = _plan(forms, machine, account, wanted, is_draft=role == "draft")
        spec = plan.model
        formats.append(spec.format)
        if spec.is_estimated:
            notes.append(_estimate_note(spec))
        past = _past_errors(plan, machine)
        grant = account.grant(f"{number} {spec.name}", plan, machine, past=past, force=True)
        grants.append(grant)
        counted, own = gib(grant.asked_bytes), gib(grant.planned_bytes)
        if counted != own:
            notes.append(
                f"{spec.name}: earlier loads differed from their plans, so {counted} are counted "
                f"instead of {own}"
            )
        models.append(_reported(plan, machine, wanted, role))
        if wanted.is_checked and _is_here(spec):
            notes += defects_of_plan(plan)
    if wanted.draft is not None:
        notes.append(
            "speeds are without speculation: what a draft gains depends on how often it is right"
        )
    return plan_report(models, grants, machine, notes)


def _wishes(wanted: Wanted) -> list[tuple[Sequence[Form], str]]:
    """The forms of each model, with its role."""
    targets = [forms_of(reference, quant=wanted.quant) for reference in wanted.models]
    wishes: list[tuple[Sequence[Form], str]] = [(forms, "target") for forms in targets]
    if wanted.draft is None:
        return wishes
    # A bare config without a quant of its own is planned in the target's.
    needs_quant = wanted.draft.lower().endswith(".json")
    draft = forms_of(wanted.draft, quant=wanted.quant if needs_quant else None)
    # A draft works in its target's process, so one engine must load both.
    common = {form.format for form in targets[0]} & {form.format for form in draft}
    if common:
        wishes[0] = ([form for form in targets[0] if form.format in common], "target")
    return [*wishes, ([form for form in draft if form.format in common] or draft, "draft")]


def _past_errors(plan: Plan, machine: MachineSpec) -> PastErrors:
    """What earlier loads of the model took here beside their plans."""
    if not machine.is_at_hand or not plan.model.fingerprint:
        return NO_ERRORS
    return forecast_history().past_errors(subject_of(plan, machine))


def _is_here(spec: ModelSpec) -> bool:
    return bool(spec.paths) and all(Path(path).is_file() for path in spec.paths)


def _machine(wanted: Wanted) -> MachineSpec:
    if wanted.machine is not None:
        if wanted.is_beside_servers:
            raise ConfigError(
                "--what-if asks the servers of this machine; leave --machine out", param="machine"
            )
        from brim.machine.chips import named_machine

        return named_machine(wanted.machine)
    if wanted.is_beside_servers:
        from brim.cli.neighbours import machine_beside_servers

        return machine_beside_servers()
    from brim.machine.reading import read_machine

    return read_machine()


def _plan(
    forms: Sequence[Form], machine: MachineSpec, account: Account, wanted: Wanted, *, is_draft: bool
) -> Plan:
    budget, charged = budget_of(machine), account.charged_bytes
    room = Room(budget.comfortable.num_bytes - charged, budget.tight.num_bytes - charged)
    chosen = choose_form(
        forms,
        machine,
        engine=wanted.engine,
        is_loaded=False,
        room=room,
        objective=wanted.objective,
        context_tokens=wanted.context_tokens,
        max_sequences=wanted.max_sequences,
        kv_type=wanted.kv_type,
    )
    plan = fit_plan(
        chosen.form.describe(),
        machine,
        room,
        engine=chosen.engine,
        objective=wanted.objective,
        context_tokens=wanted.context_tokens,
        max_sequences=wanted.max_sequences,
        kv_type=wanted.kv_type,
        calibration=usable_calibration(chosen.engine, machine),
        is_draft=is_draft,
        is_only_model=len(wanted.models) == 1 and wanted.draft is None,
    )
    return with_engine_reason(plan, chosen.reason)


def _reported(plan: Plan, machine: MachineSpec, wanted: Wanted, role: str) -> ModelReport:
    calibration, read_bytes_per_s = speed_sources(plan, machine)
    forecast = forecast_plan(
        plan,
        machine,
        calibration=calibration,
        read_bytes_per_s=read_bytes_per_s,
        depth_tokens=wanted.depth_tokens,
        prompt_tokens=wanted.prompt_tokens,
    )
    return model_report(plan, forecast, role)


def _estimate_note(spec: ModelSpec) -> str:
    if is_listed(spec.architecture):
        return f"{spec.name}: bytes follow from its config and {spec.quant}'s recipe, to about 1 %"
    return (
        f"{spec.name}: brim does not know the architecture {spec.architecture:.40} and counts it "
        "as a plain transformer: bytes and speed may be far off"
    )
