"""`brim bench`: what a model does on this machine, and servers side by side."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from brim.cli.bench_standin import standin

if TYPE_CHECKING:
    from brim.bench.serve import Report
    from brim.bench.speed import Row
    from brim.bench.stats import Summary
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
        str, typer.Option("--model", "-m", help="A .gguf file, hf:ORG/REPO[:QUANT], or demo.")
    ],
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="Prompt lengths in tokens, as 512,1024; 0: none.")
    ] = "512",
    generate: Annotated[
        str, typer.Option("--generate", "-n", help="Answer lengths in tokens; 0: none.")
    ] = "128",
    depth: Annotated[
        str, typer.Option("--depth", "-d", help="Tokens already in the context, as 0,4096.")
    ] = "0",
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
    from brim.cli.errors import say
    from brim.cli.neighbours import granted
    from brim.cli.output import print_json

    wanted = bench.cases(
        _numbers(prompt, "--prompt"), _numbers(generate, "--generate"), _numbers(depth, "--depth")
    )
    longest = max(case.num_tokens for case in wanted)
    plan = _plan(model, longest, threads, kv, flash_attention, objective)
    with granted(plan.model.name, plan, force=force):
        engine = _load(plan)
        try:
            rows = list(bench.measure(engine, plan, wanted, repetitions=repetitions, progress=say))
        finally:
            engine.shutdown()
    if as_json:
        print_json(rows)
    else:
        _print_speed(rows)


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


def _plan(
    model: str,
    longest: int,
    threads: int | None,
    kv: str | None,
    flash_attention: bool | None,
    objective: str | None,
) -> "Plan":
    """A plan for one sequence that holds the longest test."""
    from brim.cli.neighbours import machine_beside_servers
    from brim.cli.planning import ENGINE_OF_FORMAT
    from brim.config.load import load_settings
    from brim.core.plan import Objective
    from brim.errors import Unsupported
    from brim.planner.plan import make_plan
    from brim.registry.sources import resolve

    if objective not in (None, *Objective):
        raise typer.BadParameter(f"--objective is one of {', '.join(Objective)}; not '{objective}'")
    spec, machine = resolve(model), machine_beside_servers()
    if spec.format not in ENGINE_OF_FORMAT:
        raise Unsupported(f"no engine here loads {spec.format} models; convert it to GGUF")
    return make_plan(
        spec,
        machine,
        engine=ENGINE_OF_FORMAT[spec.format],
        objective=Objective(objective) if objective else load_settings().settings.models.objective,
        context_tokens=longest,
        max_sequences=1,
        kv_type=kv,
        flash_attention=flash_attention,
        threads=threads,
    )


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
