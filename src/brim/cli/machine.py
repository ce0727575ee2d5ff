"""`brim machine`: what the machine is and feels, where each figure comes from, and the budget."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from brim.core.machine import Conditions, MachineSpec
    from brim.ledger.budget import Budget


def machine(
    name: Annotated[
        str | None,
        typer.Option(
            "--machine",
            metavar="NAME",
            help="Another machine, by chip, GPU cores and memory: 'M4 Max:40:128'.",
            show_default=False,
        ),
    ] = None,
    scenario: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A simulated machine, from a TOML file.", show_default=False
        ),
    ] = None,
    at_s: Annotated[
        float | None,
        typer.Option(
            "--at",
            min=0,
            metavar="SECONDS",
            help="When in the scenario; 0 unless given.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what this machine, a named or a simulated one has, feels and may spend on models."""
    if name is not None and scenario is not None:
        raise typer.BadParameter("--machine and --scenario name two machines; leave one out")
    if at_s is not None and scenario is None:
        raise typer.BadParameter("--at is a moment of a scenario; give one with --scenario FILE")

    from brim.cli.output import print_json
    from brim.ledger.budget import budget_of

    spec, conditions = _read(name, scenario, at_s or 0.0)
    budget = budget_of(spec)
    sensors = _sensors() if spec.is_at_hand else {}
    if as_json:
        budget_fields = _budget_fields(budget)
        print_json(
            {"machine": spec, "conditions": conditions, "budget": budget_fields, "sensors": sensors}
        )
    else:
        _print(spec, conditions, budget, sensors)


def _sensors() -> dict[str, Any]:
    """What this machine tells a server besides: energy, and pressure without being asked."""
    from brim.machine.energy import counters_at_hand
    from brim.machine.pressure_watch import PressureWatch

    counters = counters_at_hand()
    watch = PressureWatch(lambda: None)
    watch.start()
    watched = watch.sources
    watch.close()
    return {
        "counts_energy": bool(counters.read_uj()),
        "energy_source": counters.source,
        "pressure_notices": watched,
    }


def _read(
    name: str | None, scenario: Path | None, at_s: float
) -> tuple["MachineSpec", "Conditions | None"]:
    """The machine that was asked for; a named one feels nothing."""
    if name is not None:
        from brim.machine.chips import named_machine

        return named_machine(name), None
    if scenario is not None:
        from brim.machine.scenario import load_scenario
        from brim.machine.simulated import SimulatedMachine

        simulated = SimulatedMachine(load_scenario(scenario), lambda: at_s)
        return simulated.read_machine(), simulated.read_conditions()
    from brim.cli.neighbours import machine_beside_servers
    from brim.machine.reading import read_conditions

    return machine_beside_servers(), read_conditions()


def _budget_fields(budget: "Budget") -> dict[str, Any]:
    return {
        "comfortable_bytes": budget.comfortable.num_bytes,
        "comfortable_binding": budget.comfortable.binding,
        "tight_bytes": budget.tight.num_bytes,
        "tight_binding": budget.tight.binding,
        "reserve_bytes": budget.reserve_bytes,
    }


def _print(
    spec: "MachineSpec",
    conditions: "Conditions | None",
    budget: "Budget",
    sensors: "Mapping[str, Any]",
) -> None:
    from brim.cli.output import gib, print_table
    from brim.machine.pressure_watch import IN_FORCE

    typer.echo(spec.name)
    rows = _rows(spec, ("name", "system", "is_at_hand", "is_simulated"))
    if conditions is not None:
        rows += _rows(conditions, ("is_simulated",))
    if sensors:
        rows.append(
            ("energy", "counted" if sensors["counts_energy"] else "-", sensors["energy_source"])
        )
        for source, state in sensors["pressure_notices"].items():
            is_watched = state == IN_FORCE
            why = source if is_watched else f"{source}: {state}"
            rows.append(("pressure notice", "yes" if is_watched else "-", why))
    rows += [
        ("budget, comfortable", gib(budget.comfortable.num_bytes), budget.comfortable.binding),
        ("budget, tight", gib(budget.tight.num_bytes), budget.tight.binding),
        ("reserve", gib(budget.reserve_bytes), "kept free in both"),
    ]
    print_table(("what", "value", "from"), rows, right=frozenset({1}))


def _rows(value: "MachineSpec | Conditions", left_out: Sequence[str]) -> list[tuple[str, ...]]:
    """What was read, each figure with its source or the reason for its absence."""
    return [
        (_words(field), _text(field, getattr(value, field)), value.sources.get(field, ""))
        for field in value.__struct_fields__
        if field not in (*left_out, "sources")
    ]


def _words(field: str) -> str:
    """A field's name for people, without the unit that its value shows.

    Example:
        >>> _words("swap_used_bytes"), _words("is_on_battery")
        ('swap used', 'on battery')
    """
    for unit in ("_bytes", "_percent", "_celsius"):
        field = field.removesuffix(unit)
    return field.removeprefix("is_").replace("_", " ")


def _text(field: str, value: Any) -> str:
    """A value with its unit.

    Example:
        >>> _text("memory_bandwidth", 546 * 10**9), _text("is_throttled", None)
        ('546 GB/s', '-')
    """
    from brim.cli.output import gib

    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if field.endswith("_bytes"):
        return gib(value)
    scaled = {
        "memory_bandwidth": (1e9, "GB/s"),
        "fp32_flops": (1e12, "TFLOPS"),
        "stalled_percent": (1, "%"),
        "battery_percent": (1, "%"),
        "hottest_celsius": (1, "°C"),
        "busy_fraction": (0.01, "%"),
    }
    if field in scaled:
        scale, unit = scaled[field]
        return f"{value / scale:.4g} {unit}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
