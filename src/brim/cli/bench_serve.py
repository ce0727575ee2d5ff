"""`brim bench serve`: servers side by side, under the same workloads, in one run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from brim.bench.serving.harness import Comparison
    from brim.bench.serving.report import Report, Row
    from brim.bench.stats import Summary

LARGEST_SEED = 2**32 - 1


def serve(
    endpoint: Annotated[
        list[str] | None,
        typer.Option("--endpoint", "-e", help="NAME=URL[#MODEL] of a server that runs; repeatable"),
    ] = None,
    server: Annotated[
        list[str] | None,
        typer.Option(
            "--server",
            "-s",
            help="NAME='COMMAND --port {port}' of a server to start, kill and stop; repeatable. "
            "Variables: NAME='env X=Y COMMAND'.",
        ),
    ] = None,
    workload: Annotated[
        list[str] | None,
        typer.Option(
            "--workload",
            "-w",
            help="single, cold, stall, shared-prefix, agents, restart, throughput, load, depth or "
            "recorded; repeatable; all but recorded unless given.",
        ),
    ] = None,
    repetitions: Annotated[
        int, typer.Option("--repetitions", "-r", min=1, help="Turns of every server.")
    ] = 3,
    reference: Annotated[
        str | None, typer.Option(help="Ratios are to this server; to the first unless given.")
    ] = None,
    scale: Annotated[
        float,
        typer.Option(min=0.01, max=100, help="Factor on all prompt and answer lengths."),
    ] = 1.0,
    depths: Annotated[
        str | None, typer.Option(help="Context lengths of `depth`, as 512,4096; before --scale.")
    ] = None,
    rates: Annotated[
        str, typer.Option(help="Requests a second of `load`, as 0.5,1,2.")
    ] = "0.5,1,2",
    requests_per_rate: Annotated[
        int, typer.Option(min=1, help="Requests that `load` sends at each rate.")
    ] = 6,
    requests: Annotated[
        Path | None,
        typer.Option(
            help="JSONL of requests for `load` and `recorded`; the 32 that come with brim "
            "unless given."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use only the first requests of the file.")
    ] = None,
    concurrency: Annotated[
        str, typer.Option("--concurrency", "-c", help="Requests at once of `recorded`, as 1,4.")
    ] = "1",
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=LARGEST_SEED,
            help="Makes the same texts again; new ones unless given, so that no server has them.",
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="Draw medians and ranges into a file.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Measure even a busy, hot or swapping machine.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, all samples included.")
    ] = False,
) -> None:
    """Measure servers side by side: each workload in turn, ratios pair by pair.

    Ctrl-C ends the run and prints what it has.
    """
    import secrets

    from brim.bench import workload as recorded_requests
    from brim.bench.client import Endpoint
    from brim.bench.serving.harness import PATIENCE_S, Comparison, Wanted
    from brim.bench.serving.mixed import Recorded
    from brim.bench.serving.plot import check_plot
    from brim.bench.serving.server import ServerCommand
    from brim.bench.serving.sizes import Sizes
    from brim.bench.serving.workloads import choose
    from brim.cli.errors import say
    from brim.cli.numbers import decimals, whole_numbers
    from brim.machine.reading import machine_at_hand

    if plot is not None:
        check_plot(plot)
    recorded = Recorded(
        requests=tuple(recorded_requests.load(requests, limit=limit)),
        rates_per_s=tuple(decimals(rates, "--rates")),
        requests_per_rate=requests_per_rate,
        concurrencies=tuple(whole_numbers(concurrency, "--concurrency", least=1)),
    )
    sizes = Sizes()
    if depths is not None:
        sizes = Sizes(depths=tuple(sorted(whole_numbers(depths, "--depths", least=1))))
    wanted = Wanted(
        sources=(
            *map(Endpoint.parse, endpoint or ()),
            *map(ServerCommand.parse, server or ()),
        ),
        workloads=tuple(choose(workload or (), recorded)),
        repetitions=repetitions,
        # Not a fixed number: a prefix cache on disk remembers the texts of the last run.
        seed=secrets.randbelow(LARGEST_SEED) if seed is None else seed,
        sizes=sizes.scaled(scale),
        reference=reference,
        must_be_calm=not force,
        patience_s=0.0 if force else PATIENCE_S,
    )
    _show(_run(Comparison(wanted, machine_at_hand(), progress=say)), plot, as_json=as_json)


def _run(comparison: "Comparison") -> "Report":
    """Measure; Ctrl-C and SIGTERM end it, and what there is comes back."""
    import asyncio
    import signal

    async def main() -> "Report":
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        # Servers that were started must not outlive a run that is told to end.
        loop.add_signal_handler(signal.SIGTERM, task.cancel)
        return await comparison.measure()

    try:
        return asyncio.run(main())
    except asyncio.CancelledError:  # SIGTERM before anything was measured
        raise KeyboardInterrupt from None


def _show(report: "Report", plot: Path | None, *, as_json: bool) -> None:
    from brim.bench.serving.plot import draw
    from brim.cli.errors import INTERRUPTED, say
    from brim.cli.output import print_json

    if as_json:
        print_json(report)
    else:
        print_report(report)
    for complaint in report.complaints:
        say(f"note: {complaint}")
    if plot is not None:
        draw(report, plot)
        say(f"the plot is in {plot}")
    if report.was_interrupted:
        say(f"interrupted: figures are of the {len(report.samples)} turns that were complete")
        raise typer.Exit(INTERRUPTED)


def print_report(report: "Report") -> None:
    """The table: a line for each figure and server, and one for each failure."""
    from brim.cli.output import print_table

    head = ("workload", "figure", "at", "server", "median", "min to max", "ratio", "min to max")
    print_table(head, [_cells_of(row) for row in report.rows], right=frozenset({4, 6}))


def _cells_of(row: "Row") -> tuple[str, ...]:
    if row.value is None:
        # Last, so that a long sentence widens no column of figures.
        return (row.workload, "-", "", row.server, "", "", "", row.failure or "")
    name, scale, digits = row.figure, 1.0, 2
    if name.endswith("_bytes"):
        name, scale, digits = name.removesuffix("_bytes") + "_MiB", 2.0**-20, 1
    elif name.endswith("_s") and not name.endswith(("tok_s", "req_s")):
        digits = 3
    value = _cells(row.value, scale, digits)
    ratio = ("", "") if row.ratio is None else _cells(row.ratio, 1.0, 3)
    return (row.workload, name, row.at, row.server, *value, *ratio)


def _cells(summary: "Summary", scale: float, digits: int) -> tuple[str, str]:
    """Median and range."""
    low, mid, high = (
        f"{scale * value:.{digits}f}"
        for value in (summary.minimum, summary.median, summary.maximum)
    )
    return mid, f"{low} to {high}"
