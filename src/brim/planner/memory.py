"""Forecasts the bytes of a loaded model, term by term, from its header alone.

Forecasts, not measurements: an engine's `footprint()` and the ledger's `reconcile` say what a load
really took.
"""

from typing import NamedTuple

from brim.core.memory import MemoryTerms
from brim.core.model import ModelSpec
from brim.errors import ConfigError

MIB = 1024 * 1024


class BlockSize(NamedTuple):
    """How a ggml type packs values."""

    num_values: int
    num_bytes: int


KV_TYPES = {
    "f32": BlockSize(1, 4),
    "f16": BlockSize(1, 2),
    "bf16": BlockSize(1, 2),
    # 32 values and their f16 scale; the _1 types store a minimum as well.
    "q8_0": BlockSize(32, 34),
    "q5_1": BlockSize(32, 24),
    "q5_0": BlockSize(32, 22),
    "q4_1": BlockSize(32, 20),
    "q4_0": BlockSize(32, 18),
    "iq4_nl": BlockSize(32, 18),
}
"""The types that llama.cpp accepts for K and V (ggml's type traits)."""

KV_PADDING_TOKENS = 256
"""llama.cpp rounds a context up to a multiple of this, so a pool in between would grow anyway."""

REPACKED_BITS = {"Q4_0": 4.5, "Q4_K": 4.5, "IQ4_NL": 4.5, "MXFP4": 4.25, "Q2_K": 2.625}
"""Types whose matrices llama.cpp rearranges on x86, with their bits per weight.

Measured with llama.cpp's own `CPU_REPACK model buffer size` on a 2-layer model in each of 15 types,
AVX-512, November 2026; F16, BF16, Q8_0, Q5_K, Q6_K and the other Q and IQ types were not copied.
Arm rearranges a few more of them.
"""

WORKER_OVERHEAD_BYTES = 40 * MIB
"""A worker process without a model: interpreter, msgspec, numpy, jinja2 and the backend's library.

Pss of /proc/self/smaps_rollup was 38.4 MiB with llama_cpp (24.5 of it anonymous) and 38.7 MiB with
the toy engine; x86 Linux, Python 3.11, November 2026.
"""

VOCABULARY_BYTES_PER_TOKEN = 400
"""llama.cpp's tables for one token and its merges.

Measured as growth of Pss_Anon by a load of the vocabulary alone: 420 bytes a token for 32,000
tokens, 399 for 128,256 with 280,147 merges, 300 for 151,936 with as many merges.
"""


def pad_kv_tokens(num_tokens: int) -> int:
    """The pool that an engine really makes of `num_tokens` cells.

    Example:
        >>> pad_kv_tokens(1000)
        1024
    """
    return -(-num_tokens // KV_PADDING_TOKENS) * KV_PADDING_TOKENS


def is_quantised(kv_type: str) -> bool:
    """Whether the type packs several values into one block."""
    return KV_TYPES[kv_type].num_values > 1


def check_kv_type(spec: ModelSpec, kv_type: str) -> None:
    """Make sure that the model's heads can be stored in a KV type.

    Raises:
        ConfigError: No such type, or its blocks do not divide the model's heads.
    """
    if kv_type not in KV_TYPES:
        raise ConfigError(
            f"no KV type named '{kv_type}'; choose one of {', '.join(KV_TYPES)}", param="kv_type"
        )
    num_values = KV_TYPES[kv_type].num_values
    for part, width in (("key", spec.key_dim), ("value", spec.value_dim)):
        if width % num_values:
            raise ConfigError(
                f"{spec.name} has {part} heads of {width} values, which blocks of {num_values} "
                f"({kv_type}) do not divide; use f16",
                param="kv_type",
            )


def kv_bytes_per_token(spec: ModelSpec, *, kv_type_k: str = "f16", kv_type_v: str = "f16") -> int:
    """Bytes of KV cache that one token adds, over all layers, for one sequence.

    Raises:
        ConfigError: A type is unknown or does not suit the model's heads.
    """
    check_kv_type(spec, kv_type_k)
    check_kv_type(spec, kv_type_v)
    num_heads = sum(spec.num_kv_heads)
    key, value = KV_TYPES[kv_type_k], KV_TYPES[kv_type_v]
    return (
        num_heads * spec.key_dim // key.num_values * key.num_bytes
        + num_heads * spec.value_dim // value.num_values * value.num_bytes
    )


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
) -> MemoryTerms:
    """Bytes of one loaded model.

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
    if engine != "llamacpp":
        raise ConfigError(f"no memory forecast for an engine named '{engine}'", param="engine")
    kv_tokens = pad_kv_tokens(kv_tokens)
    return MemoryTerms(
        weights_bytes=spec.weights_bytes,
        repacked_bytes=repacked_bytes(spec) if repack_weights else 0,
        # Recurrent states are of a fixed size and made for every sequence at once.
        kv_bytes=kv_tokens * kv_bytes_per_token(spec, kv_type_k=kv_type_k, kv_type_v=kv_type_v)
        + max_sequences * spec.recurrent_state_bytes,
        compute_bytes=llamacpp_compute_bytes(
            spec,
            kv_tokens=kv_tokens,
            max_sequences=max_sequences,
            micro_batch_tokens=micro_batch_tokens,
            flash_attention=flash_attention,
        ),
        overhead_bytes=WORKER_OVERHEAD_BYTES + VOCABULARY_BYTES_PER_TOKEN * spec.vocab_size,
    )


def llamacpp_compute_bytes(
    spec: ModelSpec,
    *,
    kv_tokens: int,
    max_sequences: int,
    micro_batch_tokens: int,
    flash_attention: bool,
) -> int:
    """Scratch and output buffers of llama.cpp's CPU backend for a dense transformer.

    llama.cpp reserves the high-water mark of one graph of `micro_batch_tokens` rows over a full
    pool.  With n rows, T cells, width d, query width q, key/value width kv and feed-forward width
    f, in floats a row, the mark is the largest of three moments of a layer:

    - attention: three rows of d (residual, norm, result), q and its rotated copy, K and V, and
      without flash attention the scores of every head over every cell: 3 d + 2 q + 2 kv + T heads.
    - feed-forward: gate, up and their product beside the same three rows of d and the attention
      output that the allocator has not reused: 3 f + 3 d + q.
    - output: logits of the few rows that are sampled.

    The mask over T cells lives beside the first two: f16 with flash attention, else f32.  The
    logits are then copied to an output buffer of their own.

    Source: derived from the log lines `compute buffer size` and `output buffer size` of llama.cpp
    (llama-cpp-python 0.3.36, x86) for 8 dense models of 1 M to 8 B parameters, pools of 1,024 to
    32,768 cells, 16 to 512 rows, 1 to 16 sequences, flash attention on and off, f16 and q8_0 KV.
    Of 288 loads, the forecast of the 144 with 512 rows is within 9 %, of all within 12 %.
    """
    num_rows, num_outputs = micro_batch_tokens, min(max_sequences, micro_batch_tokens)
    width, query = spec.hidden_size, spec.num_heads * spec.key_dim
    key_value = max(spec.num_kv_heads, default=0) * max(spec.key_dim, spec.value_dim)
    scores = 0 if flash_attention else kv_tokens * spec.num_heads
    mask_bytes = num_rows * kv_tokens * (2 if flash_attention else 4)
    attention_bytes = 4 * num_rows * (3 * width + 2 * query + 2 * key_value + scores)
    feed_forward_bytes = 4 * num_rows * (3 * spec.feed_forward_size + 3 * width + query)
    logits_bytes = 4 * num_outputs * spec.vocab_size
    output_bytes = logits_bytes + 4 * width * (num_rows + 2 * num_outputs)
    scratch_bytes = max(mask_bytes + max(attention_bytes, feed_forward_bytes), output_bytes)
    return scratch_bytes + logits_bytes


def repacked_bytes(spec: ModelSpec) -> int:
    """Forecast of the second copy of weights that llama.cpp's CPU backend makes for speed.

    All block matrices at the recipe's bits; an embedding that only looks rows up is not copied.  A
    `_M` mix keeps half of its V and down projections in a type that stays in place.

    Source: `CPU_REPACK model buffer size` of llama.cpp on x86: 445 MiB of a 1.24 B Q4_K_M, forecast
    to 1 %; a 6-layer model as Q4_0, IQ4_NL, Q4_K_S and Q4_K_M is forecast to 6 %, and 60 % too high
    as Q2_K, whose mix has the most types in it.

    Example:
        >>> from brim.core.model import ModelSpec
        >>> spec = ModelSpec(name="x", paths=(), format="gguf", architecture="llama",
        ...     fingerprint="", num_parameters=1_000_000, weights_bytes=8, num_layers=1,
        ...     hidden_size=8, num_heads=1, num_kv_heads=(1,), key_dim=8, value_dim=8,
        ...     vocab_size=10, trained_context_tokens=8, quant="Q8_0")
        >>> repacked_bytes(spec)
        0
    """
    recipe = spec.quant.upper()
    bits = next((bits for name, bits in REPACKED_BITS.items() if recipe.startswith(name)), None)
    if bits is None:
        return 0
    num_values = spec.num_parameters - spec.vocab_size * spec.hidden_size
    if recipe.endswith("_M"):
        per_layer = spec.feed_forward_size * spec.hidden_size
        value_width = sum(spec.num_kv_heads) * spec.value_dim
        num_values -= (spec.num_layers * per_layer + value_width * spec.hidden_size) // 2
    return min(max(0, int(num_values * bits / 8)), spec.weights_bytes)
