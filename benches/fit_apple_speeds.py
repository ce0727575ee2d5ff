"""Refits the speed constants of Apple silicon from a file of measured rows.

    python benches/fit_apple_speeds.py ROWS.json [--check]

ROWS.json is a list of measurements in the form that `brim forecast` reads; it does not ship.
Writes src/brim/planner/data/apple_speeds.json and prints the error of the fit and of three
cross-validations (rows, models and sources left out) and of chips left out.  With --check nothing
is written.
"""

import argparse
import datetime
import hashlib
import math
import re
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from apple_fit import (
    Array,
    LeftOut,
    Problem,
    Sample,
    constants_of,
    cross_validate,
    fit_widths,
    folds,
)

from brim.cli.forecast import chip_of
from brim.planner.apple import rows as rows_module
from brim.planner.apple.ranges import width_effects
from brim.planner.apple.row_shape import shape_of
from brim.planner.apple.rows import Row, decode_rows, is_comparable
from brim.planner.apple.speed import Constants, Fitted, apple_chip

TARGET = Path(__file__).parent.parent / "src/brim/planner/data/apple_speeds.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("--check", action="store_true", help="print the errors, write nothing")
    arguments = parser.parse_args()
    raw = arguments.rows.read_bytes()
    rows = [row for row in decode_rows(raw) if not row.suspect and row.arch and row.tok_s]
    found: dict[str, Constants] = {}
    figures: dict[str, dict[str, float]] = {}
    for kind in ("decode", "prefill"):
        # Prefill depends on the GPU's cores more than on anything else.
        usable = [row for row in rows if row.kind == kind and (row.gpu_cores or kind == "decode")]
        samples = [sample for row in usable if (sample := sample_of(row))]
        found[kind], figures[kind] = fit_kind(samples)
        print(kind, msgspec.json.encode(figures[kind]).decode())
    if not arguments.check:
        write(Fitted(provenance=provenance(raw, rows), figures=figures, **found))


def fit_kind(samples: Sequence[Sample]) -> tuple[Constants, dict[str, float]]:
    """Constants for decode or prefill, and the errors of the fit and of each validation."""
    problem = Problem(samples)
    everything = np.ones(len(problem.samples), dtype=np.bool_)
    values = problem.fit(everything)
    checks = {
        "rows": cross_validate(problem, folds(10, lambda s: f"{s.row.id} {s.row.source}")),
        "models": cross_validate(problem, folds(12, lambda s: s.row.model)),
        "sources": cross_validate(problem, source_name),
        "chips": cross_validate(problem, lambda s: s.chip.name),
    }
    judged = np.array([is_comparable(sample.row) for sample in problem.samples])
    samples = [sample for sample, is_judged in zip(samples, judged, strict=True) if is_judged]
    checks = {name: check.only(judged) for name, check in checks.items()}
    # A user's chip and engine are mostly among the measured: those checks count twice.
    weighted = [checks[name] for name in ("rows", "models", "rows", "models", "sources", "chips")]
    widths = fit_widths(samples, weighted)
    figures = summary("fit", problem.errors(values)[judged])
    figures |= {"num_fitted": len(problem.samples), "num_judged": len(samples)}
    for name, check in checks.items():
        figures |= summary(name, check.errors)
        figures[f"{name}_coverage_percent"] = coverage(samples, check, widths)
    figures["median_high_over_low"] = width_ratio(samples, checks["rows"], widths)
    return constants_of(problem, values, widths), figures


def sample_of(row: Row) -> Sample | None:
    """A row as the fit needs it, or None where its chip is unknown."""
    shape, machine = shape_of(row), rows_module.machine_of(row, chip_of(row))
    chip = None if machine is None else apple_chip(machine)
    if shape is None or chip is None:
        return None
    if not row.gpu_cores:
        # Of an unknown bin: it must not set the constants of the lower one that stands in for it.
        chip = msgspec.structs.replace(chip, gpu_cores=0)
    is_decode = row.kind == "decode"
    tokens = rows_module.depth_tokens_of(row) if is_decode else rows_module.prompt_tokens_of(row)
    return Sample(row, shape, chip, rows_module.setting_of(row), tokens)


def source_name(sample: Sample) -> str:
    """The repository or page that a row comes from."""
    return re.split(r"[@#]", sample.row.source or "unknown")[0]


def summary(name: str, errors: Array) -> dict[str, float]:
    """Median and ninth decile of absolute relative errors, in percent."""
    size = np.abs(np.expm1(errors)) * 100
    return {
        f"{name}_median_percent": round(float(np.median(size)), 2),
        f"{name}_p90_percent": round(float(np.quantile(size, 0.9)), 2),
    }


def half_widths(samples: Sequence[Sample], check: LeftOut, widths: dict[str, float]) -> Array:
    """The half width that each left-out sample would have been given."""
    sums = [
        sum(widths.get(name, 0.0) for name in width_effects(*sample[1:], known))
        for sample, known in zip(samples, check.known, strict=True)
    ]
    found: Array = np.exp(np.array(sums))
    return found


def coverage(samples: Sequence[Sample], check: LeftOut, widths: dict[str, float]) -> float:
    """Percent of left-out samples inside their range."""
    inside = np.abs(check.errors) <= half_widths(samples, check, widths)
    return round(100 * float(inside.mean()), 1)


def width_ratio(samples: Sequence[Sample], check: LeftOut, widths: dict[str, float]) -> float:
    """Median of high over low."""
    return round(math.exp(2 * float(np.median(half_widths(samples, check, widths)))), 3)


def provenance(raw: bytes, rows: Sequence[Row]) -> dict[str, str]:
    """Where the constants come from."""
    sources = sorted({re.split(r"[@#]", row.source or "unknown")[0] for row in rows})
    return {
        "rows": f"{len(rows)} published measurements (not suspect, architecture known), collected "
        "up to November 2026; they do not ship",
        "rows_sha256": hashlib.sha256(raw).hexdigest(),
        "sources": ", ".join(sources),
        "written_by": "benches/fit_apple_speeds.py",
        "written_on": datetime.date.today().isoformat(),
    }


def write(result: Fitted) -> None:
    TARGET.parent.mkdir(exist_ok=True)
    text = msgspec.json.format(msgspec.json.encode(result), indent=1)
    TARGET.write_bytes(text + b"\n")
    print(f"wrote {TARGET.name}: {len(text)} bytes")


if __name__ == "__main__":
    main()
