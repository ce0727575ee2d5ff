"""What MLX is held to, as numbers: rows of one evaluation, wired bytes, its process's environment.

Bytes in use and of freed arrays follow from the plan's memory terms (`mlx_memory`).
"""

import math

from brim.core.model import ModelSpec
from brim.core.plan import Plan
from brim.planner.mlx_kv import float_bytes, mlx_layers
from brim.planner.overhead import MIB

ROW_TILE = 16
"""Matrix kernels compute rows in tiles of this many: fewer cost as much."""

GPU_FLOPS = 1.5e12
"""What an M1's GPU reaches of its 2.6e12 in matrix products and fused attention: the slowest GPU
that MLX runs on."""

ATTENTION_LIMIT_S = 0.1
"""For one layer's attention in one evaluation, on that GPU.

It is one command, and MLX closes a command buffer after 20 to 50 commands or 40 to 50 MB of inputs,
which is one layer or two: so a buffer takes 0.1 to 0.3 s, its matrix products included.  The system
kills buffers that starve the display: 2,048 rows were killed from 65,000 tokens of context on, on
GPUs of two to four times the speed, and before it kills one, every window stands still.  Pieces
cost little where this binds: one layer's attention takes longer than reading its weights again.
"""

MAX_SCORES_BYTES = 64 * MIB
"""Of attention that is not fused (a quantised cache; a CPU), whose scores are an array of
heads x rows x tokens: 128 rows of 32 heads at 8K tokens, and 32 at 32K, where computing 32 rows
still takes longer than reading the weights for them."""


def rows_of_evaluation(
    spec: ModelSpec, num_held: int, num_rows: int, *, is_fused: bool = True
) -> int:
    """How many of `num_rows` prompt tokens are computed at once, behind `num_held` others.

    A multiple of 16 unless it is all of them, and at least 16 however long the context: no command
    buffer of the GPU may run for long, nor scores take more memory than the plan has for them.

    Args:
        spec: The model.
        num_held: Tokens in the sequence's cache.
        num_rows: Tokens to be fed.
        is_fused: Whether attention keeps its scores on the chip.

    Example:
        >>> from brim.core.model import KvLayer, ModelSpec
        >>> spec = ModelSpec(name="x", paths=(), format="safetensors", architecture="llama",
        ...     fingerprint="", num_parameters=8_000_000_000, weights_bytes=8, num_layers=32,
        ...     hidden_size=4096, num_heads=32, num_kv_heads=(8,) * 32, key_dim=128, value_dim=128,
        ...     vocab_size=128_000, trained_context_tokens=131_072)
        >>> [rows_of_evaluation(spec, held, 512) for held in (0, 16_000, 64_000, 128_000)]
        [512, 512, 128, 64]
        >>> [rows_of_evaluation(spec, held, 512, is_fused=False) for held in (0, 8_000, 32_000)]
        [512, 128, 32]
    """
    most = _most_products(spec, is_fused=is_fused)
    num_seen = int(min(num_held, _longest_window(spec)))
    # rows x (seen + rows) <= most, solved for rows
    most_rows = (math.isqrt(num_seen * num_seen + 4 * most) - num_seen) // 2
    if num_rows <= most_rows:
        return num_rows
    return min(num_rows, max(ROW_TILE, most_rows // ROW_TILE * ROW_TILE))


def _longest_window(spec: ModelSpec) -> float:
    """How many tokens back the layer sees that looks back furthest; 0 where none does."""
    windows = [layer.window_tokens or math.inf for layer in mlx_layers(spec) if layer.key_width > 0]
    return max(windows, default=0)


def _most_products(spec: ModelSpec, *, is_fused: bool) -> int:
    """Most of rows x tokens in one layer's attention."""
    flops_per_product = 2 * max(1, spec.num_heads) * max(1, spec.key_dim + spec.value_dim)
    most = int(ATTENTION_LIMIT_S * GPU_FLOPS) // flops_per_product
    if not is_fused:
        most = min(most, MAX_SCORES_BYTES // (float_bytes(spec) * max(1, spec.num_heads)))
    return most


def memory_limit_bytes(plan: Plan) -> int:
    """Where MLX is to wait for arrays to be freed before it takes more: all that was granted to it.

    Its own limit is 1.5 times what the GPU should hold: near all of a small machine.
    """
    memory = plan.memory
    return memory.weights_bytes + memory.kv_bytes + memory.compute_bytes


def wired_limit_bytes(plan: Plan, recommended_bytes: int) -> int:
    """How much MLX may wire: the weights where the plan says so, otherwise nothing.

    Wiring beside arrays that come and go is the one trigger of macOS's kernel panic that was ever
    isolated, so nothing but weights is wired, and no more than the GPU should hold.

    Args:
        plan: How the model is loaded.
        recommended_bytes: The device's recommended working set; 0 where there is no GPU.
    """
    if not plan.wire_weights:
        return 0
    return min(plan.memory.weights_bytes, recommended_bytes)


def mlx_environment(*, on_gpu: bool, wire_weights: bool = False) -> tuple[dict[str, str], str]:
    """What must stand in a worker's environment before MLX is imported, and why.

    Args:
        on_gpu: Whether MLX computes on a GPU (a Mac) or on the processor.
        wire_weights: Whether the plan wires weights.
    """
    if not on_gpu:
        return {"MLX_DISABLE_COMPILE": "1"}, (
            "on a processor MLX compiles fused kernels with g++ while it runs and loads them from "
            "a directory for temporary files, which others may write to; without them results "
            "are the same"
        )
    if wire_weights:
        return {"MLX_METAL_RESIDENCY_REFRESH_INTERVAL_MS": "1000"}, (
            "wired weights are asked for again each second, since an idle GPU lets them go"
        )
    return {}, (
        "MLX closes a command buffer after 20 to 50 commands or 40 to 50 MB of inputs by itself; "
        "longer ones gained up to 8 % for mixtures of experts on the largest chips and lost 5 % "
        "elsewhere"
    )
