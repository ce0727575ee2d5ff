"""What a token and a prompt cost on Apple silicon, as a sum of seconds with named multipliers.

Each term is a number of seconds that follows from the shape and the chip alone, times
exp(sum of its effects); the effects are constants that a script fits to published measurements.
An effect that was never measured counts 0, so a new chip falls back on its generation and tier and
a new engine on what all engines share.  Terms without effects are physics: bytes over bandwidth.
"""

import math
from typing import NamedTuple

import msgspec

from brim.core.forecast import SpeedShape
from brim.core.model import KvLayer
from brim.planner.apple.quant_family import quant_family
from brim.planner.kv import layer_bytes_read

STEP_S = 1e-4
"""Unit of the overheads: 100 us, what a layer of a dense model costs beyond its bytes."""

TILE_ROWS = 32
"""Rows of the matrix kernels' tiles: a product of fewer rows costs as much as one of these."""

CHUNK_TOKENS = {"ggml": 512, "mlx": 2048}
"""Rows that one pass of a prompt carries: llama.cpp's n_ubatch, mlx-lm's prefill step."""

HEADS_PER_READ = 4
"""Query heads that share one read of a KV head."""


class Term(NamedTuple):
    """A part of the time: `seconds` times exp(sum of the constants that `effects` name)."""

    seconds: float
    effects: tuple[str, ...]


class AppleChip(msgspec.Struct, frozen=True, kw_only=True):
    """A chip by what its speed depends on."""

    name: str
    generation: str
    """'M4'."""
    tier: str
    """'base', 'Pro', 'Max' or 'Ultra'."""
    gpu_cores: int
    memory_bandwidth: float
    """Bytes a second."""
    fp32_flops: float
    """Of the GPU, a second."""


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """How the model is run."""

    engine: str
    """'llama.cpp', 'llama.cpp before 2025', 'llamafile', 'ollama', 'mlx-lm', 'mlx server'."""
    flash_attention: bool
    kv_type_k: str = "f16"
    kv_type_v: str = "f16"
    num_sequences: int = 1

    @property
    def family(self) -> str:
        """'mlx' or 'ggml': whose kernels run."""
        return "mlx" if self.engine.startswith("mlx") else "ggml"


def kv_bytes_read(shape: SpeedShape, setting: Setting, depth_tokens: float) -> float:
    """Bytes of one sequence's KV that one decoded token reads."""
    return sum(_layer_bytes(layer, setting, depth_tokens) for layer in shape.kv_layers)


def _layer_bytes(layer: KvLayer, setting: Setting, depth_tokens: float) -> float:
    return layer_bytes_read(layer, setting.kv_type_k, setting.kv_type_v, depth_tokens)


def kv_bytes_reread(shape: SpeedShape, setting: Setting, depth_tokens: float) -> float:
    """Bytes of KV that kernels read again: once more for each further 4 query heads of a KV head.

    That is what the measured slopes say: with 1 to 4 query heads to a KV head KV reads reach 0.78
    to 0.86 of the bandwidth, with 5 to 8 0.49, with 16 0.29, with the 128 of an MLA model 0.03.
    """
    total = 0.0
    for layer in shape.kv_layers:
        if layer.key_width:
            per_kv_head = float(shape.num_heads)
            if layer.value_width:
                per_kv_head *= shape.key_dim / layer.key_width
            again = math.ceil(per_kv_head / HEADS_PER_READ - 1e-9) - 1
            total += again * _layer_bytes(layer, setting, depth_tokens)
    return total


def weights_read(shape: SpeedShape, num_tokens: float) -> float:
    """Bytes of weights that a step over `num_tokens` rows reads: more rows reach more experts."""
    if not shape.num_experts or not shape.num_active_experts:
        return float(shape.active_bytes)
    routed, share = _routed_bytes(shape), shape.num_active_experts / shape.num_experts
    reached: float = 1.0 - (1.0 - share) ** num_tokens
    return shape.active_bytes - routed * share + routed * reached


def _routed_bytes(shape: SpeedShape) -> float:
    """Bytes of all routed experts: what is not active grows with the share that sleeps."""
    share = shape.num_active_experts / shape.num_experts
    if share >= 1:
        return 0.0
    sleeping = max(shape.weights_bytes - shape.active_bytes, 0)
    return min(sleeping / (1.0 - share), shape.active_bytes / share)


def attended_values(shape: SpeedShape, depth_tokens: float) -> float:
    """Query times key products of one token, over all layers: heads x width x tokens seen."""
    width = float(shape.num_heads * shape.key_dim)
    total = 0.0
    for layer in shape.kv_layers:
        if layer.key_width:
            window = layer.window_tokens
            total += depth_tokens if window is None else min(depth_tokens, window)
    return total * width


def _by_chip(name: str, chip: AppleChip, engine: str) -> tuple[str, ...]:
    """A multiplier that is pooled: all, engine, generation, tier, chip, chip with engine.

    Never by the chip's bins: they differ in GPU cores and bandwidth alone, which the terms know.
    With constants of its own a bin that only slow or old builds measured was forecast slower than
    the one below it.
    """
    return (
        name,
        f"{name}/{engine}",
        f"{name}/all {chip.generation}",
        f"{name}/{chip.tier}",
        f"{name}/chip {chip.name}",
        f"{name}/chip {chip.name}/{engine}",
    )


def decode_terms(
    shape: SpeedShape, chip: AppleChip, setting: Setting, depth_tokens: float
) -> list[Term]:
    """Seconds of one decode step in which every sequence gets one token."""
    num = setting.num_sequences
    bandwidth, engine, family = chip.memory_bandwidth, setting.engine, setting.family
    quant = quant_family(shape.quant)
    weights_s = weights_read(shape, num) / bandwidth
    kv_s = num * kv_bytes_read(shape, setting, depth_tokens) / bandwidth
    arithmetic_s = shape.active_parameters / chip.fp32_flops
    reread_s = num * kv_bytes_reread(shape, setting, depth_tokens) / bandwidth
    attention_s = num * attended_values(shape, depth_tokens) / chip.fp32_flops
    flash = "flash" if setting.flash_attention else "no flash"
    terms = [
        Term(weights_s + kv_s, ()),
        Term(weights_s, _by_chip("stall", chip, engine)),
        Term(
            arithmetic_s * num,
            ("unpack", f"unpack/{family}", f"unpack/{quant}", f"unpack/{engine}",
             f"unpack/{chip.generation}", f"unpack/chip {chip.name}",
             f"unpack/chip {chip.name}/{engine}", f"unpack/chip {chip.name}/{quant}"),
        ),
        Term(shape.num_layers * STEP_S, _by_chip("layer", chip, engine)),
        Term(kv_s, ("kv", f"kv/{family}", f"kv/{engine}", f"kv/{flash}/{chip.generation}")),
        Term(reread_s, ("reread", f"reread/{family}", f"reread/{engine}")),
        Term(
            attention_s,
            ("attention", f"attention/{family}", f"attention/{engine}",
             f"attention/{family}/{flash}", f"attention/{flash}/{chip.generation}",
             f"attention/{flash}/{chip.tier}"),
        ),
        Term(STEP_S, ("token", f"token/{engine}")),
    ]  # fmt: skip
    if shape.num_experts:
        terms.append(
            Term(
                shape.num_layers * STEP_S,
                ("expert", f"expert/{family}", f"expert/{engine}", f"expert/{chip.generation}",
                 f"expert/{chip.tier}", f"expert/chip {chip.name}"),
            )
        )  # fmt: skip
    if shape.num_recurrent_layers:
        terms.append(
            Term(
                num * shape.num_recurrent_layers * STEP_S,
                ("recurrent", f"recurrent/{family}", f"recurrent/{engine}",
                 f"recurrent/{chip.generation}", f"recurrent/{chip.tier}"),
            )
        )  # fmt: skip
    return terms


def prefill_terms(
    shape: SpeedShape, chip: AppleChip, setting: Setting, prompt_tokens: float
) -> list[Term]:
    """Seconds to read a prompt of `prompt_tokens` into an empty cache."""
    engine, family, flops = setting.engine, setting.family, chip.fp32_flops
    quant = quant_family(shape.quant)
    chunk = min(prompt_tokens, CHUNK_TOKENS[family])
    chunks = prompt_tokens / chunk
    dense, routed = matrix_parameters(shape)
    rates = (
        *_by_chip("matrix", chip, engine), f"matrix/{chip.generation}/{family}",
        f"matrix/{quant}", f"matrix/{chip.generation}/{quant}",
    )  # fmt: skip
    flash = "flash" if setting.flash_attention else "no flash"
    attended = prompt_tokens * attended_values(shape, prompt_tokens / 2)
    terms = [
        Term(2 * dense * prompt_tokens / flops, rates),
        Term(chunks * weights_read(shape, chunk) / chip.memory_bandwidth, ()),
        Term(
            2 * TILE_ROWS * dense * chunks / flops,
            ("tile", f"tile/{family}", f"tile/{chip.generation}", f"tile/{engine}"),
        ),
        Term(
            4 * attended / flops,
            ("square", f"square/{family}", f"square/{engine}", f"square/{family}/{flash}",
             f"square/{flash}/{chip.generation}"),
        ),
        Term(chunks * shape.num_layers * STEP_S, ("pass", f"pass/{engine}")),
        Term(STEP_S * 100, ("request", f"request/{engine}")),
    ]  # fmt: skip
    if routed:
        share = shape.num_active_experts / shape.num_experts
        # Each expert that a chunk reaches pads its own few rows to a tile.
        tiles = (1 - (1 - share) ** chunk) / share
        terms += [
            Term(
                2 * routed * prompt_tokens / flops,
                (*rates, "routed", f"routed/{family}", f"routed/{engine}",
                 f"routed/{chip.generation}"),
            ),
            Term(
                2 * TILE_ROWS * routed * tiles * chunks / flops,
                ("gather", f"gather/{family}", f"gather/{chip.generation}", f"gather/{engine}"),
            ),
        ]  # fmt: skip
    if shape.num_recurrent_layers:
        state = shape.num_recurrent_layers * shape.num_heads * shape.key_dim * 128
        terms.append(
            Term(
                4.0 * state * prompt_tokens / flops,
                ("scan", f"scan/{family}", f"scan/{engine}", f"scan/{chip.generation}"),
            )
        )
    return terms


def matrix_parameters(shape: SpeedShape) -> tuple[float, float]:
    """Weights that every token of a prompt is multiplied with: of all layers, of its experts.

    The output matrix is left out: only the prompt's last token needs it.
    """
    body = max(shape.active_parameters - shape.vocab_size * shape.hidden_size, 1)
    if not shape.num_experts or not shape.num_active_experts:
        return float(body), 0.0
    active_routed = _routed_bytes(shape) * shape.num_active_experts / shape.num_experts
    routed = body * min(active_routed / max(shape.active_bytes, 1), 0.95)
    return body - routed, routed
