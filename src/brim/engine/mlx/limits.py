"""MLX's memory: the limits that a plan sets before anything is allocated, and what is in use.

MLX counts what it allocated: *active* bytes belong to arrays, *cache* bytes to arrays that are gone
and wait to be used again.  Its memory limit is a guideline and its wired limit cannot be read back.
"""

import mlx.core as mx

from brim.core.memory import Footprint
from brim.core.model import ModelSpec
from brim.core.plan import Plan
from brim.machine.heap import trim_heap
from brim.planner import mlx_limits
from brim.planner.mlx_kv import attention_is_fused
from brim.planner.mlx_memory import freed_arrays_limit_bytes


def set_limits(plan: Plan) -> None:
    """Hold MLX to the plan's terms; to be called before any array is made.

    A plan whose memory nobody forecast leaves MLX's own limits, but never wires more.
    """
    if plan.memory.compute_bytes:
        mx.set_memory_limit(mlx_limits.memory_limit_bytes(plan))
        mx.set_cache_limit(freed_arrays_limit_bytes(plan.memory.compute_bytes))
    if is_on_gpu():
        recommended_bytes = int(mx.device_info().get("max_recommended_working_set_size", 0))
        mx.set_wired_limit(mlx_limits.wired_limit_bytes(plan, recommended_bytes))


def set_pool(plan: Plan, kv_tokens: int) -> None:
    """Hold MLX to what the plan grants with a pool of another size."""
    if plan.memory.compute_bytes:
        kv_bytes = plan.memory.kv_bytes * kv_tokens // plan.kv_tokens
        limit_bytes = mlx_limits.memory_limit_bytes(plan)
        mx.set_memory_limit(limit_bytes - plan.memory.kv_bytes + kv_bytes)


def is_on_gpu() -> bool:
    """Whether MLX computes on a GPU here."""
    return bool(mx.default_device() == mx.gpu)


def rows_of_evaluation(
    spec: ModelSpec, num_held: int, num_rows: int, *, kv_type: str = "f16"
) -> int:
    """`planner.mlx_limits.rows_of_evaluation` for the device that MLX computes on."""
    is_fused = attention_is_fused(spec, kv_type=kv_type, on_gpu=is_on_gpu())
    return mlx_limits.rows_of_evaluation(spec, num_held, num_rows, is_fused=is_fused)


def footprint(plan: Plan, weights_bytes: int, kv_bytes: int) -> Footprint:
    """What MLX holds now, by term.

    Args:
        plan: How the model was loaded.
        weights_bytes: Of the model's parameters.
        kv_bytes: Allocated by all sequences' caches.

    Returns:
        Its sum is all that MLX holds.  `compute_bytes` are freed arrays and those alive beside
        weights and KV (results of the last step, and of one launched ahead) as far as the plan has
        them, `other_bytes` what is over it.
    """
    alive_bytes = max(0, mx.get_active_memory() - weights_bytes - kv_bytes)
    scratch_bytes = mx.get_cache_memory() + alive_bytes
    compute_bytes = min(scratch_bytes, plan.memory.compute_bytes)
    return Footprint(
        weights_bytes=weights_bytes,
        mapped_weights_bytes=0,
        kv_bytes=kv_bytes,
        compute_bytes=compute_bytes,
        other_bytes=scratch_bytes - compute_bytes,
    )


def peak_bytes() -> int:
    """Most bytes of arrays that were ever alive at once in this process."""
    return int(mx.get_peak_memory())


def trim() -> None:
    """Give the memory of freed arrays back to the system.

    Waits for the device first: freeing what a running command still uses is what other programs on
    MLX were seen to panic a kernel with.
    """
    mx.synchronize()
    mx.clear_cache()
    # On a processor MLX allocates with the C library.
    trim_heap()
