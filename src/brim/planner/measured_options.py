"""Chooses load options by what was measured here: the least time for the work that is wanted.

Every combination of repacking, flash attention, KV type, threads and wait policy that the
calibration can speak of is forecast for one typical request, and the quickest wins.
"""

import itertools
from collections.abc import Iterator

import msgspec

from brim.core.calibration import WAIT_POLICIES, Calibration, FittedCosts
from brim.core.forecast import SpeedForecast, SpeedShape
from brim.core.model import ModelSpec
from brim.core.plan import Objective
from brim.planner.calibrated_speed import forecast_calibrated
from brim.planner.options import LoadOptions, suits
from brim.planner.overhead import repacked_bytes
from brim.planner.shape import speed_shape


class Work(msgspec.Struct, frozen=True):
    """A typical request: what it reads and what it writes."""

    num_prompt_tokens: int
    num_answer_tokens: int


WORK = {
    Objective.DECODE: Work(512, 512),
    Objective.PREFILL: Work(4096, 128),
    Objective.MEMORY: Work(512, 512),
}
"""A turn of a conversation, and a document that is read for a short answer."""

LITTLE = 1.03
"""A quantised KV cache may take this much longer before f16 is preferred: 3 % are within the
spread of two measurements, and half of the cache's bytes are worth more."""

SPINNING_GAIN = 1.03
"""What spinning threads must gain on an idle machine to be chosen: more than the spread of two
measurements.  Beside busy programs the engine takes fewer of them, so that they lose little there;
but they burn power while they wait."""

KV_TYPES_TRIED = ("f16", "q8_0")
"""What is chosen unasked; smaller types cost quality."""


class Timed(msgspec.Struct, frozen=True):
    """One combination and what it does."""

    options: LoadOptions
    speed: SpeedForecast
    seconds: float
    """For the typical request."""


def measured_options(
    spec: ModelSpec,
    calibration: Calibration,
    objective: Objective,
    context_tokens: int,
    max_sequences: int = 1,
) -> list[LoadOptions]:
    """Load options by measurement: the quickest first, then ones that take less memory.

    Empty where nothing that was measured suits the model.
    """
    timed = list(_timed(spec, calibration, objective, context_tokens, max_sequences))
    if not timed:
        return []
    frugal = [item for item in timed if not item.options.repack_weights]
    quantised = [item for item in frugal if item.options.kv_type_v != "f16"]
    first = [] if objective is Objective.MEMORY else [_quickest(timed), _quickest(frugal)]
    chosen = [*first, *([_least(quantised)] if quantised else [_least(frugal)])]
    return [_explained(item, timed) for item in chosen]


def _quickest(timed: list[Timed]) -> Timed:
    """The one that takes least time, or one with half the KV that takes hardly more."""
    best = _least(timed)
    quantised = [item for item in timed if item.options.kv_type_v != "f16"]
    if quantised and (half := _least(quantised)).seconds <= LITTLE * best.seconds:
        return half
    return best


def _least(timed: list[Timed]) -> Timed:
    passive = [item for item in timed if item.options.wait_policy == "passive"] or timed
    calm = min(passive, key=lambda item: item.seconds)
    best = min(timed, key=lambda item: item.seconds)
    return best if best.seconds * SPINNING_GAIN < calm.seconds else calm


def _timed(
    spec: ModelSpec,
    calibration: Calibration,
    objective: Objective,
    context_tokens: int,
    max_sequences: int,
) -> Iterator[Timed]:
    shape = speed_shape(spec)
    work = WORK[objective]
    # A request must leave room for itself in a small context.
    prompt = max(1, min(work.num_prompt_tokens, context_tokens // 2))
    repacks = (False, True) if repacked_bytes(spec) else (False,)
    for costs, repack, flash, kv_type in itertools.product(
        calibration.costs, repacks, (True, False), KV_TYPES_TRIED
    ):
        if kv_type != "f16" and not (flash and suits(spec, kv_type)):
            continue
        options = LoadOptions(
            kv_type_k=kv_type,
            kv_type_v=kv_type,
            flash_attention=flash,
            repack_weights=repack,
            num_threads=costs.num_threads,
            num_batch_threads=costs.num_batch_threads,
            wait_policy=costs.wait_policy,
            reasons={},
        )
        # Halfway through the answer.  Without flash attention a row goes through every cell in
        # use, and those of idle sequences stay in use until they are needed.
        is_shared = max_sequences > 1 and not flash
        depth = context_tokens if is_shared else prompt + work.num_answer_tokens // 2
        speed = _speed(shape, calibration, costs, options, prompt, depth)
        seconds = (
            prompt / speed.prefill_tok_s.expected
            + work.num_answer_tokens / speed.decode_tok_s.expected
        )
        yield Timed(options, speed, seconds)


def _speed(
    shape: SpeedShape,
    calibration: Calibration,
    costs: FittedCosts,
    options: LoadOptions,
    prompt: int,
    depth: int,
) -> SpeedForecast:
    return forecast_calibrated(
        shape,
        calibration,
        engine=calibration.engine,
        kv_type_k=options.kv_type_k,
        kv_type_v=options.kv_type_v,
        flash_attention=options.flash_attention,
        repack_weights=options.repack_weights,
        num_threads=costs.num_threads,
        num_batch_threads=costs.num_batch_threads,
        wait_policy=costs.wait_policy,
        depth_tokens=depth,
        prompt_tokens=prompt,
    )


def _explained(chosen: Timed, timed: list[Timed]) -> LoadOptions:
    """The options with what was measured of each beside its alternative."""
    options = chosen.options

    def beside(name: str, **changes: object) -> str:
        other = _like(timed, msgspec.structs.replace(options, **changes))
        if other is None:
            return "nothing else was measured"
        mine, theirs = chosen.speed, other.speed
        return (
            f"measured here: decode {mine.decode_tok_s.expected:.1f} and prefill "
            f"{mine.prefill_tok_s.expected:.0f} tok/s; {name} {theirs.decode_tok_s.expected:.1f} "
            f"and {theirs.prefill_tok_s.expected:.0f}"
        )

    flash, repack = options.flash_attention, options.repack_weights
    other_kv = "q8_0" if options.kv_type_v == "f16" else "f16"
    other_flash = options.flash_attention or other_kv != "f16"
    policies = [name for name in WAIT_POLICIES if name != options.wait_policy]
    reasons = {
        "kv_type": beside(
            other_kv, kv_type_k=other_kv, kv_type_v=other_kv, flash_attention=other_flash
        ),
        "flash_attention": "a quantised V cache needs it"
        if options.kv_type_v != "f16"
        else beside("without" if flash else "with", flash_attention=not flash),
        "repack_weights": beside("without" if repack else "with", repack_weights=not repack),
        "num_threads": f"measured here with {options.num_threads} for one row and "
        f"{options.num_batch_threads} for more",
        "environment": beside(policies[0], wait_policy=policies[0])
        if policies
        else "nothing else was measured",
    }
    return msgspec.structs.replace(options, reasons=reasons)


def _like(timed: list[Timed], wanted: LoadOptions) -> Timed | None:
    return next((item for item in timed if item.options == wanted), None)
