"""`brim forecast`: how far the speed forecast is from published measurements."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from brim.errors import ConfigError

if TYPE_CHECKING:
    from brim.core.machine import MachineSpec
    from brim.planner.apple.row_forecast import ErrorSummary, RowForecast
    from brim.planner.apple.rows import Row

MAX_FILE_BYTES = 64 * 2**20
"""Room for the most rows that are read at once, at 3 KB a row; as Python's objects they take about
ten times as much memory."""


def forecast(
    rows: Annotated[Path, typer.Argument(help="JSON list of measured rows.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Forecast measured speeds of Macs, and print the error of each row and their summary."""
    from brim.cli.output import print_json
    from brim.planner.apple.row_forecast import forecast_row, summarise
    from brim.planner.apple.rows import decode_rows

    found = [forecast_row(row, chip_of) for row in decode_rows(_read(rows))]
    summary, groups = summarise(found), summarise(found, by_chip_and_engine=True)
    if as_json:
        print_json({"rows": found, "groups": groups, "summary": summary})
        return
    _print_rows(found)
    typer.echo()
    _print_summaries(groups)
    typer.echo()
    _print_summaries(summary)
    num_left_out = sum(not row.is_judged for row in found)
    if num_left_out:
        typer.echo(
            f"\n{num_left_out} of {len(found)} rows are not judged: suspect, or without "
            "architecture, GPU cores or measured speed"
        )


def _read(path: Path) -> bytes:
    if not path.is_file():
        found = f"{path} is not a file" if path.exists() else f"there is no file {path}"
        raise ConfigError(f"{found}; give a JSON list of measured rows")
    try:
        num_bytes = path.stat().st_size
        if num_bytes > MAX_FILE_BYTES:
            raise ConfigError(
                f"{path} has {num_bytes} bytes; split it into files of at most {MAX_FILE_BYTES}"
            )
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}; give a JSON list of measured rows"
        ) from error


def chip_of(row: "Row") -> "MachineSpec | None":
    """The row's bin in the table of chips; the lower one where it does not say."""
    from brim.machine.chips import find_chip, machine_of
    from brim.planner.apple.rows import GIB

    # Without its memory nothing is ruled out: no Mac is sold with none.
    ram_gb = row.ram_gb or 0
    chip = find_chip(row.chip, int(row.gpu_cores) if row.gpu_cores else None, int(ram_gb * GIB))
    return None if chip is None else machine_of(chip, ram_gb or chip.ram_gb[0])


def _print_rows(rows: "Sequence[RowForecast]") -> None:
    from brim.cli.output import print_table

    head = (
        "row", "chip", "gpu", "engine", "model", "quant", "test",
        "tok/s", "low", "expected", "high", "error", "",
    )  # fmt: skip
    cells = []
    for row in rows:
        speed = row.forecast_tok_s
        figures = ("-",) * 3 if speed is None else (
            f"{speed.low:.1f}", f"{speed.expected:.1f}", f"{speed.high:.1f}",
        )  # fmt: skip
        cells.append(
            (
                row.id or "-",
                row.chip,
                "-" if row.gpu_cores is None else str(row.gpu_cores),
                row.engine,
                row.model,
                row.quant or "-",
                row.test or row.kind,
                "-" if row.measured_tok_s is None else f"{row.measured_tok_s:.1f}",
                *figures,
                "-" if row.error_percent is None else f"{row.error_percent:+.0f} %",
                row.problem or row.note or ("" if row.is_judged else "not judged"),
            )
        )
    print_table(head, cells, right=frozenset({2, 7, 8, 9, 10, 11}))


def _print_summaries(summaries: "Sequence[ErrorSummary]") -> None:
    from brim.cli.output import print_table

    head = (
        "kind", "chip", "engine", "rows", "median error", "9 in 10 below", "inside", "high/low",
    )  # fmt: skip
    cells = [
        (
            item.kind,
            item.chip or "all",
            item.engine or "all",
            str(item.num_rows),
            f"{item.median_error_percent:.1f} %",
            f"{item.p90_error_percent:.1f} %",
            f"{item.inside_percent:.0f} %",
            f"{item.median_high_over_low:.2f}",
        )
        for item in summaries
    ]
    print_table(head, cells, right=frozenset(range(3, 8)))
