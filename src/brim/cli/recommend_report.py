"""What `brim recommend` says: reports for JSON, and the same as tables for people."""

from typing import NamedTuple

import msgspec
import typer

from brim.cli.output import gib, print_table
from brim.core.forecast import Forecast, SpeedRange
from brim.core.plan import Plan, Verdict
from brim.planner.recommend import Band, Candidate, MachineFit, Recommendation, Use
from brim.registry.catalogue import CatalogueEntry, quality_cost

MEASURED_ON = "Llama 3 8B"
SPEED_HEADS = {
    Use.CHAT: ("tok/s", "warm"),
    Use.CODE: ("tok/s", "warm"),
    Use.LONG: ("tok/s", "full"),
    Use.EMBED: ("read/s",),
}
"""Decode at first, and the speed behind the band; embedders do not decode."""

COST_HEAD = f"quality cost ({MEASURED_ON})"
"""Most published losses are of that one model; larger ones lose less, smaller ones more."""


class QuantReport(msgspec.Struct, frozen=True, kw_only=True):
    """One quant of a model on the machine."""

    quant: str
    bits_per_weight: float
    """Of this model's file: what recipes give to each tensor differs by model."""
    quality_cost: str
    """As published, with the model that it was measured on."""
    pull: str
    verdict: Verdict
    footprint_bytes: int
    budget_bytes: int
    short_bytes: int
    weights_bytes: int
    kv_bytes: int
    kv_type: str
    context_tokens: int
    decode_tok_s: SpeedRange | None
    """This and the next two: None for embedders, which do not decode."""
    sustained_decode_tok_s: SpeedRange | None
    full_decode_tok_s: SpeedRange | None
    prefill_tok_s: SpeedRange | None
    forecast_source: str


class ModelRow(msgspec.Struct, frozen=True, kw_only=True):
    """One model and its place."""

    model: str
    publisher: str
    license: str
    released: str
    uses: tuple[str, ...]
    num_parameters: int
    num_active_parameters: int
    trained_context_tokens: int
    engine: str
    score: float
    """Doublings of size that the model is worth; only the order means something."""
    band: Band | None
    band_tok_s: float | None
    """The speed behind the band: decode on a warm machine, decode with a full context for long
    texts, prefill for embedders."""
    reason: str
    best: QuantReport
    other_quants: tuple[QuantReport, ...]
    mlx: dict[str, str]
    """Where the hub has it in MLX form, by quant."""


class ModelsReport(msgspec.Struct, frozen=True, kw_only=True):
    """Models for one machine, best first."""

    machine: str
    is_simulated: bool
    ram_bytes: int
    others_bytes: int
    comfortable_bytes: int
    tight_bytes: int
    use: Use
    context_tokens: int
    """What each is planned with, or its own context where that is shorter."""
    fits: bool
    """Whether any of them does."""
    num_models: int
    """How many were planned; `models` are the first of them."""
    models: tuple[ModelRow, ...]


class MachineRow(msgspec.Struct, frozen=True, kw_only=True):
    """One machine that holds the model."""

    machine: str
    ram_bytes: int
    gpu_cores: int | None
    memory_bandwidth: int | None
    verdict: Verdict
    footprint_bytes: int
    budget_bytes: int
    kv_type: str
    decode_tok_s: SpeedRange | None
    sustained_decode_tok_s: SpeedRange | None
    full_decode_tok_s: SpeedRange | None
    prefill_tok_s: SpeedRange | None
    band: Band | None


class MachinesReport(msgspec.Struct, frozen=True, kw_only=True):
    """Machines for one model, least memory first."""

    model: str
    quant: str
    engine: str
    use: Use
    context_tokens: int
    footprint_bytes: int
    least_ram_bytes: dict[str, int]
    """The least memory that holds it: 'tight', 'comfortable', and with 'interactive' speed."""
    num_machines: int
    """How many of the known ones hold it; `machines` are the first of them."""
    machines: tuple[MachineRow, ...]


def model_row(judged: Recommendation, entry: CatalogueEntry, use: Use) -> ModelRow:
    """One model's line."""
    best = judged.candidate
    return ModelRow(
        model=entry.name,
        publisher=entry.publisher,
        license=entry.license,
        released=entry.released,
        uses=entry.uses,
        num_parameters=best.num_parameters,
        num_active_parameters=best.num_active_parameters,
        trained_context_tokens=entry.context_tokens,
        engine=best.plan.engine,
        score=judged.score,
        band=judged.band,
        band_tok_s=judged.band_tok_s,
        reason=judged.reason,
        best=_quant_report(best, entry, use),
        other_quants=tuple(_quant_report(other, entry, use) for other in judged.others),
        mlx=entry.mlx,
    )


def _quant_report(candidate: Candidate, entry: CatalogueEntry, use: Use) -> QuantReport:
    plan, grant, speed = candidate.plan, candidate.grant, candidate.forecast.speed
    decode = _Decode.of(candidate.forecast, use)
    return QuantReport(
        quant=candidate.quant,
        bits_per_weight=round(8 * plan.model.weights_bytes / plan.model.num_parameters, 3),
        quality_cost=quality_cost(candidate.quant),
        pull=entry.pull_name(candidate.quant),
        verdict=grant.verdict,
        footprint_bytes=plan.memory.total_bytes,
        budget_bytes=grant.budget_bytes,
        short_bytes=grant.short_bytes,
        weights_bytes=plan.memory.weights_bytes,
        kv_bytes=plan.memory.kv_bytes,
        kv_type=_kv_type(plan),
        context_tokens=plan.context_tokens,
        decode_tok_s=decode.burst,
        sustained_decode_tok_s=decode.sustained,
        full_decode_tok_s=decode.full,
        prefill_tok_s=None if speed is None else speed.prefill_tok_s,
        forecast_source="" if speed is None else speed.source,
    )


class _Decode(NamedTuple):
    """Decode speeds of a use that decodes."""

    burst: SpeedRange | None = None
    sustained: SpeedRange | None = None
    full: SpeedRange | None = None

    @classmethod
    def of(cls, forecast: Forecast, use: Use) -> "_Decode":
        if forecast.speed is None or use is Use.EMBED:
            return cls()
        return cls(
            forecast.speed.decode_tok_s,
            forecast.sustained_decode_tok_s,
            forecast.full_decode_tok_s,
        )


def machine_row(fit: MachineFit, use: Use) -> MachineRow:
    """One machine's line."""
    speed, decode = fit.forecast.speed, _Decode.of(fit.forecast, use)
    return MachineRow(
        machine=fit.machine.name,
        ram_bytes=fit.machine.ram_bytes,
        gpu_cores=fit.machine.gpu_cores,
        memory_bandwidth=fit.machine.memory_bandwidth,
        verdict=fit.grant.verdict,
        footprint_bytes=fit.plan.memory.total_bytes,
        budget_bytes=fit.grant.budget_bytes,
        kv_type=_kv_type(fit.plan),
        decode_tok_s=decode.burst,
        sustained_decode_tok_s=decode.sustained,
        full_decode_tok_s=decode.full,
        prefill_tok_s=None if speed is None else speed.prefill_tok_s,
        band=fit.band,
    )


def print_models(report: ModelsReport) -> None:
    """Print a ranking as a table, and the reason for each place below it."""
    simulated = " (simulated)" if report.is_simulated else ""
    typer.echo(
        f"{report.machine}{simulated}: {gib(report.ram_bytes)} of memory, "
        f"{gib(report.comfortable_bytes)} for models in comfort, {gib(report.tight_bytes)} at most"
    )
    head = (
        "", "model", "quant", "memory", "verdict", *SPEED_HEADS[report.use], "speed", COST_HEAD,
    )  # fmt: skip
    rows = [
        (
            str(place),
            row.model,
            row.best.quant,
            gib(row.best.footprint_bytes),
            row.best.verdict.value,
            *(() if report.use is Use.EMBED else (_expected(row.best.decode_tok_s),)),
            "-" if row.band_tok_s is None else _figure(row.band_tok_s),
            "-" if row.band is None else row.band.value,
            row.best.quality_cost.removesuffix(f" ({MEASURED_ON})"),
        )
        for place, row in enumerate(report.models, start=1)
    ]
    print_table(head, rows, right=frozenset({0, 3, 5, head.index("speed") - 1}))
    for place, row in enumerate(report.models, start=1):
        typer.echo(f"{place}. {row.model} ({row.license}), {row.best.pull}: {row.reason}.")
    typer.echo(
        f"{len(report.models)} of {report.num_models} models for {report.use.value} at "
        f"{report.context_tokens} tokens of context, or a model's own where that is shorter; "
        "speeds are forecasts"
    )


def print_machines(report: MachinesReport) -> None:
    """Print the machines that hold a model."""
    least = ", ".join(f"{what} from {gib(size)}" for what, size in report.least_ram_bytes.items())
    typer.echo(
        f"{report.model} in {report.quant or report.engine} takes {gib(report.footprint_bytes)} "
        f"with {report.context_tokens} tokens of context: {least}"
    )
    head = ("machine", "memory", "verdict", "tok/s", "warm", "prefill", "speed")
    rows = [
        (
            row.machine,
            gib(row.ram_bytes),
            row.verdict.value,
            _expected(row.decode_tok_s),
            _expected(row.sustained_decode_tok_s),
            _expected(row.prefill_tok_s),
            "-" if row.band is None else row.band.value,
        )
        for row in report.machines
    ]
    print_table(head, rows, right=frozenset({1, 3, 4, 5}))
    typer.echo(f"{len(report.machines)} of {report.num_machines} machines; speeds are forecasts")


def _kv_type(plan: Plan) -> str:
    both = (plan.kv_type_k, plan.kv_type_v)
    return both[0] if both[0] == both[1] else "/".join(both)


def _expected(speed: SpeedRange | None) -> str:
    return "-" if speed is None else _figure(speed.expected)


def _figure(tok_s: float) -> str:
    """Three digits, or all of a larger number's."""
    return f"{tok_s:,.0f}" if tok_s >= 1000 else f"{tok_s:.3g}"
