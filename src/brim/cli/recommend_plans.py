"""Plans behind `brim recommend`: catalogue, planner and ledger put together for many models."""

import contextlib
from collections.abc import Callable, Iterable, Iterator

from brim.cli.dispatch import ENGINE_OF_FORMAT, choose_form
from brim.cli.output import gib
from brim.cli.recommend_report import (
    MachinesReport,
    ModelsReport,
    machine_row,
    model_row,
)
from brim.core.calibration import Calibration
from brim.core.forecast import Forecast
from brim.core.machine import MachineSpec
from brim.core.model import ModelSpec
from brim.core.plan import Grant, Plan, Verdict
from brim.errors import DoesNotFit, NotFound
from brim.ledger.account import Account
from brim.ledger.budget import budget_of
from brim.planner.engine_choice import default_engine
from brim.planner.fit import Room, fit_plan
from brim.planner.forecast import forecast_plan
from brim.planner.recommend import (
    CONTEXT_TOKENS,
    Band,
    Candidate,
    MachineFit,
    Use,
    band_of,
    band_speed,
    cheapest_first,
    recommend,
)
from brim.registry.catalogue import CatalogueEntry, entries, find, perplexity_increase_percent


def report_models(machine_name: str | None, use: Use, limit: int) -> ModelsReport:
    """Plan every model of the catalogue that suits the use, in each of its quants.

    Raises:
        ConfigError: There is no such machine.
    """
    machine = _machine(machine_name)
    suited = [entry for entry in entries() if use.value in entry.uses]
    by_name = {entry.name: entry for entry in suited}
    ranked = recommend(
        _candidates(suited, machine, use), use, default_engine=default_engine(machine)
    )
    budget = budget_of(machine)
    return ModelsReport(
        machine=machine.name,
        is_simulated=machine.is_simulated,
        ram_bytes=machine.ram_bytes,
        others_bytes=machine.others_bytes,
        comfortable_bytes=budget.comfortable.num_bytes,
        tight_bytes=budget.tight.num_bytes,
        use=use,
        context_tokens=CONTEXT_TOKENS[use],
        fits=any(each.candidate.grant.verdict is not Verdict.NO for each in ranked),
        num_models=len(ranked),
        models=tuple(model_row(each, by_name[each.candidate.name], use) for each in ranked[:limit]),
    )


def report_machines(reference: str, use: Use | None, limit: int) -> MachinesReport:
    """Plan one model for every known machine.

    Args:
        reference: As for `brim plan`.
        use: Decides the context; for a name of the catalogue what it is made for, unless given.
        limit: How many machines to name.

    Raises:
        BrimError: The model cannot be found or read, or no known machine holds it.
    """
    from brim.machine.chips import known_machines

    machines = tuple(known_machines())
    # One form for all of them: the one that the roomiest takes.
    spec, made_for = _named_model(reference, max(machines, key=lambda each: each.ram_bytes))
    use = use or made_for
    planned = [_fit(spec, machine, use) for machine in machines]
    fits = cheapest_first(planned)
    footprint_bytes = max(each.plan.memory.total_bytes for each in planned)
    if not fits:
        most = max(planned, key=lambda each: each.grant.budget_bytes)
        raise DoesNotFit(
            f"{spec.name} in {spec.quant} needs {gib(footprint_bytes)}; the largest known machine, "
            f"{most.machine.name}, leaves {gib(most.grant.budget_bytes)}; name a smaller quant"
        )
    return MachinesReport(
        model=spec.name,
        quant=spec.quant,
        engine=fits[0].plan.engine,
        use=use,
        context_tokens=fits[0].plan.context_tokens,
        footprint_bytes=footprint_bytes,
        least_ram_bytes=_least_ram(fits),
        num_machines=len(fits),
        machines=tuple(machine_row(fit, use) for fit in fits[:limit]),
    )


def _machine(name: str | None) -> MachineSpec:
    if name is None:
        from brim.machine.reading import read_machine

        return read_machine()
    from brim.machine.chips import named_machine

    return named_machine(name)


def _named_model(reference: str, machine: MachineSpec) -> tuple[ModelSpec, Use]:
    """The model that `--for` names, and what the catalogue says it is made for."""
    from brim.registry.sources import forms_of

    spec = choose_form(forms_of(reference), machine, is_loaded=False).form.describe()
    with contextlib.suppress(NotFound):
        return spec, Use(find(reference)[0].uses[0])
    return spec, Use.CHAT


def _candidates(
    suited: Iterable[CatalogueEntry], machine: MachineSpec, use: Use
) -> Iterator[Candidate]:
    forecast = _forecaster(machine)
    for entry in suited:
        # MLX elsewhere than on its own ground is for trials.
        mlx_quants = entry.mlx if default_engine(machine) == "mlx" else ()
        for quant in (*entry.gguf_quants, *mlx_quants):
            plan, grant = _planned(entry.spec(quant, entry.name), machine, use)
            yield Candidate(
                name=entry.name,
                quant=quant,
                released=entry.released,
                plan=plan,
                grant=grant,
                forecast=Forecast() if grant.verdict is Verdict.NO else forecast(plan),
                perplexity_increase_percent=perplexity_increase_percent(quant),
            )


def _planned(spec: ModelSpec, machine: MachineSpec, use: Use) -> tuple[Plan, Grant]:
    """The plan at the use's context, and what an empty account says to it."""
    budget = budget_of(machine)
    plan = fit_plan(
        spec,
        machine,
        Room(budget.comfortable.num_bytes, budget.tight.num_bytes),
        engine=ENGINE_OF_FORMAT[spec.format],
        context_tokens=min(CONTEXT_TOKENS[use], spec.trained_context_tokens),
    )
    # By its bytes alone: the ways to make each of hundreds of plans fit are not shown.
    return plan, Account().ask(plan.memory, machine)


def _forecaster(machine: MachineSpec) -> Callable[[Plan], Forecast]:
    """Forecasts for one machine; what was measured of it is looked up once for each engine."""
    known: dict[str, tuple[Calibration | None, float | None]] = {}

    def forecast(plan: Plan) -> Forecast:
        if not machine.is_at_hand:
            return forecast_plan(plan, machine)
        if plan.engine not in known:
            from brim.cli.speed_sources import speed_sources

            known[plan.engine] = speed_sources(plan, machine)
        calibration, read_bytes_per_s = known[plan.engine]
        return forecast_plan(
            plan, machine, calibration=calibration, read_bytes_per_s=read_bytes_per_s
        )

    return forecast


def _fit(spec: ModelSpec, machine: MachineSpec, use: Use) -> MachineFit:
    plan, grant = _planned(spec, machine, use)
    forecast = Forecast() if grant.verdict is Verdict.NO else forecast_plan(plan, machine)
    speed = band_speed(forecast, use)
    return MachineFit(
        machine=machine,
        plan=plan,
        grant=grant,
        forecast=forecast,
        band=None if speed is None else band_of(speed.expected, use),
    )


def _least_ram(fits: list[MachineFit]) -> dict[str, int]:
    """The least memory that holds the model, in comfort, and with an interactive speed."""
    kinds: dict[str, Callable[[MachineFit], bool]] = {
        "tight": lambda fit: True,
        "comfortable": lambda fit: fit.grant.verdict is Verdict.COMFORTABLE,
        "interactive": lambda fit: fit.band is Band.INTERACTIVE,
    }
    least: dict[str, int] = {}
    for kind, suits in kinds.items():
        if found := [fit.machine.ram_bytes for fit in fits if suits(fit)]:
            least[kind] = min(found)
    return least
