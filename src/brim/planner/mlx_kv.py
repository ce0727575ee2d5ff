"""What MLX keeps for a sequence: which layers can be quantised, and bytes of caches and states.

Differs from llama.cpp in four things: every sequence has buffers of its own, a layer's cache is in
the model's own float type unless quantised, only layers that see everything can be quantised, and a
few architectures store other things than they do there.

Source: `make_cache` and the attention of mlx-lm 0.32's model classes, compared with instances of
them in tests/integration/test_mlx_plan_memory_layers.py.
"""

import msgspec

from brim.core.model import KvLayer, ModelSpec
from brim.errors import ConfigError
from brim.planner.kv import BLOCK_TOKENS, KV_TYPES, is_latent, kv_layers, pad_kv_tokens

WINDOW_SLACK_TOKENS = 256
"""Tokens that a window's buffer holds beyond the window.

It is filled to the end and then moved to the front, so that attention reads one plain slice: at 256
a window of 1,024 is moved once in 256 tokens, and takes a quarter more.
"""

QUANTISED_BITS = {"q8_0": 8, "q4_0": 4}
"""Types of a plan that MLX has a kernel for: its affine packing of as many bits."""

GROUP_SIZES = (64, 32)
"""Values that share one scale and one bias, best first: 64 costs half a bit a value, 32 a whole."""

STATE_BYTES = 4
"""State-space models and delta nets carry their state in f32 whatever the weights are."""

WITHOUT_WINDOWS = frozenset({"gemma2", "lfm2"})
"""Architectures whose windows mlx-lm leaves out: every layer keeps and reads everything.

Source: no caches of their own in their files; a 9 B gemma2 grows by 483 KB a token.
"""

WITH_SINKS = frozenset({"gpt-oss", "mimo2", "mimov2flash"})
"""Architectures with attention sinks, which mlx-lm's quantised attention refuses."""

OWN_ATTENTION = frozenset({"gemma2", "olmo", "phi3small"})
"""Architectures whose classes multiply keys themselves, and so need them as they are."""

WITH_INDEX = frozenset({"deepseek32", "glm-dsa"})
"""Architectures with a second cache for the keys of an index, which stores each of them twice."""

FUSED_HEAD_DIMS = frozenset({64, 80, 128})
"""Widths of heads for which Metal has a fused kernel for more than 8 rows; keys and values alike.

Source: `use_fallback` of MLX's Metal backend; for others, and on a CPU, all scores are one array.
"""

EXPANDED_LATENT = "attention.latent_expanded"
"""In `ModelSpec.widths` of an MLA model whose class keeps whole heads instead of the compressed
vector (DeepSeek V2, MiniCPM 3)."""


def mlx_layers(spec: ModelSpec) -> tuple[KvLayer, ...]:
    """What each layer stores in mlx-lm."""
    layers = kv_layers(spec)
    widths = spec.widths
    if spec.architecture in WITHOUT_WINDOWS:
        layers = tuple(msgspec.structs.replace(layer, window_tokens=None) for layer in layers)
    if widths.get(EXPANDED_LATENT):
        key = spec.num_heads * widths.get("attention.key_length_mla", 0)
        value = spec.num_heads * widths.get("attention.value_length_mla", 0)
        layers = tuple(
            KvLayer(key_width=key, value_width=value) if layer.key_width else layer
            for layer in layers
        )
    elif spec.architecture in WITH_INDEX:
        index = widths.get("attention.indexer.key_length", 0)
        layers = tuple(msgspec.structs.replace(layer, value_width=index) for layer in layers)
    return layers


def float_bytes(spec: ModelSpec) -> int:
    """Bytes of one value that is not quantised: the type that weights and so activations have.

    Example:
        >>> from brim.core.model import ModelSpec
        >>> spec = ModelSpec(name="x", paths=(), format="safetensors", architecture="llama",
        ...     fingerprint="", num_parameters=1, weights_bytes=4, num_layers=1, hidden_size=64,
        ...     num_heads=1, num_kv_heads=(1,), key_dim=64, value_dim=64, vocab_size=10,
        ...     trained_context_tokens=8, matrix_bytes={"F32": 400, "BF16": 20})
        >>> float_bytes(spec)
        4
    """
    most = max(spec.matrix_bytes, key=spec.matrix_bytes.__getitem__, default="")
    return 4 if most == "F32" else 2


def group_size(spec: ModelSpec) -> int | None:
    """Values that share a scale in a quantised cache of this model; None where it can have none."""
    dims = _head_dims(spec)
    return next((size for size in GROUP_SIZES if not any(dim % size for dim in dims)), None)


def _head_dims(spec: ModelSpec) -> tuple[int, int]:
    if spec.widths.get(EXPANDED_LATENT):
        widths = spec.widths
        return widths["attention.key_length_mla"], widths["attention.value_length_mla"]
    return spec.key_dim, spec.value_dim


def why_not_quantised(spec: ModelSpec) -> str | None:
    """Why this model's cache can only be f16 in MLX; None where layers of it can be quantised."""
    if is_latent(spec) and not spec.widths.get(EXPANDED_LATENT):
        return "it stores one compressed vector for K and V (MLA)"
    if spec.architecture in WITH_SINKS:
        return "it has attention sinks, which MLX's quantised attention lacks"
    if spec.architecture in OWN_ATTENTION:
        return "mlx-lm's class for it computes attention by itself, from plain keys"
    if shares_kv(spec):
        return "layers of it read another layer's cache, and mlx-lm's class then needs plain keys"
    if not any(layer.key_width and layer.window_tokens is None for layer in mlx_layers(spec)):
        return "no layer of it keeps all tokens: windows and recurrent states stay as they are"
    if group_size(spec) is None:
        key, value = _head_dims(spec)
        return f"groups of 32 values do not divide its heads of {key} and {value}"
    return None


def shares_kv(spec: ModelSpec) -> bool:
    """Whether layers attend that store nothing (Gemma 3n and the smaller Gemma 4)."""
    return any(
        heads > 0 and not layer.key_width
        for heads, layer in zip(spec.num_kv_heads, kv_layers(spec), strict=False)
    )


def attention_is_fused(spec: ModelSpec, *, kv_type: str, on_gpu: bool) -> bool:
    """Whether attention of prompt pieces keeps its scores on the chip, in no array.

    Never where a cache is quantised, nor with MLA, whose positions are scored apart.
    """
    is_mla = "attention.kv_lora_rank" in spec.widths or is_latent(spec)
    is_covered = spec.key_dim == spec.value_dim and spec.key_dim in FUSED_HEAD_DIMS
    return on_gpu and kv_type == "f16" and is_covered and not is_mla


def mlx_kv_types(spec: ModelSpec) -> frozenset[str]:
    """The KV types that a plan for MLX may have; one type serves K and V.

    'f16' is the model's own float type.
    """
    if why_not_quantised(spec) is not None:
        return frozenset({"f16"})
    return frozenset({"f16", *QUANTISED_BITS})


def check_mlx_kv_types(spec: ModelSpec, kv_type_k: str, kv_type_v: str) -> None:
    """Make sure that MLX can store the model's K and V so.

    Raises:
        ConfigError: It cannot; says why and what it can.
    """
    known = ("f16", *QUANTISED_BITS)
    for kv_type in (kv_type_k, kv_type_v):
        if kv_type not in known:
            # One of llama.cpp's is no misspelling.
            lack = "does not store KV as" if kv_type in KV_TYPES else "knows no KV type named"
            raise ConfigError(
                f"MLX {lack} '{kv_type:.40}'; choose one of {', '.join(known)}", param="kv_type"
            )
    if kv_type_k != kv_type_v:
        raise ConfigError(
            f"MLX stores K and V in one type, not as {kv_type_k}/{kv_type_v}; "
            f"use {kv_type_k} or {kv_type_v} for both",
            param="kv_type",
        )
    reason = why_not_quantised(spec)
    if kv_type_k != "f16" and reason is not None:
        raise ConfigError(
            f"MLX cannot quantise the KV cache of {spec.name}: {reason}; use f16", param="kv_type"
        )


def mlx_state_bytes(spec: ModelSpec) -> int:
    """Bytes of one sequence's recurrent states in mlx-lm, over all layers.

    Convolutions keep their last inputs in the model's float type, states are f32; Mamba's first
    version keeps both in the model's type.
    """
    widths, num_bytes = spec.widths, float_bytes(spec)
    if spec.architecture == "mamba":
        return spec.recurrent_state_bytes // 4 * num_bytes
    if cache := widths.get("shortconv.l_cache"):
        return spec.num_recurrent_layers * (cache - 1) * spec.hidden_size * num_bytes
    kernel = widths.get("ssm.conv_kernel", 4)
    if head := widths.get("kda.head_dim"):
        convolved, state = 3 * spec.num_heads * head, head * head * spec.num_heads
    else:
        inner, size = widths.get("ssm.inner_size", 0), widths.get("ssm.state_size", 0)
        if not inner:
            return spec.recurrent_state_bytes
        convolved = inner + 2 * widths.get("ssm.group_count", 0) * size
        state = inner * size
    a_layer = max(0, kernel - 1) * convolved * num_bytes + state * STATE_BYTES
    return spec.num_recurrent_layers * a_layer


def layer_row_bytes(spec: ModelSpec, layer: KvLayer, kv_type: str) -> float:
    """Bytes of one token in one layer's cache of MLX; windows are never quantised."""
    width, num_bytes = layer.key_width + layer.value_width, float_bytes(spec)
    bits, group = QUANTISED_BITS.get(kv_type), group_size(spec)
    if bits is None or group is None or layer.window_tokens is not None:
        return width * num_bytes
    # Scale and bias are of the model's float type.
    return width * (bits / 8 + 2 * num_bytes / group)


def mlx_kv_bytes(
    spec: ModelSpec, *, kv_tokens: int, max_sequences: int, kv_type_k: str, kv_type_v: str
) -> int:
    """Bytes of caches and states when the sequences have filled `kv_tokens` between them.

    Every sequence has buffers of its own, rounded up to blocks.  States are there twice: a step
    that was launched ahead makes new ones while the old ones are kept for taking it back.

    Raises:
        ConfigError: MLX cannot store the model's K and V so.
    """
    check_mlx_kv_types(spec, kv_type_k, kv_type_v)
    cells = cells_of(kv_tokens, max_sequences)
    total = 2 * max_sequences * mlx_state_bytes(spec)
    for layer in mlx_layers(spec):
        most = cells
        if layer.window_tokens is not None:
            most = min(cells, max_sequences * mlx_window_cells(layer.window_tokens))
        total += round(most * layer_row_bytes(spec, layer, kv_type_k))
    return total


def cells_of(kv_tokens: int, max_sequences: int) -> int:
    """Tokens for which buffers are allocated when sequences share out `kv_tokens`.

    Example:
        >>> cells_of(8192, 1), cells_of(8192, 9)
        (8192, 8704)
    """
    return pad_kv_tokens(kv_tokens) + (max_sequences - 1) * BLOCK_TOKENS


def mlx_window_cells(window_tokens: int) -> int:
    """Tokens that the buffer of a layer with a window holds for one sequence, once it is full.

    Example:
        >>> mlx_window_cells(1000)
        1280
    """
    return -(-window_tokens // BLOCK_TOKENS) * BLOCK_TOKENS + WINDOW_SLACK_TOKENS


def unquantised_share(
    spec: ModelSpec, *, kv_tokens: int, max_sequences: int, kv_type: str
) -> float:
    """The part of a quantised cache's bytes that windows and states hold, 0 to 1."""
    if kv_type not in QUANTISED_BITS:
        return 1.0
    total = mlx_kv_bytes(
        spec, kv_tokens=kv_tokens, max_sequences=max_sequences,
        kv_type_k=kv_type, kv_type_v=kv_type,
    )  # fmt: skip
    cells = cells_of(kv_tokens, max_sequences)
    full = sum(
        round(cells * layer_row_bytes(spec, layer, kv_type))
        for layer in mlx_layers(spec)
        if layer.window_tokens is None
    )
    return 1 - full / max(1, total)
