"""Forecasts speed on Apple silicon from constants that were fitted to published measurements.

Owns the constants' file and how a machine and an engine are matched with it.  The formula is in
terms, the range's in ranges; benches/fit_apple_speeds.py writes the file.
"""

import functools
import importlib.resources
import math
import re
from collections.abc import Iterable

import msgspec

from brim.core.forecast import SpeedForecast, SpeedRange, SpeedShape
from brim.core.machine import MachineSpec
from brim.planner.apple.ranges import cell, engines_of, familiarity, width_effects
from brim.planner.apple.terms import (
    AppleChip,
    Setting,
    Term,
    decode_terms,
    kv_bytes_read,
    prefill_terms,
    weights_read,
)

ENGINES = {"llamacpp": "llama.cpp", "mlx": "mlx-lm"}
"""The project's engines, as the constants name them: current builds."""

NEAREST_GENERATION = {"M6": "M5", "A18": "M4"}
"""Of generations without measurements: the GPU of the M6 has the M5's matrix units, that of the A18
Pro is of the M4's family."""

BYTES_PER_FLOP = 0.029
"""Bandwidth over FP32 rate, the median of all chips that have both: for a chip whose rate nobody
states."""

MAX_SHARE_OF_CEILING = 0.95
"""No range ends above this share of bandwidth over bytes: memory never gives all of what its maker
states.  The best of 446 measured rows reaches 0.92."""

WIDER_UNMEASURED = 1.25
"""Factor on the range of several sequences at once, which no published row measures."""


class Constants(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the fit found."""

    effects: dict[str, float]
    """Natural logarithms that multiply terms; one that is missing counts 0."""
    widths: dict[str, float]
    """Natural logarithms of a range's half width."""
    num_rows: dict[str, int]
    """Measurements by chip, GPU cores and engine."""


class Fitted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The constants' file."""

    provenance: dict[str, str]
    figures: dict[str, dict[str, float]]
    """What the fit's script found of its own error, by split."""
    decode: Constants
    prefill: Constants


@functools.cache
def fitted() -> Fitted:
    """The constants that ship."""
    path = importlib.resources.files("brim.planner") / "data" / "apple_speeds.json"
    return msgspec.json.decode(path.read_bytes(), type=Fitted)


def forecast_apple(
    shape: SpeedShape,
    machine: MachineSpec,
    *,
    engine: str,
    kv_type_k: str,
    kv_type_v: str,
    flash_attention: bool,
    depth_tokens: int,
    prompt_tokens: int,
    num_sequences: int,
) -> SpeedForecast | None:
    """Speed of a model on a Mac by measurements of its kind; None where it is no known chip.

    Args:
        shape: The model.
        machine: The Mac; its chip, GPU cores and bandwidth are used.
        engine: 'llamacpp' or 'mlx', meaning current builds.
        kv_type_k: ggml type of K.
        kv_type_v: ggml type of V.
        flash_attention: Whether attention is fused.
        depth_tokens: Cached tokens of each sequence while it decodes.
        prompt_tokens: Length of the prompt that prefill reads.
        num_sequences: Sequences that decode at once; the forecast is the speed of each of them.
    """
    setting = Setting(
        engine=ENGINES.get(engine, engine),
        flash_attention=flash_attention or engine == "mlx",
        kv_type_k=kv_type_k,
        kv_type_v=kv_type_v,
        num_sequences=max(num_sequences, 1),
    )
    return forecast_setting(
        shape, machine, setting, depth_tokens=depth_tokens, prompt_tokens=prompt_tokens
    )


def forecast_setting(
    shape: SpeedShape,
    machine: MachineSpec,
    setting: Setting,
    *,
    depth_tokens: int,
    prompt_tokens: int,
    constants: Fitted | None = None,
) -> SpeedForecast | None:
    """As `forecast_apple`, for any engine and era that was fitted.

    Args:
        shape: The model.
        machine: The Mac.
        setting: How it is run.
        depth_tokens: Cached tokens of each sequence while it decodes.
        prompt_tokens: Length of the prompt.
        constants: Other constants than those that ship, for the fit's own checks.
    """
    chip = apple_chip(machine)
    if chip is None or shape.active_bytes <= 0:
        return None
    found = constants or fitted()
    ceiling = decode_ceiling_tok_s(shape, chip, setting, depth_tokens)
    decode_known = familiarity(chip, setting.engine, found.decode.num_rows)
    return SpeedForecast(
        decode_tok_s=_decode(shape, chip, setting, max(depth_tokens, 0), ceiling, found.decode),
        prefill_tok_s=_prefill(shape, chip, setting, max(prompt_tokens, 1), found.prefill),
        decode_ceiling_tok_s=ceiling,
        source=f"measured Macs ({chip.name} with {chip.gpu_cores} GPU cores, {setting.engine})",
        reasons={"range": _range_reason(chip, setting.engine, decode_known, found.decode)},
    )


def decode_ceiling_tok_s(
    shape: SpeedShape, chip: AppleChip, setting: Setting, depth_tokens: float
) -> float:
    """Bandwidth over the bytes of weights and KV that one step reads: physics, not experience."""
    num = setting.num_sequences
    num_bytes = weights_read(shape, num) + num * kv_bytes_read(shape, setting, depth_tokens)
    return chip.memory_bandwidth / num_bytes


def apple_chip(machine: MachineSpec) -> AppleChip | None:
    """The machine's chip as the fit describes chips; None where it is none of Apple's.

    Example:
        >>> m4 = MachineSpec(name="m", system="darwin", ram_bytes=2**34, others_bytes=0,
        ...                  chip="M4 Pro", gpu_cores=20, memory_bandwidth=273 * 10**9)
        >>> chip = apple_chip(m4)
        >>> chip.generation, chip.tier
        ('M4', 'Pro')
    """
    match = re.match(r"(?:Apple )?((?:M|A)\d+)(?: (Pro|Max|Ultra))?(?: |$)", machine.chip or "")
    if match is None or not machine.memory_bandwidth or not machine.gpu_cores:
        return None
    generation = match[1]
    is_phone_chip = generation.startswith("A")
    return AppleChip(
        name=f"{generation} {match[2]}" if match[2] else generation,
        generation=NEAREST_GENERATION.get(generation, generation),
        tier="base" if is_phone_chip else match[2] or "base",
        gpu_cores=machine.gpu_cores,
        memory_bandwidth=float(machine.memory_bandwidth),
        fp32_flops=float(machine.fp32_flops or machine.memory_bandwidth / BYTES_PER_FLOP),
    )


def seconds_of(terms: Iterable[Term], effects: dict[str, float]) -> float:
    """The sum of terms, each times exp(sum of its effects)."""
    return sum(
        term.seconds * math.exp(sum(effects.get(name, 0.0) for name in term.effects))
        for term in terms
    )


def _decode(
    shape: SpeedShape,
    chip: AppleChip,
    setting: Setting,
    depth_tokens: int,
    ceiling: float,
    constants: Constants,
) -> SpeedRange:
    seconds = seconds_of(decode_terms(shape, chip, setting, depth_tokens), constants.effects)
    half = _half_width(shape, chip, setting, depth_tokens, constants)
    limit = MAX_SHARE_OF_CEILING * ceiling
    return _range(min(1 / seconds, limit), half, limit)


def _prefill(
    shape: SpeedShape, chip: AppleChip, setting: Setting, prompt_tokens: int, constants: Constants
) -> SpeedRange:
    terms = prefill_terms(shape, chip, setting, prompt_tokens)
    expected = prompt_tokens / seconds_of(terms, constants.effects)
    return _range(expected, _half_width(shape, chip, setting, prompt_tokens, constants), math.inf)


def _half_width(
    shape: SpeedShape, chip: AppleChip, setting: Setting, num_tokens: int, constants: Constants
) -> float:
    """Half the width of the range, as a natural logarithm."""
    known = familiarity(chip, setting.engine, constants.num_rows)
    names = width_effects(shape, chip, setting, num_tokens, known)
    half = math.exp(sum(constants.widths.get(name, 0.0) for name in names))
    return half * (WIDER_UNMEASURED if setting.num_sequences > 1 else 1.0)


def _range(expected: float, half: float, limit: float) -> SpeedRange:
    factor = math.exp(half)
    return SpeedRange(low=expected / factor, expected=expected, high=min(expected * factor, limit))


def _range_reason(chip: AppleChip, engine: str, known: str, constants: Constants) -> str:
    num_rows = constants.num_rows.get(cell(chip, engine), 0)
    if num_rows:
        return f"{num_rows} measured rows of this chip with {engine}"
    if engine in engines_of(chip, constants.num_rows):
        return f"another bin of this chip was measured with {engine}, not this one"
    if known == "other engine":
        return f"this chip was measured with other engines than {engine}"
    return f"nobody's {chip.name} is among the measurements: its generation and tier are used"
