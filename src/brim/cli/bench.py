"""`brim bench`: what a model does on this machine, and servers side by side."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from brim.cli.bench_standin import standin

if TYPE_CHECKING:
    from brim.bench.serve import Report
    from brim.bench.speed import Case, Row
    from brim.bench.stats import Summary
    from brim.core.model import ModelSpec
    from brim.core.plan import Plan
    from brim.engine.base import Engine

app = typer.Typer(
    help="Measure a model's speed here, or compare servers.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

app.command("standin")(standin)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, all samples included.")]


@app.command("speed")
def speed(
    model: Annotated[
        list[str],
        typer.Option(
            "--model",
            "-m",
            help="A .gguf file, a model's directory, hf:ORG/REPO[:QUANT], or demo; two forms of "
            "one model compare their engines.",
        ),
    ],
    engine: Annotated[
        str | None,
        typer.Option(
            help="mlx, llamacpp, or both in turns; by the model's form unless given. For both, a "
            "checkpoint without a GGUF form is converted to F16."
        ),
    ] = None,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="Prompt lengths in tokens, as 512,1024; 0: none.")
    ] = "512",
    generate: Annotated[
        str, typer.Option("--generate", "-n", help="Answer lengths in tokens; 0: none.")
    ] = "128",
    depth: Annotated[
        str, typer.Option("--depth", "-d", help="Tokens already in the context, as 0,4096.")
    ] = "0",
    batch: Annotated[
        str, typer.Option("--batch", "-b", help="Sequences that produce tokens at once, as 1,8.")
    ] = "1",
    repetitions: Annotated[
        int, typer.Option("--repetitions", "-r", min=1, help="Counted runs of each test.")
    ] = 5,
    threads: Annotated[
        int | None, typer.Option("--threads", "-t", min=1, help="Planned unless given.")
    ] = None,
    kv: Annotated[
        str | None, typer.Option(help="Type of the KV cache, as f16 or q8_0; planned unless given.")
    ] = None,
    flash_attention: Annotated[
        bool | None,
        typer.Option("--flash-attention/--no-flash-attention", help="Planned unless given."),
    ] = None,
    objective: Annotated[
        str | None, typer.Option(help="decode, prefill or memory; by the settings unless given.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Load the model even if it does not fit.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Time prefill (pp) and decode (tg) without a server; rows are named as llama-bench's."""
    from brim.bench import speed as bench
    from brim.cli.bench_engines import wants_comparison
    from brim.core.plan import Objective

    wanted = bench.cases(
        _numbers(prompt, "--prompt"),
        _numbers(generate, "--generate"),
        _numbers(depth, "--depth"),
        _numbers(batch, "--batch", least=1),
    )
    if objective not in (None, *Objective):
        raise typer.BadParameter(f"--objective is one of {', '.join(Objective)}; not '{objective}'")
    wishes = {"kv_type": kv, "flash_attention": flash_attention, "threads": threads}
    plan_of = _planner(wanted, objective, wishes)
    if wants_comparison(model, engine):
        _compare(model, wanted, repetitions, plan_of, force=force, as_json=as_json)
    else:
        plan = plan_of(_form(model[0], engine))
        _measure(plan, wanted, repetitions, force=force, as_json=as_json)


def _measure(
    plan: "Plan", wanted: "list[Case]", repetitions: int, *, force: bool, as_json: bool
) -> None:
    """Time one engine, in this process."""
    from brim.bench import speed as bench
    from brim.cli.errors import say
    from brim.cli.neighbours import granted
    from brim.cli.output import print_json

    with granted(plan.model.name, plan, force=force):
        loaded = _load(plan)
        try:
            rows = list(bench.measure(loaded, plan, wanted, repetitions=repetitions, progress=say))
        finally:
            loaded.shutdown()
    if as_json:
        print_json(rows)
    else:
        _print_speed(rows)


def _compare(
    models: list[str],
    wanted: "list[Case]",
    repetitions: int,
    plan_of: "Callable[[ModelSpec], Plan]",
    *,
    force: bool,
    as_json: bool,
) -> None:
    """Time two engines in turns, each in a process of its own."""
    from brim.bench.engines import compare_engines
    from brim.cli.bench_engines import print_comparison, specs_of, together
    from brim.cli.errors import say
    from brim.cli.neighbours import granted
    from brim.cli.output import print_json

    with specs_of(models, say) as specs:
        plans = [plan_of(spec) for spec in specs]
        with granted(plans[0].model.name, together(plans), force=force):
            found = compare_engines(plans, wanted, repetitions=repetitions, progress=say)
    if as_json:
        print_json(found)
    else:
        print_comparison(found)


@app.command("serve")
def serve(
    endpoint: Annotated[
        list[str],
        typer.Option("--endpoint", "-e", help="NAME=URL[#MODEL]; again for each; first: reference"),
    ],
    requests: Annotated[
        Path | None,
        typer.Option(help="JSONL of requests; the 32 that come with brim unless given."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Send only the first ones of the file.")
    ] = None,
    concurrency: Annotated[
        str, typer.Option("--concurrency", "-c", help="Requests at once, as 1,4.")
    ] = "1",
    repetitions: Annotated[
        int, typer.Option("--repetitions", "-r", min=1, help="Rounds of every server.")
    ] = 3,
    as_json: AsJson = False,
) -> None:
    """Send the same requests to several servers in turn and compare them pair by pair."""
    import asyncio

    from brim.bench import serve as bench
    from brim.bench import workload
    from brim.bench.client import Endpoint
    from brim.cli.errors import say
    from brim.cli.output import print_json

    report = asyncio.run(
        bench.compare(
            [Endpoint.parse(text) for text in endpoint],
            workload.load(requests, limit=limit),
            concurrencies=_numbers(concurrency, "--concurrency", least=1),
            repetitions=repetitions,
            progress=say,
        )
    )
    if as_json:
        print_json(report)
    else:
        _print_serve(report)


def _numbers(text: str, option: str, *, least: int = 0) -> list[int]:
    """Whole numbers separated by commas.

    Raises:
        typer.BadParameter: A part is no number, or below `least`.
    """
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < least:
        raise typer.BadParameter(f"{option} takes numbers from {least} up, as 1,4; not '{text}'")
    return found


def _form(model: str, engine: str | None) -> "ModelSpec":
    """The form of a model that the engine loads: the one asked for, or the default here.

    Raises:
        BrimError: It cannot be found, or has no such form.
    """
    from brim.cli.dispatch import choose_form
    from brim.cli.neighbours import machine_beside_servers
    from brim.registry.sources import forms_of

    return choose_form(forms_of(model), machine_beside_servers(), engine=engine).form.fetch()


def _planner(
    wanted: "list[Case]", objective: str | None, wishes: dict[str, Any]
) -> "Callable[[ModelSpec], Plan]":
    """Plans whose KV holds the largest test, for the engine that loads a model's form."""
    from brim.cli.dispatch import ENGINE_OF_FORMAT
    from brim.cli.neighbours import machine_beside_servers
    from brim.config.load import load_settings
    from brim.core.plan import Objective
    from brim.planner.plan import make_plan

    settings = load_settings().settings.models
    machine = machine_beside_servers()

    def plan(spec: "ModelSpec") -> "Plan":
        return make_plan(
            spec,
            machine,
            engine=ENGINE_OF_FORMAT[spec.format],
            objective=Objective(objective) if objective else settings.objective,
            # One window is what every pool holds, whatever the number of sequences.
            context_tokens=max(case.num_tokens for case in wanted),
            max_sequences=max(case.num_sequences for case in wanted),
            **wishes,
        )

    return plan


def _load(plan: "Plan") -> "Engine":
    import os

    from brim.engine import factory

    # Thread settings count from the moment the backend's libraries are loaded, which is now.
    os.environ.update(plan.environment)
    engine = factory.create(plan.engine)
    engine.load(plan)
    return engine


def _print_speed(rows: "list[Row]") -> None:
    from brim.cli.output import print_table

    head = ("test", "tok/s", "min", "max", "mean", "threads", "kv", "flash", "repack")
    print_table(
        head,
        [
            (
                row.test,
                f"{row.median_ts:.2f}",
                f"{row.min_ts:.2f}",
                f"{row.max_ts:.2f}",
                f"{row.avg_ts:.2f} ± {row.stddev_ts:.2f}",
                str(row.n_threads),
                row.type_k,
                "on" if row.flash_attn else "off",
                "on" if row.repack else "off",
            )
            for row in rows
        ],
        right=frozenset({1, 2, 3, 4, 5}),
    )


def _print_serve(report: "Report") -> None:
    from brim.cli.output import print_table

    head = ("at once", "figure", "server", "median", "min to max", "ratio", "min to max")
    table = []
    for row in sorted(report.rows, key=lambda row: (row.concurrency, row.figure)):
        name, scale = row.figure, 1.0
        if name.endswith("_s") and not name.endswith("tok_s"):
            name, scale = name[:-2] + "_ms", 1000.0
        value = _cells(row.value, scale, 1)
        ratio = ("", "") if row.ratio is None else _cells(row.ratio, 1.0, 3)
        table.append((str(row.concurrency), name, row.endpoint, *value, *ratio))
    print_table(head, table, right=frozenset({0, 3, 5}))


def _cells(summary: "Summary", scale: float, digits: int) -> tuple[str, str]:
    """Median and range."""
    low, mid, high = (
        f"{scale * value:.{digits}f}"
        for value in (summary.minimum, summary.median, summary.maximum)
    )
    return mid, f"{low} to {high}"
