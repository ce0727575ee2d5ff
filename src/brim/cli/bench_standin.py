"""`brim bench standin`: a random-weight model of the same shape, measured before a download."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from brim.cli.output import gib
from brim.cli.plan_report import kv_name
from brim.core.forecast import Forecast, SpeedRange

if TYPE_CHECKING:
    from brim.bench.standin.trial import Measured, Seconds, Trial
    from brim.core.machine import MachineSpec
    from brim.core.model import ModelSpec
    from brim.core.plan import Plan


class SliceReport(msgspec.Struct, frozen=True, kw_only=True):
    """One file that was really built and measured."""

    num_layers: int
    weights_bytes: int
    prefill_tok_s: float
    decode_tok_s: float
    load_s: float
    dirty_bytes: int | None
    file_bytes: int | None


class StandinReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured beside what is forecast, for the whole model."""

    model: str
    architecture: str
    quant: str
    num_layers: int
    num_parameters: int
    num_prompt_tokens: int
    depth_tokens: int
    context_tokens: int
    kv_type: str
    num_threads: int
    num_batch_threads: int
    is_scaled: bool
    scaled: dict[str, str]
    """Figure -> how it was worked out from `slices`; empty where the whole was measured."""
    slices: tuple[SliceReport, ...]
    decode_tok_s: SpeedRange
    """Slowest run, median and quickest; scaled, what they could come to."""
    forecast_decode_tok_s: SpeedRange | None
    prefill_tok_s: SpeedRange
    forecast_prefill_tok_s: SpeedRange | None
    load_s: float
    forecast_load_s: float | None
    forecast_source: str
    weights_bytes: int
    planned_weights_bytes: int
    kv_bytes: int
    """By the backend's own account, as are weights and compute."""
    planned_kv_bytes: int
    compute_bytes: int
    planned_compute_bytes: int
    resident_bytes: int | None
    """By the system's account: anonymous memory and mapped pages; None where it does not say."""
    dirty_bytes: int | None
    file_bytes: int | None
    num_filled_tokens: int
    """In the context when memory was read; `planned_resident_bytes` is of a full one."""
    planned_resident_bytes: int
    planned_total_bytes: int


def standin(
    model: Annotated[
        str,
        typer.Argument(
            help="A .gguf file (its header), a config.json or its directory, hf:ORG/REPO[:QUANT], "
            "or a name that `brim recommend` lists."
        ),
    ],
    quant: Annotated[
        str | None,
        typer.Option(help="Quant of a config or a name, as Q4_K_M, or 'MLX 4bit' for MLX."),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option("--ctx", "--context", min=1, help="Longest prompt plus answer, in tokens."),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(min=1, help="Build at most so many layers and scale; by size unless given."),
    ] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Length of the timed prompt.")] = 512,
    generate: Annotated[int, typer.Option(min=1, help="Tokens decoded in a timed run.")] = 32,
    depth: Annotated[
        int, typer.Option(min=0, help="Tokens in the sequence when decode begins.")
    ] = 0,
    repetitions: Annotated[
        int, typer.Option("--repetitions", "-r", min=1, help="Counted runs of each test.")
    ] = 3,
    force: Annotated[
        bool, typer.Option("--force", help="Load what is built even if it does not fit.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Build a random-weight model of the same shape and measure its speed and memory here."""
    import platformdirs

    from brim.bench.standin.source import standin_of
    from brim.bench.standin.trial import MAX_FILE_BYTES, Wanted, try_model
    from brim.cli.errors import say
    from brim.cli.neighbours import granted, machine_beside_servers
    from brim.cli.output import print_json
    from brim.ledger.budget import budget_of

    name, made_of = standin_of(model, quant)
    machine = machine_beside_servers()

    def admit(plan: "Plan") -> AbstractContextManager[object]:
        return granted(plan.model.name, plan, force=force)

    wanted = Wanted(
        num_prompt=prompt,
        num_generate=generate,
        depth=depth,
        repetitions=repetitions,
        layers=layers,
        max_bytes=min(MAX_FILE_BYTES, budget_of(machine).tight.num_bytes * 3 // 4),
    )
    plan_of = _planner(machine, context, longest=max(prompt, depth + generate))
    directory = platformdirs.user_cache_path("brim", appauthor=False) / "standin"
    trial = try_model(made_of, wanted, plan_of, admit, name=name, directory=directory, progress=say)
    report = _report(trial, machine)
    if as_json:
        print_json(report)
    else:
        _print(report)


def _planner(
    machine: "MachineSpec", context: int | None, *, longest: int
) -> "Callable[[ModelSpec], Plan]":
    """Plans for one sequence that holds the longest test at least.

    A plan is refused where its engine is not installed: before anything is built.

    Raises:
        BadParameter: The context that was asked for is shorter.
    """
    from brim.cli.bench_engines import check_engines
    from brim.cli.dispatch import ENGINE_OF_FORMAT
    from brim.config.load import load_settings
    from brim.planner.plan import make_plan

    if context is not None and context < longest:
        raise typer.BadParameter(f"the tests need {longest} tokens, --ctx has {context}")
    settings = load_settings().settings.models

    def plan(spec: "ModelSpec") -> "Plan":
        window = context or max(longest, min(settings.context_tokens, spec.trained_context_tokens))
        planned = make_plan(
            spec,
            machine,
            engine=ENGINE_OF_FORMAT[spec.format],
            objective=settings.objective,
            context_tokens=window,
            max_sequences=1,
        )
        check_engines([planned.engine])
        return planned

    return plan


def _report(trial: "Trial", machine: "MachineSpec") -> StandinReport:
    spec, plan, whole = trial.spec, trial.plan, trial.whole
    forecast = _forecast(trial, machine)
    speed = forecast.speed
    resident = None
    if whole.dirty_bytes is not None and whole.file_bytes is not None:
        resident = whole.dirty_bytes + whole.file_bytes
    return StandinReport(
        model=spec.name,
        architecture=spec.architecture,
        quant=spec.quant,
        num_layers=spec.num_layers,
        num_parameters=spec.num_parameters,
        num_prompt_tokens=trial.num_prompt_tokens,
        depth_tokens=trial.depth_tokens,
        context_tokens=plan.context_tokens,
        kv_type=kv_name(plan),
        num_threads=plan.num_threads,
        num_batch_threads=plan.num_batch_threads,
        is_scaled=bool(trial.slices),
        scaled=trial.scaled,
        slices=tuple(_slice(each, trial) for each in trial.slices),
        decode_tok_s=_rate(whole.decode_s, 1),
        forecast_decode_tok_s=speed.decode_tok_s if speed else None,
        prefill_tok_s=_rate(whole.prefill_s, trial.num_prompt_tokens),
        forecast_prefill_tok_s=speed.prefill_tok_s if speed else None,
        load_s=whole.load_s,
        forecast_load_s=forecast.load_s,
        forecast_source=speed.source if speed else forecast.reasons.get("speed", ""),
        weights_bytes=spec.weights_bytes,
        planned_weights_bytes=plan.memory.weights_bytes,
        kv_bytes=whole.footprint.kv_bytes,
        planned_kv_bytes=plan.memory.kv_bytes,
        compute_bytes=whole.footprint.compute_bytes + whole.footprint.output_bytes,
        planned_compute_bytes=plan.memory.compute_bytes,
        resident_bytes=resident,
        dirty_bytes=whole.dirty_bytes,
        file_bytes=whole.file_bytes,
        num_filled_tokens=whole.num_filled_tokens,
        planned_resident_bytes=plan.memory.resident_bytes,
        planned_total_bytes=plan.memory.total_bytes,
    )


def _rate(seconds: "Seconds", num_tokens: int) -> SpeedRange:
    return SpeedRange(
        low=num_tokens / seconds.slowest,
        expected=num_tokens / seconds.median,
        high=num_tokens / seconds.quickest,
    )


def _slice(measured: "Measured", trial: "Trial") -> SliceReport:
    return SliceReport(
        num_layers=measured.num_layers,
        weights_bytes=measured.weights_bytes,
        prefill_tok_s=trial.num_prompt_tokens / measured.prefill_s.median,
        decode_tok_s=1 / measured.decode_s.median,
        load_s=measured.load_s,
        dirty_bytes=measured.dirty_bytes,
        file_bytes=measured.file_bytes,
    )


def _forecast(trial: "Trial", machine: "MachineSpec") -> Forecast:
    from brim.cli.speed_sources import speed_sources
    from brim.planner.forecast import forecast_plan

    calibration, read_bytes_per_s = speed_sources(trial.plan, machine)
    return forecast_plan(
        trial.plan,
        machine,
        calibration=calibration,
        read_bytes_per_s=read_bytes_per_s,
        depth_tokens=trial.depth_tokens,
        prompt_tokens=trial.num_prompt_tokens,
    )


def _print(report: StandinReport) -> None:
    from brim.cli.output import print_table

    billions = report.num_parameters / 1e9
    typer.echo(
        f"{report.model}: {report.architecture}, {billions:.2f} B parameters in {report.quant}, "
        f"{report.num_layers} layers, context {report.context_tokens}, KV {report.kv_type}"
    )
    typer.echo()
    rows = _speed_rows(report)
    print_table(("speed", "measured", "forecast", ""), rows, right=frozenset({1, 2}))
    typer.echo()
    print_table(
        ("memory", "measured", "planned", ""), _memory_rows(report), right=frozenset({1, 2})
    )
    typer.echo()
    for line in _notes(report):
        typer.echo(f"note: {line}")


def _speed_rows(report: StandinReport) -> list[tuple[str, str, str, str]]:
    load = "-" if report.forecast_load_s is None else f"{report.forecast_load_s:.1f} s"
    depth, prompt = report.depth_tokens, report.num_prompt_tokens
    return [
        (
            "decode",
            _range(report.decode_tok_s),
            _range(report.forecast_decode_tok_s),
            f"tok/s, {depth} tokens deep, {report.num_threads} threads",
        ),
        (
            "prefill",
            _range(report.prefill_tok_s),
            _range(report.forecast_prefill_tok_s),
            f"tok/s, a prompt of {prompt}, {report.num_batch_threads} threads",
        ),
        ("load", f"{report.load_s:.1f} s", load, "measured with the file in the page cache"),
    ]


def _memory_rows(report: StandinReport) -> list[tuple[str, str, str, str]]:
    def shown(num_bytes: int | None) -> str:
        return "-" if num_bytes is None else gib(num_bytes)

    resident = "anonymous memory and mapped file pages of the process"
    return [
        ("weights", gib(report.weights_bytes), gib(report.planned_weights_bytes), "by the header"),
        ("KV", gib(report.kv_bytes), gib(report.planned_kv_bytes), "by the backend"),
        (
            "compute",
            gib(report.compute_bytes),
            gib(report.planned_compute_bytes),
            "reserved, by the backend",
        ),
        ("resident", shown(report.resident_bytes), gib(report.planned_resident_bytes), resident),
    ]


def _range(speed: SpeedRange | None) -> str:
    if speed is None:
        return "-"
    return f"{speed.expected:.1f} ({speed.low:.1f} to {speed.high:.1f})"


def _notes(report: StandinReport) -> list[str]:
    notes = ["weights are random: speed and memory are real, answers mean nothing"]
    if report.slices:
        built = " and ".join(
            f"{each.num_layers} layers ({gib(each.weights_bytes)}, {each.decode_tok_s:.1f} tok/s)"
            for each in report.slices
        )
        notes.append(f"measured were {built}")
        for how in dict.fromkeys(report.scaled.values()):
            names = ", ".join(name for name, line in report.scaled.items() if line == how)
            notes.append(f"{names}: {how}")
    if report.num_filled_tokens < report.context_tokens - 1:
        notes.append(
            f"memory was read with {report.num_filled_tokens} tokens in the context, planned is a "
            "full one: filling it would have taken too long"
        )
    if report.forecast_source:
        is_forecast = report.forecast_decode_tok_s is not None
        start = "forecast by" if is_forecast else "no forecast"
        notes.append(f"{start}: {report.forecast_source}")
    return notes
