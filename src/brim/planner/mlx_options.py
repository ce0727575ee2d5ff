"""Chooses how MLX loads a model: KV type, wiring, environment; each with its reason.

MLX leaves less to choose than llama.cpp: its attention is always fused where it can be, weights are
computed with as the file has them, and threads are the GPU's business.
"""

import msgspec

from brim.core.machine import MachineSpec
from brim.core.model import ModelSpec
from brim.core.plan import Objective
from brim.errors import ConfigError
from brim.planner.mlx_kv import check_mlx_kv_types, unquantised_share, why_not_quantised
from brim.planner.options import FRUGAL_KV_TYPE, LoadOptions, Wishes

MLX_ROWS_REASON = (
    "512 rows keep a GPU at arithmetic; scratch memory, and the time for which one command buffer "
    "holds the GPU, grow with every row"
)
"""mlx-lm reads prompts 2,048 rows at a time; a command buffer that runs long is killed by macOS
(`ImpactingInteractivity`, seen at 120,000 tokens of context), and sequences that decode wait for
it."""

THREADS_REASON = "MLX has no threads to set: the GPU computes, or one stream of the CPU"

LARGE_SHARE = 0.60
"""Wiring pays only where weights compete with everything else for what the GPU may hold."""

FREE_SHARE, FREE_BYTES = 0.35, 8 * 2**30
"""What must stay unwired, the larger of the two: wiring nearly all of a 16 GB machine froze it."""


def mlx_load_options(spec: ModelSpec, objective: Objective, wishes: Wishes) -> list[LoadOptions]:
    """KV types for the objective: best first, then a smaller one where the model allows it.

    For memory both, because which is smaller depends on the context: attention over a quantised
    cache is not fused, and its scores take memory.

    Raises:
        ConfigError: A wish is not MLX's, or contradicts the model.
    """
    if wishes.flash_attention is False:
        raise ConfigError(
            "MLX's fused attention is its only one; leave flash attention on for this engine",
            param="flash_attention",
        )
    if wishes.kv_type_k is not None and wishes.kv_type_v is not None:
        check_mlx_kv_types(spec, wishes.kv_type_k, wishes.kv_type_v)
        return [_options(wishes.kv_type_k, "asked for")]
    refusal = why_not_quantised(spec)
    if refusal is not None:
        return [_options("f16", f"it cannot be quantised: {refusal}")]
    frugal = _options(FRUGAL_KV_TYPE, "half the bytes of f16")
    if objective is Objective.MEMORY:
        return [frugal, _options("f16", "a quantised cache saves less here than its scores take")]
    # Servers that quantise it by default report 10 % less decode at 2K to 4K tokens, 18 % at 42K
    # and 27 to 36 % at 16K (mlx-serve and Rapid-MLX, 2026).
    plain = _options("f16", "MLX decodes 10 to 36 % slower from a quantised cache")
    needed = frugal.reasons | {"kv_type": "memory needs it: half the bytes of f16"}
    return [plain, msgspec.structs.replace(frugal, reasons=needed)]


def _options(kv_type: str, reason: str) -> LoadOptions:
    return LoadOptions(
        kv_type_k=kv_type, kv_type_v=kv_type, flash_attention=True, repack_weights=False,
        reasons={
            "kv_type": reason,
            "flash_attention": "MLX's fused attention is its only one",
            "repack_weights": "MLX computes with weights as the file has them",
        },
    )  # fmt: skip


def kept_as_f16(spec: ModelSpec, *, kv_tokens: int, max_sequences: int, kv_type: str) -> str:
    """What of a quantised cache stays as it is, as the end of a reason; nothing where all shrinks.

    Returns:
        '' or '; 38 % of its bytes stay unquantised: ...'.
    """
    if kv_type == "f16":
        return ""
    share = unquantised_share(
        spec, kv_tokens=kv_tokens, max_sequences=max_sequences, kv_type=kv_type
    )
    if share == 0:
        return ""
    what = "recurrent states" if spec.num_recurrent_layers else "layers with a window"
    return f"; {100 * share:.0f} % of its bytes stay unquantised: {what} cannot be"


def check_exact_profile(machine: MachineSpec) -> None:
    """Refuse results that are the same to the bit where nobody has shown that they are.

    Raises:
        ConfigError: MLX would compute on a GPU.
    """
    if machine.gpu_limit_bytes is not None:
        raise ConfigError(
            "nobody has shown that MLX on a GPU computes the same bits whatever else is in the "
            "batch; leave the exact profile out, or take llama.cpp for it",
            param="exact_profile",
        )


def wires_weights(
    spec: ModelSpec, machine: MachineSpec, *, max_sequences: int, is_only_model: bool
) -> tuple[bool, str]:
    """Whether weights are wired, so that macOS cannot move them out of the GPU's reach, and why.

    A wired limit beside concurrent requests and caches that come and go is the one isolated trigger
    of the kernel panic `completeMemory() prepare count underflow`: three runs of three panicked
    within 108 s with it, none of ten in 4.2 hours without.  Not wiring costs a model near the
    limit dearly, up to 0.6 for 64 tok/s.  So: one sequence, one model, and room for the rest.

    Source: mlx issue 3186 (isolation of July 2026), vmlx-swift 421 (frozen machines).
    """
    limit = machine.gpu_limit_bytes
    if limit is None:
        return False, "there is no GPU that weights could be wired for"
    if max_sequences > 1 or not is_only_model:
        return False, "wired memory beside other sequences or models is what panics macOS"
    if spec.weights_bytes <= LARGE_SHARE * limit:
        return False, "weights this size stay where they are without it"
    if machine.ram_bytes - spec.weights_bytes < max(FREE_BYTES, FREE_SHARE * machine.ram_bytes):
        return False, "wiring this much of the machine's memory could freeze it"
    return True, "one model for one sequence, over 60 % of what the GPU may hold"
