"""What `brim plan` says: one report for JSON, and the same as a page for people."""

from collections.abc import Sequence

import msgspec
import typer

from brim.cli.output import gib, print_table
from brim.core.forecast import Forecast, SpeedRange
from brim.core.machine import MachineSpec
from brim.core.plan import Grant, Plan, Verdict

MAX_WAYS = 3
"""The cheapest are named; a longer list is not read."""


class ModelReport(msgspec.Struct, frozen=True, kw_only=True):
    """One model of a plan: what it takes, how it is loaded, how fast it will be, and why."""

    model: str
    role: str
    """'target', or 'draft' for the small one of a pair."""
    quant: str
    weights_are_estimated: bool
    """By a config and a recipe; otherwise from the file's own header."""
    weights_bytes: int
    weights_mapped: bool
    repacked_bytes: int
    kv_bytes: int
    compute_bytes: int
    overhead_bytes: int
    total_bytes: int
    engine: str
    kv_type: str
    """Of K and V; 'K/V' where they differ."""
    context_tokens: int
    kv_tokens: int
    max_sequences: int
    max_batch_tokens: int
    micro_batch_tokens: int
    num_threads: int
    num_batch_threads: int
    flash_attention: bool
    repack_weights: bool
    wire_weights: bool
    environment: dict[str, str]
    decode_tok_s: SpeedRange | None
    full_decode_tok_s: SpeedRange | None
    sustained_decode_tok_s: SpeedRange | None
    decode_ceiling_tok_s: float | None
    prefill_tok_s: SpeedRange | None
    depth_tokens: int
    prompt_tokens: int
    load_s: float | None
    first_token_s: float | None
    forecast_source: str
    reasons: dict[str, str]


class PlanReport(msgspec.Struct, frozen=True, kw_only=True):
    """A whole plan: the first model's fields beside the sums over all models."""

    machine: str
    is_simulated: bool
    ram_bytes: int
    others_bytes: int
    fits: bool
    verdict: Verdict
    weights_bytes: int
    repacked_bytes: int
    kv_bytes: int
    compute_bytes: int
    overhead_bytes: int
    total_bytes: int
    budget_bytes: int
    """What may be granted to all of them under the binding limit."""
    short_bytes: int
    binding: str
    engine: str
    kv_type: str
    context_tokens: int
    decode_tok_s: SpeedRange | None
    prefill_tok_s: SpeedRange | None
    sustained_decode_tok_s: SpeedRange | None
    load_s: float | None
    first_token_s: float | None
    reasons: dict[str, str]
    ways_to_fit: tuple[str, ...]
    notes: tuple[str, ...]
    models: tuple[ModelReport, ...]


def model_report(plan: Plan, forecast: Forecast, role: str) -> ModelReport:
    """One model's part."""
    spec, memory, speed = plan.model, plan.memory, forecast.speed
    return ModelReport(
        model=spec.name,
        role=role,
        quant=spec.quant,
        weights_are_estimated=spec.is_estimated,
        weights_bytes=memory.weights_bytes,
        weights_mapped=plan.engine == "llamacpp",
        repacked_bytes=memory.repacked_bytes,
        kv_bytes=memory.kv_bytes,
        compute_bytes=memory.compute_bytes,
        overhead_bytes=memory.overhead_bytes,
        total_bytes=memory.total_bytes,
        engine=plan.engine,
        kv_type=kv_name(plan),
        context_tokens=plan.context_tokens,
        kv_tokens=plan.kv_tokens,
        max_sequences=plan.max_sequences,
        max_batch_tokens=plan.max_batch_tokens,
        micro_batch_tokens=plan.micro_batch_tokens,
        num_threads=plan.num_threads,
        num_batch_threads=plan.num_batch_threads,
        flash_attention=plan.flash_attention,
        repack_weights=plan.repack_weights,
        wire_weights=plan.wire_weights,
        environment=plan.environment,
        decode_tok_s=speed.decode_tok_s if speed else None,
        full_decode_tok_s=forecast.full_decode_tok_s,
        sustained_decode_tok_s=forecast.sustained_decode_tok_s,
        decode_ceiling_tok_s=speed.decode_ceiling_tok_s if speed else None,
        prefill_tok_s=speed.prefill_tok_s if speed else None,
        depth_tokens=forecast.depth_tokens,
        prompt_tokens=forecast.prompt_tokens,
        load_s=forecast.load_s,
        first_token_s=forecast.first_token_s,
        forecast_source=speed.source if speed else "",
        reasons=plan.reasons | forecast.reasons,
    )


def plan_report(
    models: Sequence[ModelReport],
    grants: Sequence[Grant],
    machine: MachineSpec,
    notes: Sequence[str] = (),
) -> PlanReport:
    """The whole report.

    Args:
        models: At least one, in the order in which they were asked for.
        grants: The account's answer to each, given what the ones before it took.
        machine: What they were planned for.
        notes: What else a reader should know.
    """
    first = models[0]
    worst = max(grants, key=lambda grant: list(Verdict).index(grant.verdict))
    return PlanReport(
        machine=machine.name,
        is_simulated=machine.is_simulated,
        ram_bytes=machine.ram_bytes,
        others_bytes=machine.others_bytes,
        fits=worst.verdict is not Verdict.NO,
        verdict=worst.verdict,
        weights_bytes=sum(model.weights_bytes for model in models),
        repacked_bytes=sum(model.repacked_bytes for model in models),
        kv_bytes=sum(model.kv_bytes for model in models),
        compute_bytes=sum(model.compute_bytes for model in models),
        overhead_bytes=sum(model.overhead_bytes for model in models),
        total_bytes=sum(model.total_bytes for model in models),
        budget_bytes=worst.budget_bytes
        + sum(grant.asked_bytes for grant in grants[: grants.index(worst)]),
        short_bytes=worst.short_bytes,
        binding=worst.binding,
        engine=first.engine,
        kv_type=first.kv_type,
        context_tokens=first.context_tokens,
        decode_tok_s=first.decode_tok_s,
        prefill_tok_s=first.prefill_tok_s,
        sustained_decode_tok_s=first.sustained_decode_tok_s,
        load_s=first.load_s,
        first_token_s=first.first_token_s,
        reasons=first.reasons,
        ways_to_fit=worst.ways_to_fit[:MAX_WAYS],
        notes=tuple(notes),
        models=tuple(models),
    )


def kv_name(plan: Plan) -> str:
    """The KV type, or both as 'K/V' where they differ."""
    if plan.kv_type_k == plan.kv_type_v:
        return plan.kv_type_k
    return f"{plan.kv_type_k}/{plan.kv_type_v}"


def print_report(report: PlanReport) -> None:
    """The report for people."""
    simulated = " (simulated)" if report.is_simulated else ""
    typer.echo(
        f"{report.machine}{simulated}: {gib(report.ram_bytes)} RAM, "
        f"{gib(report.others_bytes)} used by others"
    )
    typer.echo(_verdict_line(report))
    typer.echo()
    for model in report.models:
        _print_model(model)
    for way in report.ways_to_fit:
        typer.echo(f"to make room: {way}")
    for note in report.notes:
        typer.echo(f"note: {note}")


def _verdict_line(report: PlanReport) -> str:
    words = {
        Verdict.COMFORTABLE: "fits comfortably",
        Verdict.TIGHT: "fits, but memory is tight",
        Verdict.NO: f"does not fit: {gib(report.short_bytes)} short",
    }
    return (
        f"{words[report.verdict]}: {gib(report.total_bytes)} of "
        f"{gib(report.budget_bytes)} by {report.binding}"
    )


def _print_model(model: ModelReport) -> None:
    role = " (draft)" if model.role == "draft" else ""
    typer.echo(f"{model.model}{role}")
    estimated = "estimated from config and recipe" if model.weights_are_estimated else ""
    mapped = "mapped file pages" if model.weights_mapped else "anonymous memory"
    rows = [
        ("weights", gib(model.weights_bytes), "; ".join(filter(None, (mapped, estimated)))),
        ("repacked", gib(model.repacked_bytes), model.reasons.get("repack_weights", "")),
        ("KV", gib(model.kv_bytes), f"{model.kv_tokens} tokens in {model.kv_type}"),
        ("compute", gib(model.compute_bytes), f"{model.micro_batch_tokens} rows at once"),
        ("process", gib(model.overhead_bytes), ""),
        ("total", gib(model.total_bytes), ""),
    ]
    print_table(("memory", "", ""), rows, right=frozenset({1}))
    typer.echo()
    print_table(("speed", "expected", "low to high", ""), _speed_rows(model), right=frozenset({1}))
    typer.echo()
    print_table(("choice", "", "why"), _choice_rows(model))
    typer.echo()


def _speed_rows(model: ModelReport) -> list[tuple[str, str, str, str]]:
    depth = f"tok/s, {model.depth_tokens} tokens deep"
    named = (
        ("decode", model.decode_tok_s, depth),
        ("decode, full", model.full_decode_tok_s, f"tok/s, {model.context_tokens} tokens deep"),
        ("decode, warm", model.sustained_decode_tok_s, model.reasons.get("sustained", "")),
        ("prefill", model.prefill_tok_s, f"tok/s, a prompt of {model.prompt_tokens}"),
    )
    rows = [
        (name, f"{speed.expected:.1f}", f"{speed.low:.1f} to {speed.high:.1f}", what)
        for name, speed, what in named
        if speed is not None
    ]
    if not rows:
        rows = [("decode", "-", "", model.reasons.get("speed", ""))]
    if model.first_token_s is not None:
        what = f"of a prompt of {model.prompt_tokens} tokens"
        rows.append(("first token", f"{model.first_token_s:.2f} s", "", what))
    if model.load_s is not None:
        rows.append(("load", f"{model.load_s:.1f} s", "", model.reasons.get("load", "")))
    return rows


def _choice_rows(model: ModelReport) -> list[tuple[str, str, str]]:
    why = model.reasons
    environment = " ".join(f"{name}={value}" for name, value in model.environment.items())
    flash, repack = model.flash_attention, model.repack_weights
    wired = "on" if model.wire_weights else "off"
    return [
        ("engine", model.engine, why.get("engine", "")),
        ("KV type", model.kv_type, why.get("kv_type", "")),
        ("context", str(model.context_tokens), why.get("context_tokens", "")),
        ("KV pool", str(model.kv_tokens), why.get("kv_tokens", "")),
        ("batch", str(model.max_batch_tokens), why.get("max_batch_tokens", "")),
        ("micro batch", str(model.micro_batch_tokens), why.get("micro_batch_tokens", "")),
        (
            "threads",
            f"{model.num_threads}, {model.num_batch_threads} in batches",
            why.get("num_threads", ""),
        ),
        ("environment", environment or "-", why.get("environment", "")),
        ("flash attention", "on" if flash else "off", why.get("flash_attention", "")),
        ("repacking", "on" if repack else "off", why.get("repack_weights", "")),
        *([("wiring", wired, why["wire_weights"])] if "wire_weights" in why else []),
        ("speed from", model.forecast_source or "-", why.get("speed", "")),
    ]
