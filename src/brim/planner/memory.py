"""Forecasts the bytes of a loaded model, term by term, from its header alone.

Forecasts, not measurements: an engine's `footprint()` and the ledger's `reconcile` say what a load
really took, and `engine.llamacpp.dry_run` what llama.cpp itself expects.
"""

import msgspec

from brim.core.memory import MemoryTerms
from brim.core.model import ModelSpec
from brim.errors import ConfigError
from brim.planner.kv import (
    KV_PADDING_TOKENS,
    KV_TYPES,
    check_kv_type,
    is_quantised,
    kv_bytes_per_token,
    llamacpp_kv_bytes,
    pad_kv_tokens,
)
from brim.planner.mlx_memory import mlx_terms
from brim.planner.overhead import (
    WORKER_OVERHEAD_BYTES,
    llamacpp_overhead_bytes,
    repacked_bytes,
)
from brim.planner.scratch.compute import llamacpp_compute_bytes

__all__ = [
    "KV_PADDING_TOKENS",
    "KV_TYPES",
    "check_kv_type",
    "is_quantised",
    "kv_bytes_per_token",
    "memory_terms",
    "pad_kv_tokens",
]


def memory_terms(
    spec: ModelSpec,
    *,
    engine: str,
    kv_tokens: int,
    max_sequences: int,
    kv_type_k: str,
    kv_type_v: str,
    micro_batch_tokens: int,
    flash_attention: bool,
    repack_weights: bool,
    full_windows: bool = True,
    on_gpu: bool = False,
    is_draft: bool = False,
) -> MemoryTerms:
    """Bytes of one loaded model.

    Args:
        spec: The model.
        engine: 'llamacpp', 'mlx' or 'toy'.
        kv_tokens: Cells of the pool that all sequences share.
        max_sequences: Most sequences at once.
        kv_type_k: Type of K, of `KV_TYPES`.
        kv_type_v: Type of V.
        micro_batch_tokens: Most rows of one computation.
        flash_attention: Fused attention.
        repack_weights: Whether llama.cpp rearranges weights for the CPU.
        full_windows: Whether layers with a sliding window keep the whole pool all the same, as
            llama.cpp does unless told otherwise: sequences can then be cut and forked anywhere.
        on_gpu: Whether the layers are computed on a GPU that shares the memory.
        is_draft: Whether another model's process holds it: `MemoryTerms.with_draft` adds it there.

    Raises:
        ConfigError: The planner does not know the engine or a KV type.
    """
    if engine == "toy":
        return MemoryTerms(
            weights_bytes=0,
            kv_bytes=kv_tokens * kv_bytes_per_token(spec),
            compute_bytes=0,
            overhead_bytes=WORKER_OVERHEAD_BYTES,
        )
    if engine == "mlx":
        return _in_process(
            mlx_terms(
                spec,
                kv_tokens=kv_tokens,
                max_sequences=max_sequences,
                kv_type_k=kv_type_k,
                kv_type_v=kv_type_v,
                micro_batch_tokens=micro_batch_tokens,
                on_gpu=on_gpu,
            ),
            is_draft,
        )
    if engine != "llamacpp":
        raise ConfigError(f"no memory forecast for an engine named '{engine}'", param="engine")
    return _in_process(
        _llamacpp_terms(
            spec,
            kv_tokens=pad_kv_tokens(kv_tokens),
            max_sequences=max_sequences,
            kv_type_k=kv_type_k,
            kv_type_v=kv_type_v,
            micro_batch_tokens=micro_batch_tokens,
            flash_attention=flash_attention,
            repack_weights=repack_weights and not on_gpu,
            full_windows=full_windows,
            on_gpu=on_gpu,
        ),
        is_draft,
    )


def _llamacpp_terms(
    spec: ModelSpec,
    *,
    kv_tokens: int,
    max_sequences: int,
    kv_type_k: str,
    kv_type_v: str,
    micro_batch_tokens: int,
    flash_attention: bool,
    repack_weights: bool,
    full_windows: bool,
    on_gpu: bool,
) -> MemoryTerms:
    kv_bytes = llamacpp_kv_bytes(
        spec,
        kv_tokens=kv_tokens,
        max_sequences=max_sequences,
        kv_type_k=kv_type_k,
        kv_type_v=kv_type_v,
        micro_batch_tokens=micro_batch_tokens,
        flash_attention=flash_attention,
        full_windows=full_windows,
    )
    compute = llamacpp_compute_bytes(
        spec,
        kv_tokens=kv_tokens,
        max_sequences=max_sequences,
        kv_type_k=kv_type_k,
        kv_type_v=kv_type_v,
        micro_batch_tokens=micro_batch_tokens,
        flash_attention=flash_attention,
        full_windows=full_windows,
        on_gpu=on_gpu,
    )
    overhead = llamacpp_overhead_bytes(
        spec,
        kv_tokens=kv_tokens,
        max_sequences=max_sequences,
        kv_type_v=kv_type_v,
        micro_batch_tokens=micro_batch_tokens,
        flash_attention=flash_attention,
        on_gpu=on_gpu,
    )
    return MemoryTerms(
        weights_bytes=spec.weights_bytes,
        mapped_bytes=spec.weights_bytes,
        repacked_bytes=repacked_bytes(spec) if repack_weights else 0,
        kv_bytes=kv_bytes,
        compute_bytes=compute.reserved + compute.output,
        compute_touched_bytes=compute.touched + compute.output,
        overhead_bytes=WORKER_OVERHEAD_BYTES + overhead,
    )


def _in_process(terms: MemoryTerms, is_draft: bool) -> MemoryTerms:
    """The terms with their load peak, and without a process of their own for a draft.

    Nothing is larger while llama.cpp loads: it maps its file and rearranges weights one by one.
    MLX says itself what it takes beside the weights until their last layer is in its place.
    """
    if is_draft:
        shared = terms.overhead_bytes - WORKER_OVERHEAD_BYTES
        terms = msgspec.structs.replace(terms, overhead_bytes=shared)
    peak_bytes = terms.load_peak_bytes - (WORKER_OVERHEAD_BYTES if is_draft else 0)
    return msgspec.structs.replace(terms, load_peak_bytes=max(peak_bytes, terms.total_bytes))
