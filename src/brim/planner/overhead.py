"""What a worker holds beside weights, KV and logged buffers, and which weights it holds twice."""

from brim.core.model import ModelSpec
from brim.planner.kv import KV_TYPES, BlockSize, kv_layers

KIB, MIB = 1024, 1024 * 1024

WORKER_OVERHEAD_BYTES = 40 * MIB
"""A worker process without a model: interpreter, msgspec, numpy, jinja2 and the backend's library.

Pss of /proc/self/smaps_rollup was 38.4 MiB with llama_cpp (24.5 of it anonymous) and 38.7 MiB with
the toy engine; x86 Linux, Python 3.11, November 2026.
"""

VOCABULARY_BYTES_PER_TOKEN = 150
VOCABULARY_BYTES_PER_MERGE = 150
"""llama.cpp's tables of a vocabulary.

Measured as growth of anonymous memory by loads of 17 published vocabularies alone: those without
merges take 147 to 152 bytes a token; each merge adds 118 to 190 (x86 Linux, November 2026).
"""

SAMPLER_BYTES_PER_TOKEN = 12
"""A sequence's sampler keeps id, logit and probability of every token of the vocabulary."""

CELL_BYTES = 150
"""llama.cpp's notes on one filled cell of a cache: positions, sequences, and their search trees."""

GRAPH_BYTES_PER_LAYER = 150_000
"""Three graphs with room for eight nodes for each of a layer's dozen tensors, 430 bytes a node."""

FLASH_TILE_BYTES = 512 * KIB
"""Tiles of one thread, for fused attention and for tiled matrix products alike."""

REPACKED_TYPES = frozenset({"Q4_0", "Q4_K", "IQ4_NL", "MXFP4", "Q2_K"})
"""Types whose matrices llama.cpp rearranges on x86, into as many bytes again.

Measured with llama.cpp's own `CPU_REPACK model buffer size` on a 2-layer model in each of 15 types,
AVX-512, November 2026; F16, BF16, Q8_0, Q5_K, Q6_K and the other Q and IQ types were not copied.
Arm rearranges a few more of them.
"""

_ROWS_AS = {"F32": BlockSize(1, 0), "F16": BlockSize(1, 2), "BF16": BlockSize(1, 2)} | {
    name: BlockSize(32, 36 if name.endswith("_1") else 34)
    for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4")
}
_ROWS_AS_Q8_K = BlockSize(256, 292)
"""What rows become before they are multiplied with a matrix of some type (ggml's vec_dot_type)."""


def llamacpp_overhead_bytes(
    spec: ModelSpec,
    *,
    kv_tokens: int,
    max_sequences: int,
    kv_type_v: str,
    micro_batch_tokens: int,
    flash_attention: bool,
    on_gpu: bool,
) -> int:
    """What llama.cpp allocates outside its logged buffers."""
    num_caches = 1 + any(layer.window_tokens for layer in kv_layers(spec))
    # Byte-pair vocabularies have about a merge for each token; a description may not say.
    num_merges = spec.widths.get("tokenizer.ggml.merges", spec.vocab_size)
    num_bytes = (
        (VOCABULARY_BYTES_PER_TOKEN + SAMPLER_BYTES_PER_TOKEN * max_sequences) * spec.vocab_size
        + VOCABULARY_BYTES_PER_MERGE * num_merges
        + CELL_BYTES * kv_tokens * num_caches
        + GRAPH_BYTES_PER_LAYER * spec.num_layers
    )
    if on_gpu:
        return num_bytes
    return num_bytes + work_bytes(
        spec,
        num_rows=min(kv_tokens, micro_batch_tokens),
        kv_tokens=kv_tokens,
        kv_type_v=kv_type_v,
        flash_attention=flash_attention,
    )


def work_bytes(
    spec: ModelSpec, *, num_rows: int, kv_tokens: int, kv_type_v: str, flash_attention: bool
) -> int:
    """The CPU backend's work buffer: rows as the matrix products want them, in no log.

    Without flash attention the scores of all heads over all cells are among them, in V's type.

    Source: `ggml_graph_plan` of ggml-cpu.c (llama-cpp-python 0.3.36).
    """
    expert = spec.widths.get("expert_feed_forward_length", spec.feed_forward_size)
    widest = max(
        spec.hidden_size,
        spec.num_heads * max(spec.key_dim, spec.value_dim),
        spec.feed_forward_size,
        spec.widths.get("ssm.inner_size", 0),
        expert * spec.num_active_experts,
    )
    types = [_ROWS_AS.get(name, _ROWS_AS_Q8_K) for name in spec.matrix_bytes] or [_ROWS_AS_Q8_K]
    products = max(packed.bytes_of(num_rows * widest) for packed in types)
    products += 8 * num_rows * spec.num_experts * spec.num_active_experts
    if flash_attention:
        return products + FLASH_TILE_BYTES
    # f32 is multiplied as it is; a quantised V needs flash attention.
    item_bytes = 0 if kv_type_v == "f32" else KV_TYPES["f16"].num_bytes
    return max(products, num_rows * kv_tokens * spec.num_heads * item_bytes)


def repacked_bytes(spec: ModelSpec) -> int:
    """The second copy of weights that llama.cpp's CPU backend makes for speed.

    An embedding that only looks rows up is not copied.

    Example:
        >>> from brim.core.model import ModelSpec
        >>> spec = ModelSpec(name="x", paths=(), format="gguf", architecture="llama",
        ...     fingerprint="", num_parameters=1_000_000, weights_bytes=8, num_layers=1,
        ...     hidden_size=8, num_heads=1, num_kv_heads=(1,), key_dim=8, value_dim=8,
        ...     vocab_size=10, trained_context_tokens=8, matrix_bytes={"Q4_K": 144, "Q6_K": 210})
        >>> repacked_bytes(spec)
        144
    """
    return sum(size for name, size in spec.matrix_bytes.items() if name in REPACKED_TYPES)
