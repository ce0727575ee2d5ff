"""How long a worker may take before it counts as hanging: by what the slowest machine needs."""

import sys

from brim.core.plan import Plan

HELLO_LIMIT_S = 60.0
"""For an interpreter and its imports: a second or two, many more on a machine that swaps."""

SLOWEST_LOAD_BYTES_PER_S = 50_000_000
"""Half of what a spinning disk reads; a load slower than this (after HELLO_LIMIT_S) hangs."""

HANG_LIMIT_S = 60.0
"""On top of its step: for the prompts of others to be tokenised, on a machine that swaps."""

SLOWEST_FLOPS = 20e9
"""What a single old core multiplies a second; two cores of today measured 400e9."""

SLOWEST_MLX_CPU_FLOPS = 0.02e9
"""What MLX multiplies a second with packed weights where it has no GPU.  By the type of their
scales it measured 0.03e9 (f16), 0.15e9 (bf16) and 1.4e9 (f32) on a core of today, beside another
busy process, with 1 row as with 8."""

TRIED_ROWS = 40
"""Tokens that a new model is fed before it counts as loaded: MLX tries two short sequences alone,
in pieces and together, 36 at most; llama.cpp warms up with fewer."""


def load_limit_s(plan: Plan) -> float:
    """Seconds for loading the planned model, and for what is tried out on it then."""
    read_s = plan.model.weights_bytes / SLOWEST_LOAD_BYTES_PER_S
    return HELLO_LIMIT_S + read_s + _multiply_s(plan, TRIED_ROWS)


def hang_limit_s(plan: Plan) -> float:
    """Seconds after which a loaded worker that says nothing hangs: far above its longest step.

    A step multiplies every weight by at most `max_batch_tokens` rows, and may have to read the
    weights anew where the system has dropped them.
    """
    read_s = plan.model.weights_bytes / SLOWEST_LOAD_BYTES_PER_S
    return HANG_LIMIT_S + read_s + _multiply_s(plan, plan.max_batch_tokens)


def resize_limit_s(plan: Plan) -> float:
    """Seconds after which a worker that resizes its KV pool hangs.

    What its sequences hold may go to the disk and back before the next step.
    """
    return hang_limit_s(plan) + 2 * plan.memory.kv_bytes / SLOWEST_LOAD_BYTES_PER_S


def _multiply_s(plan: Plan, num_rows: int) -> float:
    """Seconds in which the slowest machine for the engine takes rows through every weight."""
    # Only Apple silicon has the GPU that MLX is made for, and no other macOS machine runs it.
    is_mlx_cpu = plan.engine == "mlx" and sys.platform != "darwin"
    flops = SLOWEST_MLX_CPU_FLOPS if is_mlx_cpu else SLOWEST_FLOPS
    return 2 * num_rows * plan.model.num_parameters / flops
