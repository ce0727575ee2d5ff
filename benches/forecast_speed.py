"""Forecast and measured speed side by side, on models that the calibration has never seen.

    brim calibrate
    python benches/forecast_speed.py [--models 0.1b,0.5b,1.2b]

Three stand-ins with dimensions and recipes unlike the calibration's own are decoded at depths 0,
2,048 and 8,192 and read prompts of 512 and 2,048 tokens, with f16 and q8_0 KV.  For each figure it
prints what was forecast, what was measured, the error, and whether it lay within low and high.

Cells beyond 2,048 are copies of the first ones (repeat_kv.py): speed does not depend on values.
`--directory` keeps the stand-ins between runs, `--rows` collects the rows of runs in slices.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
from repeat_kv import repeat_block

from brim.bench.calibrate.child import Order, Ran, Timed
from brim.bench.calibrate.process import MeasuringProcess, quickest
from brim.bench.calibrate.readiness import MAX_BUSY
from brim.bench.calibrate.run import plan_of
from brim.bench.standin import Dimensions, blueprint, write
from brim.core.calibration import Calibration, LoadSetting
from brim.core.forecast import SpeedForecast, SpeedRange
from brim.core.model import ModelSpec
from brim.core.plan import Plan
from brim.machine.calibrations import load_calibration
from brim.machine.reading import read_machine
from brim.planner.calibrated_speed import forecast_calibrated
from brim.planner.shape import speed_shape
from brim.registry.describe import describe_gguf

MODELS: dict[str, tuple[Dimensions, str]] = {
    "0.1b": (
        Dimensions(
            architecture="llama", num_layers=12, hidden_size=768, num_heads=12, num_kv_heads=4,
            head_dim=64, feed_forward_size=3072, vocab_size=32_000, is_tied=True,
        ),
        "Q8_0",
    ),
    "0.5b": (
        Dimensions(
            architecture="llama", num_layers=24, hidden_size=1024, num_heads=16, num_kv_heads=8,
            head_dim=64, feed_forward_size=4096, vocab_size=64_000, is_tied=True,
        ),
        "Q4_K_M",
    ),
    "1.2b": (
        Dimensions(
            architecture="llama", num_layers=16, hidden_size=2048, num_heads=32, num_kv_heads=8,
            head_dim=64, feed_forward_size=8192, vocab_size=128_256, is_tied=True,
        ),
        "Q4_K_M",
    ),
}  # fmt: skip
"""Shaped like a small draft model, a 0.5 B and Llama 3.2 1B."""

KV = (("f16", False), ("q8_0", True))
"""KV type and flash attention, as plans for a CPU choose them together."""

FILLED = 2048
"""Tokens that are really read; a prompt of them is timed as well."""

DEPTHS = (0, FILLED, 4 * FILLED)
PROMPTS = (512,)
"""Beside the filling itself, whose chunks together are a prompt as well."""
NUM_GENERATE = 12


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One figure, forecast and measured."""

    model: str
    kv_type: str
    figure: str
    """'decode' or 'prefill'."""
    num_tokens: int
    """Depth of decode, length of a prompt."""
    forecast: SpeedRange
    measured_tok_s: float

    @property
    def error(self) -> float:
        """Of the expected rate, relative to the measured one."""
        return self.forecast.expected / self.measured_tok_s - 1

    @property
    def is_inside(self) -> bool:
        """Whether the measured rate lies between low and high."""
        return self.forecast.low <= self.measured_tok_s <= self.forecast.high


def rows_of(
    name: str, spec: ModelSpec, setting: LoadSetting, calibration: Calibration, ran: Ran
) -> Iterator[Row]:
    """A row for every figure of one load."""

    def forecast(depth: int, prompt: int) -> SpeedForecast:
        return forecast_calibrated(
            speed_shape(spec),
            calibration,
            engine=calibration.engine,
            kv_type_k=setting.kv_type_k,
            kv_type_v=setting.kv_type_v,
            flash_attention=setting.flash_attention,
            repack_weights=setting.repack_weights,
            num_threads=setting.num_threads,
            num_batch_threads=setting.num_batch_threads,
            wait_policy=setting.wait_policy,
            depth_tokens=depth,
            prompt_tokens=prompt,
        )

    def row(figure: str, num_tokens: int, expected: SpeedRange, timed: Timed) -> Row:
        rate = (timed.num_prompt or 1) / timed.seconds
        return Row(
            model=name,
            kv_type=setting.kv_type_k,
            figure=figure,
            num_tokens=num_tokens,
            forecast=expected,
            measured_tok_s=rate,
        )

    for timed in ran.prefill:
        expected = forecast(0, timed.num_prompt).prefill_tok_s
        yield row("prefill", timed.num_prompt, expected, timed)
    for timed in ran.decode:
        yield row("decode", timed.depth, forecast(timed.depth, FILLED).decode_tok_s, timed)


def measure(name: str, calibration: Calibration, directory: Path, rounds: int) -> Iterator[Row]:
    """Load one model with each KV type and time it."""
    path = directory / f"{name}.gguf"
    if not path.exists():
        write(path, blueprint(*MODELS[name]))
    spec = describe_gguf(path)
    for kv_type, flash in KV:
        setting = msgspec.structs.replace(
            calibration.base,
            kv_type_k=kv_type,
            kv_type_v=kv_type,
            flash_attention=flash,
            repack_weights=not flash,
        )
        plan = plan_of(calibration.engine, spec, setting, max(DEPTHS) + 64)
        with MeasuringProcess(plan) as process, tempfile.TemporaryDirectory() as scratch:
            ran = in_rounds(process, plan, Path(scratch), rounds)
        yield from rows_of(name, spec, setting, calibration, ran)


def in_rounds(process: MeasuringProcess, plan: Plan, scratch: Path, rounds: int) -> Ran:
    """Prompts and decode, each as quick as its quickest round, as a calibration takes them."""
    filled, deep = scratch / "filled.kv", scratch / "deep.kv"
    fill = Order(plan=plan, prompts=PROMPTS, depths=(FILLED,), kept_kv=str(filled), refill=True)
    read = [quiet(process, fill) for _ in range(rounds)]
    shutil.copy(filled, deep)
    repeat_block(deep, max(DEPTHS) // FILLED)
    decode = Order(plan=plan, depths=DEPTHS, num_generate=NUM_GENERATE, kept_kv=str(deep))
    decoded = [quiet(process, decode) for _ in range(rounds)]
    best = quickest([*read, *decoded])
    # A prompt as long as a chunk is the first chunk of the filling as well.
    whole_s = sum(timed.seconds for timed in best.prefill)
    whole = Timed(num_prompt=FILLED, samples_s=(whole_s,))
    prompts = (timed for timed in best.prefill if not timed.depth)
    return msgspec.structs.replace(best, prefill=(*prompts, whole))


def quiet(process: MeasuringProcess, order: Order) -> Ran:
    """Carry out an order, and say so where other programs were busy meanwhile."""
    ran, others = process.run_quietly(order, attempts=2)
    if others > MAX_BUSY:
        print(f"others used {others:.0%} of the processors", file=sys.stderr)
    return ran


def show(rows: list[Row]) -> None:
    """A table, and the largest error of each figure."""
    head = ("model", "kv", "figure", "tokens", "low", "expected", "high", "measured", "error")
    print("".join(f"{name:>10}" for name in head))
    for row in rows:
        rates = (row.forecast.low, row.forecast.expected, row.forecast.high, row.measured_tok_s)
        words = (row.model, row.kv_type, row.figure, str(row.num_tokens))
        cells = [*words, *(f"{rate:.2f}" for rate in rates), f"{row.error:+.1%}"]
        mark = "" if row.is_inside else "  outside"
        print("".join(f"{cell:>10}" for cell in cells) + mark)
    for figure in ("decode", "prefill"):
        errors = [abs(row.error) for row in rows if row.figure == figure]
        inside = [row.is_inside for row in rows if row.figure == figure]
        print(
            f"{figure}: largest error {max(errors):.1%}, median {statistics.median(errors):.1%}, "
            f"{sum(inside)} of {len(inside)} within low and high"
        )


def main() -> None:
    """Read the options, measure in turn, print and store."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(MODELS), help="names, separated by commas")
    parser.add_argument("--directory", type=Path, help="keeps the stand-ins")
    parser.add_argument("--rounds", type=int, default=2, help="times that everything is timed")
    parser.add_argument("--calibration", type=Path, help="a file other than this machine's own")
    parser.add_argument("--rows", type=Path, help="JSON of rows to append to, for runs in slices")
    args = parser.parse_args()
    if args.calibration:
        calibration = msgspec.json.decode(args.calibration.read_bytes(), type=Calibration)
    else:
        calibration = load_calibration(read_machine(), "llamacpp")
    rows: list[Row] = []
    if args.rows and args.rows.exists():
        rows = msgspec.json.decode(args.rows.read_bytes(), type=list[Row])
    with tempfile.TemporaryDirectory(prefix="brim-forecast-") as scratch:
        directory = args.directory or Path(scratch)
        directory.mkdir(parents=True, exist_ok=True)
        for name in args.models.split(","):
            rows += measure(name, calibration, directory, args.rounds)
    if args.rows:
        args.rows.write_bytes(msgspec.json.encode(rows))
    if rows:
        show(rows)


if __name__ == "__main__":
    main()
