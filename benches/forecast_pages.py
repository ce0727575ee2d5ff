"""Writes docs/forecast.md and docs/expectations.md with their plots, from files of rows.

    python benches/forecast_pages.py ROWS.json PROMISES.json

ROWS.json holds measured rows, as `brim forecast` reads them; PROMISES.json what guides tell users
to expect.  Neither ships, and promises are never used for fitting.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import matplotlib as mpl
import msgspec
from forecast_promises import Compared, Verdict, compare, read_promises
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from brim.cli.forecast import chip_of
from brim.planner.apple.row_forecast import ErrorSummary, RowForecast, forecast_row, summarise
from brim.planner.apple.rows import decode_rows
from brim.planner.apple.speed import fitted

DOCS = Path(__file__).parent.parent / "docs"
SPLITS = {
    "rows": "random rows (tenths)",
    "models": "whole models (twelfths of them)",
    "sources": "whole sources, one at a time",
    "chips": "whole chips, one at a time",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("promises", type=Path)
    arguments = parser.parse_args()
    # The same figure gives the same file, so that a diff means a change.
    mpl.rcParams |= {"svg.hashsalt": "brim", "font.size": 9}
    found = [forecast_row(row, chip_of) for row in decode_rows(arguments.rows.read_bytes())]
    judged = [row for row in found if row.is_judged]
    plot_errors(judged)
    (DOCS / "forecast.md").write_text(forecast_page(judged))
    compared = [compare(promise) for promise in read_promises(arguments.promises.read_bytes())]
    plot_promises(compared)
    (DOCS / "expectations.md").write_text(expectations_page(compared))


def save(figure: Figure, name: str) -> None:
    figure.tight_layout()
    figure.savefig(DOCS / name, metadata={"Date": None})
    plt.close(figure)


def plot_errors(rows: Sequence[RowForecast]) -> None:
    """Forecast over measured speed, for decode and prefill."""
    figure, panes = plt.subplots(1, 2, figsize=(9, 4.2))
    for pane, kind in zip(panes, ("decode", "prefill"), strict=True):
        for family, colour in (("mlx", "tab:orange"), ("other", "tab:blue")):
            points = [
                (row.measured_tok_s, row.forecast_tok_s.expected)
                for row in rows
                if row.kind == kind
                and row.forecast_tok_s is not None
                and ("mlx" in row.engine.lower()) == (family == "mlx")
            ]
            label = "MLX engines" if family == "mlx" else "llama.cpp engines"
            pane.scatter(*zip(*points, strict=True), s=6, c=colour, label=label, linewidths=0)
        ends = pane.get_xlim()
        pane.plot([1, ends[1]], [1, ends[1]], c="grey", lw=0.8)
        pane.set(
            xscale="log", yscale="log", title=kind, xlabel="measured tok/s", ylabel="forecast tok/s"
        )
        pane.legend(frameon=False)
    save(figure, "forecast.svg")


def plot_promises(rows: Sequence[Compared]) -> None:
    """Each promise as a bar beside the forecast's range and the ceiling."""
    shown = [row for row in rows if row.forecast is not None]
    figure, pane = plt.subplots(figsize=(9, 0.19 * len(shown) + 1))
    for place, row in enumerate(reversed(shown)):
        speed, promise = row.forecast, row.promise
        assert speed is not None
        pane.plot([speed.low, speed.high], [place, place], c="tab:blue", lw=4, alpha=0.4)
        pane.plot(speed.expected, place, "|", c="tab:blue", ms=8)
        colour = "tab:red" if row.verdict.startswith("impossible") else "black"
        ends = [promise.tok_s_low, promise.tok_s_high]
        pane.plot(ends, [place, place], "o-", c=colour, ms=3, lw=1)
        assert row.ceiling_tok_s is not None
        pane.plot(row.ceiling_tok_s, place, "x", c="tab:green", ms=4)
    names = [f"{r.promise.chip} {r.promise.model} {r.promise.quant}" for r in reversed(shown)]
    pane.set_yticks(range(len(names)), names, fontsize=6)
    pane.set(
        xscale="log", ylim=(-1, len(names)),
        xlabel="tok/s: forecast's range (blue), promise (dots; red where impossible), "
        "bandwidth over bytes (green)",
    )  # fmt: skip
    save(figure, "expectations.svg")


def forecast_page(rows: Sequence[RowForecast]) -> str:
    lines = [
        "# The speed forecast for Macs, and its error",
        "",
        "Written by `benches/forecast_pages.py`; do not edit by hand. The constants are in",
        "`src/brim/planner/data/apple_speeds.json`; `benches/fit_apple_speeds.py` refits them.",
        "",
        "Seconds for a token = (weights + KV bytes) / bandwidth, which nothing can beat, plus",
        "losses: unpacking weights, work for each layer, routing of experts, recurrent layers,",
        "attention, KV that is read again for every further four query heads of a KV head. Each",
        "loss is a number that follows from the model's shape and the chip, times a constant that",
        "is pooled over engine, generation, tier, chip and quant: what few measurements tell apart",
        "stays near its family, and a chip that nobody measured gets its family's. The bins of a",
        "chip share its constants: one with more GPU cores or bandwidth is never forecast slower.",
        "",
        f"Fitted to {fitted().provenance['rows']} ({fitted().provenance['written_on']}).",
        "",
        "![forecast and measured speed](forecast.svg)",
        "",
        "## Errors",
        "",
        "Absolute errors of the expected speed. Left out means: forecast by constants that never",
        "saw those rows.",
        "",
        "| | decode median | 9 in 10 below | inside range | prefill median | 9 in 10 below "
        "| inside range |",
        "|---|---|---|---|---|---|---|",
        *error_lines(rows),
        "",
        f"Median high/low: {width_of('decode'):.2f} for decode, {width_of('prefill'):.2f} for "
        "prefill, as wide as a row that was left out gets them. No forecast, not even `high`, is "
        "above bandwidth / bytes.",
        "",
        "Where only one source measured a chip, leaving out the source leaves out the chip; the",
        "last two splits therefore show what happens on a machine that nobody measured.",
        "",
        "## By chip and engine",
        "",
        "| kind | chip, GPU cores | engine | rows | median error | inside range | high/low |",
        "|---|---|---|---|---|---|---|",
        *(group_line(group) for group in summarise(rows, by_chip_and_engine=True)),
        "",
        "## What it does not know",
        "",
        "- Heat: figures are of a cool machine. `sustained` multiplies them by 0.6 to 0.8 for a",
        "  fanless chassis, 0.7 to 0.8 for a laptop or small desktop, 1 for a desktop. The MLX",
        "  rows of the base M5 are of a hot laptop, so its range is wide.",
        "- Several sequences at once: no published row measures them. Bytes and work follow from",
        "  the shape; the range is a quarter wider.",
        "- Soft-capped attention (Gemma 2) is not fused by mlx-lm; a plan for such a model is",
        "  too fast at depth there.",
        "- A draft head inside a model (some public 4-bit tags) decodes faster than bytes allow;",
        "  such rows count as suspect.",
        "- Chips with a different core count, memory or generation than any measured one: by",
        "  family, at the errors of the last line above.",
    ]
    return "\n".join(lines) + "\n"


def width_of(kind: str) -> float:
    return fitted().figures[kind]["median_high_over_low"]


def error_lines(rows: Sequence[RowForecast]) -> list[str]:
    by_kind = {item.kind: item for item in summarise(rows)}
    cells = [
        f"{by_kind[kind].median_error_percent:.1f} % | {by_kind[kind].p90_error_percent:.1f} % | "
        f"{by_kind[kind].inside_percent:.0f} %"
        for kind in ("decode", "prefill")
    ]
    lines = [f"| rows that were fitted | {' | '.join(cells)} |"]
    for split, words in SPLITS.items():
        cells = [
            f"{figures[f'{split}_median_percent']:.1f} % | {figures[f'{split}_p90_percent']:.1f} % "
            f"| {figures[f'{split}_coverage_percent']:.0f} %"
            for figures in (fitted().figures["decode"], fitted().figures["prefill"])
        ]
        lines.append(f"| left out: {words} | {' | '.join(cells)} |")
    return lines


def group_line(group: ErrorSummary) -> str:
    return (
        f"| {group.kind} | {group.chip} | {group.engine} | {group.num_rows} | "
        f"{group.median_error_percent:.1f} % | {group.inside_percent:.0f} % | "
        f"{group.median_high_over_low:.2f} |"
    )


def expectations_page(rows: Sequence[Compared]) -> str:
    counts = {verdict: sum(row.verdict == verdict for row in rows) for verdict in get_args(Verdict)}
    lines = [
        "# What guides promise, beside the forecast",
        "",
        "Written by `benches/forecast_pages.py`; do not edit by hand. The promises are what",
        "well-known guides tell users to expect of decode with a short context. They are not",
        "measurements, and the forecast was never fitted to them.",
        "",
        f"Of {len(rows)} promises {counts['impossible']} are **impossible**: above bandwidth over",
        "the bytes that a token reads, whatever the engine does; of "
        f"{counts['impossible at its upper end']} more the upper",
        f"end is. Of the others {counts['too high']} lie above the forecast's range, "
        f"{counts['plausible']} touch it and {counts['too low']} lie",
        f"below it; {counts['no such machine']} are for a chip that does not exist.",
        "",
        "![promises and forecasts](expectations.svg)",
        "",
        "| guide | chip | RAM | model | quant | promised tok/s | forecast tok/s | ceiling | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        promise, speed = row.promise, row.forecast
        ends = {promise.tok_s_low, promise.tok_s_high}
        forecast = (
            "-" if speed is None else f"{speed.expected:.1f} ({speed.low:.1f}-{speed.high:.1f})"
        )
        ceiling = "-" if row.ceiling_tok_s is None else f"{row.ceiling_tok_s:.1f}"
        verdict = f"**{row.verdict}**" if "impossible" in row.verdict else row.verdict
        lines.append(
            f"| {promise.source} | {promise.chip} | {promise.ram_gb} GB | {promise.model} | "
            f"{promise.quant} | {'-'.join(f'{end:g}' for end in sorted(ends))} | {forecast} | "
            f"{ceiling} | {verdict} |"
        )
    lines += [
        "",
        "Where a guide names no GPU cores, the smaller bin that is sold with the memory is taken.",
        "Sizes are the guide's where it gives them, else the quant's usual bits.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
    print(msgspec.json.encode(fitted().figures).decode())
