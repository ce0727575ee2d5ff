"""Forecasts published measurements and says how far off each forecast is."""

import statistics
from collections.abc import Callable, Sequence

import msgspec

from brim.core.forecast import SpeedRange
from brim.core.machine import MachineSpec
from brim.errors import BrimError
from brim.planner.apple.row_shape import shape_of
from brim.planner.apple.rows import (
    Row,
    depth_tokens_of,
    is_comparable,
    machine_of,
    prompt_tokens_of,
    setting_of,
    unknown_kv_type,
)
from brim.planner.apple.speed import Fitted, forecast_setting

ChipLookup = Callable[[Row], MachineSpec | None]
"""Gives the bin of a row's chip in the table of chips, which belongs to another package."""


class RowForecast(msgspec.Struct, frozen=True, kw_only=True):
    """One row with its forecast."""

    id: str | None
    chip: str
    gpu_cores: int | None
    engine: str
    model: str
    quant: str | None
    kind: str
    test: str | None
    depth_tokens: int
    is_judged: bool
    """Whether the row counts in summaries: not suspect, architecture and GPU cores known."""
    measured_tok_s: float | None = None
    forecast_tok_s: SpeedRange | None = None
    ceiling_tok_s: float | None = None
    """Of a decode: bandwidth over the bytes of weights and KV read for a token."""
    error_percent: float | None = None
    """Forecast over measured, less 100 %."""
    is_inside: bool | None = None
    """Whether the measured speed lies within low and high."""
    problem: str | None = None
    """Why there is no forecast."""
    note: str | None = None
    """What the forecast assumes, where the row says something else."""


class ErrorSummary(msgspec.Struct, frozen=True, kw_only=True):
    """Errors of several judged rows of one kind."""

    kind: str
    chip: str | None
    """None for all rows of the kind, as with `engine`."""
    engine: str | None
    num_rows: int
    median_error_percent: float
    """Of absolute errors, as the next."""
    p90_error_percent: float
    inside_percent: float
    """Share of the rows within low and high."""
    median_high_over_low: float
    num_above_ceiling: int
    """Forecasts whose high is above bandwidth over bytes; always 0."""


def forecast_row(row: Row, lookup: ChipLookup, constants: Fitted | None = None) -> RowForecast:
    """The forecast of one row; a row that cannot be forecast says why instead.

    Args:
        row: The measurement.
        lookup: Finds the row's chip.
        constants: Other constants than those that ship.
    """
    is_decode = row.kind == "decode"
    tokens = depth_tokens_of(row) if is_decode else prompt_tokens_of(row)
    blank = RowForecast(
        id=row.id, chip=row.chip, gpu_cores=int(row.gpu_cores) if row.gpu_cores else None,
        engine=row.engine, model=row.model, quant=row.quant, kind=row.kind, test=row.test,
        depth_tokens=tokens if is_decode else 0, is_judged=False, measured_tok_s=row.tok_s,
    )  # fmt: skip
    try:
        shape = shape_of(row)
    except BrimError as error:
        return msgspec.structs.replace(blank, problem=error.message)
    if shape is None:
        return msgspec.structs.replace(blank, problem="the row has no architecture")
    machine = machine_of(row, lookup(row))
    speed = machine and forecast_setting(
        shape, machine, setting_of(row), depth_tokens=tokens if is_decode else 0,
        prompt_tokens=1 if is_decode else tokens, constants=constants,
    )  # fmt: skip
    if not speed:
        return msgspec.structs.replace(blank, problem=_unknown_chip(blank))
    found = speed.decode_tok_s if is_decode else speed.prefill_tok_s
    kv_type = unknown_kv_type(row)
    return msgspec.structs.replace(
        blank,
        is_judged=is_comparable(row),
        forecast_tok_s=found,
        ceiling_tok_s=speed.decode_ceiling_tok_s if is_decode else None,
        error_percent=100 * (found.expected / row.tok_s - 1) if row.tok_s else None,
        is_inside=found.low <= row.tok_s <= found.high if row.tok_s else None,
        note=f"KV type '{kv_type}' is not known; taken for f16" if kv_type else None,
    )


def _unknown_chip(row: RowForecast) -> str:
    bin_ = row.chip if row.gpu_cores is None else f"{row.chip} with {row.gpu_cores} GPU cores"
    return (
        f"the chip table has no '{bin_}'; name one of Apple's chips, and if it is a new one "
        "its gpu_cores and bandwidth_gb_s"
    )


def summarise(
    forecasts: Sequence[RowForecast], *, by_chip_and_engine: bool = False
) -> list[ErrorSummary]:
    """Errors of the judged rows of each kind, or of each kind, chip and engine.

    Args:
        forecasts: Any rows; those that do not count are left out.
        by_chip_and_engine: One summary for each chip and engine rather than one for all.
    """
    groups: dict[tuple[str, str | None, str | None], list[RowForecast]] = {}
    for row in forecasts:
        if row.is_judged:
            name = f"{row.chip} {row.gpu_cores}" if by_chip_and_engine else None
            key = row.kind, name, row.engine if by_chip_and_engine else None
            groups.setdefault(key, []).append(row)
    order = sorted(groups, key=lambda key: (key[0], key[1] or "", key[2] or ""))
    return [_summary(*key, groups[key]) for key in order]


def _summary(
    kind: str, chip: str | None, engine: str | None, rows: Sequence[RowForecast]
) -> ErrorSummary:
    errors = sorted(abs(row.error_percent or 0.0) for row in rows)
    ranges = [row.forecast_tok_s for row in rows if row.forecast_tok_s is not None]
    above = sum(
        row.ceiling_tok_s is not None
        and row.forecast_tok_s is not None
        and row.forecast_tok_s.high > row.ceiling_tok_s
        for row in rows
    )
    return ErrorSummary(
        kind=kind,
        chip=chip,
        engine=engine,
        num_rows=len(rows),
        median_error_percent=statistics.median(errors),
        p90_error_percent=errors[min(int(0.9 * len(errors)), len(errors) - 1)],
        inside_percent=100 * sum(bool(row.is_inside) for row in rows) / len(rows),
        median_high_over_low=statistics.median(item.high / item.low for item in ranges),
        num_above_ceiling=above,
    )
