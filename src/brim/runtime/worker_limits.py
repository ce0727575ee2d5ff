"""How long a worker may take before it counts as hanging: by what the slowest machine needs."""

from brim.core.plan import Plan

HELLO_LIMIT_S = 60.0
"""For an interpreter and its imports: a second or two, many more on a machine that swaps."""

SLOWEST_LOAD_BYTES_PER_S = 50_000_000
"""Half of what a spinning disk reads; a load slower than this (after HELLO_LIMIT_S) hangs."""

HANG_LIMIT_S = 60.0
"""On top of its step: for the prompts of others to be tokenised, on a machine that swaps."""

SLOWEST_FLOPS = 20e9
"""What a single old core multiplies a second; two cores of today measured 400e9."""


def load_limit_s(plan: Plan) -> float:
    """Seconds for loading the planned model."""
    return HELLO_LIMIT_S + plan.model.weights_bytes / SLOWEST_LOAD_BYTES_PER_S


def hang_limit_s(plan: Plan) -> float:
    """Seconds after which a loaded worker that says nothing hangs: far above its longest step.

    A step multiplies every weight by at most `max_batch_tokens` rows, and may have to read the
    weights anew where the system has dropped them.
    """
    model = plan.model
    multiply_s = 2 * plan.max_batch_tokens * model.num_parameters / SLOWEST_FLOPS
    return HANG_LIMIT_S + multiply_s + model.weights_bytes / SLOWEST_LOAD_BYTES_PER_S
