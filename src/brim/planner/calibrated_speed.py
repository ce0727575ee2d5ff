"""Forecasts speed on the machine at hand from what `brim calibrate` measured of it.

Pure multiplication: the units of `speed_terms` times the seconds that were fitted for each.  What
was not measured is derived from the nearest thing that was, which widens the range and is said in
the reasons.
"""

import datetime
from typing import NamedTuple

from brim.core.calibration import Calibration, FittedCosts
from brim.core.forecast import SpeedForecast, SpeedRange, SpeedShape
from brim.core.model import ModelSpec
from brim.errors import Unsupported
from brim.planner.cost_lookup import CostTable
from brim.planner.overhead import repacked_bytes
from brim.planner.speed_terms import (
    KV_BYTES,
    KvTypes,
    active_bytes_by_type,
    decode_terms,
    kv_bytes_read,
    prefill_terms,
)

OTHER_THREADS_SPREAD = 1.3
"""Widens a forecast for a number of threads that was not measured: between one thread and all of
them the measured rates differ by up to that much on the stand-ins (2-core x86-64 VM)."""

PROBE_EFFICIENCY = SpeedRange(low=0.25, expected=0.5, high=0.9)
"""Share of the probed bandwidth that decode reaches.

Measured against the probe's 2-thread figure on a 2-core AVX-512 VM, November 2026: 0.45 (Q4_K) to
0.7 (F16).  Published efficiencies of tuned engines end at 0.86.
"""

PROBE_PREFILL_RATIO = SpeedRange(low=2.5, expected=8.0, high=30.0)
"""Prefill over decode rate at 512 tokens: 5 to 16 on a 2-core AVX-512 VM; more cores gain more."""


def forecast_calibrated(
    shape: SpeedShape,
    calibration: Calibration,
    *,
    engine: str,
    kv_type_k: str,
    kv_type_v: str,
    flash_attention: bool,
    repack_weights: bool,
    num_threads: int,
    num_batch_threads: int,
    depth_tokens: int,
    prompt_tokens: int,
    num_sequences: int = 1,
    wait_policy: str = "passive",
    micro_batch_tokens: int | None = None,
) -> SpeedForecast:
    """Decode and prefill rates of one model on the machine that was calibrated.

    Args:
        shape: What of the model decides its speed.
        calibration: What was measured.
        engine: Must be the one that was measured.
        kv_type_k: Type of K; not every type needs to have been measured.
        kv_type_v: Type of V.
        flash_attention: Whether attention is fused.
        repack_weights: Whether the engine rearranges weights.
        num_threads: Threads of a step with one row.
        num_batch_threads: Threads of a step with more rows.
        depth_tokens: Tokens in the sequence when decode is timed.
        prompt_tokens: Length of the prompt, read from an empty sequence.
        num_sequences: How many decode at once; the forecast is the rate of one of them.
        wait_policy: A name in `core.calibration.WAIT_POLICIES`.
        micro_batch_tokens: Rows that the engine computes at once; as calibrated unless given.

    Raises:
        Unsupported: The calibration is of another engine.
    """
    if engine != calibration.engine:
        raise Unsupported(
            f"this machine was calibrated with {calibration.engine}, not with {engine}; "
            f"run: brim calibrate --engine {engine}"
        )
    kv = KvTypes(kv_type_k, kv_type_v, flash_attention)
    chosen = _nearest(calibration, num_threads, num_batch_threads, wait_policy)
    decode = CostTable(chosen.costs.decode_s)
    step_s = _step_s(shape, chosen.costs, decode, kv, repack_weights, depth_tokens, num_sequences)
    terms = prefill_terms(
        shape,
        kv=kv,
        repack_weights=repack_weights,
        depth_tokens=0,
        prompt_tokens=prompt_tokens,
        micro_batch_tokens=micro_batch_tokens or calibration.base.micro_batch_tokens,
    )
    prefill = CostTable(chosen.costs.prefill_s)
    prompt_s = prefill.seconds(terms) * chosen.prefill_factor
    ceiling = _ceiling(shape, calibration.best_bytes_per_s, kv, depth_tokens)
    costs = chosen.costs
    return SpeedForecast(
        decode_tok_s=_range(
            1 / step_s,
            costs.decode_ratio_low,
            costs.decode_ratio_high,
            chosen.spread * decode.spread,
            ceiling,
        ),
        prefill_tok_s=_range(
            prompt_tokens / prompt_s,
            costs.prefill_ratio_low,
            costs.prefill_ratio_high,
            chosen.prefill_spread * prefill.spread,
        ),
        decode_ceiling_tok_s=ceiling,
        source=describe_source(calibration),
        reasons=_reasons(calibration, chosen, (*decode.derived, *prefill.derived)),
    )


def describe_source(calibration: Calibration) -> str:
    """Where forecasts from it say they come from."""
    day = datetime.datetime.fromtimestamp(calibration.measured_unix_s, datetime.UTC).date()
    source = f"calibration of {day.isoformat()} ({calibration.engine} {calibration.engine_version})"
    return f"{source}, simulated" if calibration.conditions.is_simulated else source


def load_s(spec: ModelSpec, calibration: Calibration, *, repack_weights: bool) -> float:
    """Seconds from nothing to a loaded model whose file is not in the page cache.

    Where the disk could not be measured, as if the file were in the page cache.
    """
    costs = calibration.load
    seconds = costs.fixed_s + spec.vocab_size * costs.per_token_of_vocabulary_s
    seconds += spec.weights_bytes / costs.mapped_bytes_per_s
    if costs.disk_bytes_per_s:
        seconds += spec.weights_bytes / costs.disk_bytes_per_s
    if repack_weights and costs.repacked_bytes_per_s:
        seconds += repacked_bytes(spec) / costs.repacked_bytes_per_s
    return seconds


def forecast_from_bandwidth(
    shape: SpeedShape,
    read_bytes_per_s: float,
    *,
    depth_tokens: int = 0,
    kv_type_k: str = "f16",
    kv_type_v: str = "f16",
) -> SpeedForecast:
    """A wide forecast from a probe of memory bandwidth alone, for a machine not yet calibrated."""
    ceiling = _ceiling(shape, read_bytes_per_s, KvTypes(kv_type_k, kv_type_v, True), depth_tokens)
    # Prefill is bound by arithmetic; the weights' bytes are the only measure of it at hand.
    shallow = read_bytes_per_s / shape.active_bytes
    part, ratio = PROBE_EFFICIENCY, PROBE_PREFILL_RATIO
    return SpeedForecast(
        decode_tok_s=SpeedRange(
            low=ceiling * part.low, expected=ceiling * part.expected, high=ceiling * part.high
        ),
        prefill_tok_s=SpeedRange(
            low=shallow * part.expected * ratio.low,
            expected=shallow * part.expected * ratio.expected,
            high=shallow * part.expected * ratio.high,
        ),
        decode_ceiling_tok_s=ceiling,
        source=f"a probe of memory bandwidth ({read_bytes_per_s / 1e9:.0f} GB/s)",
        reasons={"range": "nothing else was measured of this machine; run: brim calibrate"},
    )


class _Chosen(NamedTuple):
    """The fitted costs nearest to what is asked, and what the distance does to the range."""

    costs: FittedCosts
    spread: float
    prefill_factor: float
    prefill_spread: float
    note: str


def _nearest(
    calibration: Calibration, num_threads: int, num_batch_threads: int, wait_policy: str
) -> _Chosen:
    def distance(costs: FittedCosts) -> tuple[bool, int, int]:
        return (
            costs.wait_policy != wait_policy,
            abs(costs.num_threads - num_threads),
            abs(costs.num_batch_threads - num_batch_threads),
        )

    costs = min(calibration.costs, key=distance)
    is_same = distance(costs)[:2] == (False, 0)
    is_same_batch = costs.num_batch_threads == num_batch_threads
    note = ""
    if not (is_same and is_same_batch):
        note = (
            f"measured with {costs.num_threads} and {costs.num_batch_threads} threads "
            f"({costs.wait_policy}), asked of {num_threads} and {num_batch_threads} ({wait_policy})"
        )
    return _Chosen(
        costs=costs,
        spread=1.0 if is_same else OTHER_THREADS_SPREAD,
        # Arithmetic is shared out among the threads; waiting for each other is what the range is
        # widened for.
        prefill_factor=costs.num_batch_threads / num_batch_threads,
        prefill_spread=1.0 if is_same_batch else OTHER_THREADS_SPREAD,
        note=note,
    )


def _step_s(
    shape: SpeedShape,
    costs: FittedCosts,
    decode: CostTable,
    kv: KvTypes,
    repack_weights: bool,
    depth_tokens: int,
    num_sequences: int,
) -> float:
    """Seconds of a step in which `num_sequences` decode.

    Several rows go through the matrices as a prompt of that length does, and each through its own
    cells.
    """
    terms = decode_terms(shape, kv=kv, repack_weights=repack_weights, depth_tokens=depth_tokens)
    if num_sequences == 1:
        return decode.seconds(terms)
    attention = {name: terms.pop(name) for name in (kv.term, kv.cells_term, KV_BYTES)}
    rows = prefill_terms(
        shape,
        kv=kv,
        repack_weights=repack_weights,
        depth_tokens=0,
        prompt_tokens=num_sequences,
        micro_batch_tokens=num_sequences,
        draws_every_row=True,
    )
    del rows[kv.term], rows[kv.cells_term]
    together_s = CostTable(costs.prefill_s).seconds(rows)
    share = costs.num_threads / max(costs.num_threads, costs.num_batch_threads)
    attention_s = num_sequences * decode.seconds(attention) * share
    return max(decode.seconds(terms), together_s) + attention_s


def _ceiling(shape: SpeedShape, bytes_per_s: float, kv: KvTypes, depth_tokens: int) -> float:
    """Tokens a second at which the memory alone would limit one sequence."""
    weights = sum(active_bytes_by_type(shape).values())
    state = 2.0 * shape.recurrent_state_bytes
    return bytes_per_s / (weights + state + kv_bytes_read(shape, kv, depth_tokens))


def _range(
    rate: float,
    ratio_low: float,
    ratio_high: float,
    spread: float,
    ceiling: float = float("inf"),
) -> SpeedRange:
    """Around an expected rate, from the quantiles of measured over expected seconds."""
    return SpeedRange(
        low=min(ceiling, rate / (ratio_high * spread)),
        expected=min(ceiling, rate),
        high=min(ceiling, rate * spread / ratio_low),
    )


def _reasons(calibration: Calibration, chosen: _Chosen, derived: tuple[str, ...]) -> dict[str, str]:
    """What a reader has to know to judge the forecast."""
    reasons = {}
    if chosen.note:
        reasons["threads"] = chosen.note
    if derived:
        reasons["derived"] = "; ".join(dict.fromkeys(derived))
    if calibration.warnings:
        reasons["calibration"] = "measured in spite of: " + "; ".join(calibration.warnings)
    return reasons
