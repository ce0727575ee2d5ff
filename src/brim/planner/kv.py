"""Bytes of KV cache: by type, by layer, for a token and for a whole pool.

A layer that looks back without end stores every token of the pool; one with a window may store
fewer; recurrent layers keep one state for each sequence, whatever its length.
"""

from typing import NamedTuple

from brim.core.model import KvLayer, ModelSpec
from brim.errors import ConfigError


class BlockSize(NamedTuple):
    """How a ggml type packs values."""

    num_values: int
    num_bytes: int

    def bytes_of(self, num_values: int) -> int:
        """Bytes of a row, whose end fills its last block."""
        return -(-num_values // self.num_values) * self.num_bytes


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
"""The types that llama.cpp accepts for K and V (ggml's type traits); `mlx_kv` has MLX's."""

KV_PADDING_TOKENS = 256
"""llama.cpp rounds a context up to a multiple of this, so a pool in between would grow anyway;
MLX's caches grow by as many tokens at a time where nobody said how many to expect."""

BLOCK_TOKENS = 64
"""A sequence's own buffers in MLX hold a multiple of this, beyond what it was admitted for.

Rounding keeps buffers of like requests of one size, so that a freed one serves the next request
instead of a new allocation; at 64 the waste is at most 63 tokens a sequence, 6 % of a short turn.
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


def check_kv_types(spec: ModelSpec, kv_type_k: str, kv_type_v: str) -> None:
    """Make sure that K and V can be stored in these two types.

    Raises:
        ConfigError: One does not suit the model, or they differ where V is a part of K (MLA).
    """
    check_kv_type(spec, kv_type_k)
    check_kv_type(spec, kv_type_v)
    if kv_type_k != kv_type_v and is_latent(spec):
        raise ConfigError(
            f"{spec.name} stores V as a part of K (MLA), so both have one type; "
            f"use {kv_type_k} for both",
            param="kv_type",
        )


def is_latent(spec: ModelSpec) -> bool:
    """Whether layers store one compressed vector for K and V (MLA)."""
    return any(layer.key_width and not layer.value_width for layer in kv_layers(spec))


def kv_layers(spec: ModelSpec) -> tuple[KvLayer, ...]:
    """What each layer stores, from the heads where the description does not list it."""
    return spec.kv_layers or tuple(
        KvLayer(key_width=heads * spec.key_dim, value_width=heads * spec.value_dim)
        for heads in spec.num_kv_heads
    )


def kv_bytes_per_token(spec: ModelSpec, *, kv_type_k: str = "f16", kv_type_v: str = "f16") -> int:
    """Bytes of KV cache that one token adds, over all layers, for one sequence.

    Layers with a window count as well: they stop growing only once it is full.

    Raises:
        ConfigError: A type is unknown or does not suit the model's heads.
    """
    check_kv_types(spec, kv_type_k, kv_type_v)
    key, value = KV_TYPES[kv_type_k], KV_TYPES[kv_type_v]
    return sum(
        key.bytes_of(layer.key_width) + value.bytes_of(layer.value_width)
        for layer in kv_layers(spec)
    )


def window_cells(
    window_tokens: int | None,
    *,
    kv_tokens: int,
    max_sequences: int,
    micro_batch_tokens: int,
    full_windows: bool,
) -> int:
    """Cells of one layer's cache in llama.cpp's unified pool of `kv_tokens`, which is padded.

    A window's cache holds the window of each sequence and the micro-batch that moves over them.

    Args:
        window_tokens: How far the layer looks back; None for without end.
        kv_tokens: Cells of the pool.
        max_sequences: Sequences that share it.
        micro_batch_tokens: Rows of one computation.
        full_windows: Whether windows are stored in full, so that sequences can be cut and forked.

    Source: llama-kv-cache-iswa.cpp of llama-cpp-python 0.3.36.

    Example:
        >>> window_cells(1024, kv_tokens=32768, max_sequences=1, micro_batch_tokens=512,
        ...              full_windows=False)
        1536
    """
    if window_tokens is None or full_windows:
        return kv_tokens
    rows = min(kv_tokens, micro_batch_tokens)
    return pad_kv_tokens(min(kv_tokens, window_tokens * max_sequences + rows))


def layer_bytes_read(layer: KvLayer, kv_type_k: str, kv_type_v: str, depth_tokens: float) -> float:
    """Bytes of one layer's cells that a token goes through at a depth, its window counted in."""
    window = layer.window_tokens
    tokens = depth_tokens if window is None else min(depth_tokens, window)
    key, value = KV_TYPES[kv_type_k], KV_TYPES[kv_type_v]
    return tokens * (
        layer.key_width * key.num_bytes / key.num_values
        + layer.value_width * value.num_bytes / value.num_values
    )


def llamacpp_kv_bytes(
    spec: ModelSpec,
    *,
    kv_tokens: int,
    max_sequences: int,
    kv_type_k: str,
    kv_type_v: str,
    micro_batch_tokens: int,
    flash_attention: bool,
    full_windows: bool = True,
) -> int:
    """Bytes of llama.cpp's caches: the pool's cells of every layer, and all recurrent states.

    Without flash attention V lies transposed, each layer as wide as the widest.

    Raises:
        ConfigError: A type is unknown or does not suit the model's heads.
    """
    check_kv_types(spec, kv_type_k, kv_type_v)
    key, value = KV_TYPES[kv_type_k], KV_TYPES[kv_type_v]
    layers = [layer for layer in kv_layers(spec) if layer.key_width]
    widest = max((layer.value_width for layer in layers), default=0)
    total = max_sequences * spec.recurrent_state_bytes
    for layer in layers:
        cells = window_cells(
            layer.window_tokens,
            kv_tokens=pad_kv_tokens(kv_tokens),
            max_sequences=max_sequences,
            micro_batch_tokens=micro_batch_tokens,
            full_windows=full_windows,
        )
        value_width = layer.value_width if flash_attention or not layer.value_width else widest
        total += cells * (key.bytes_of(layer.key_width) + value.bytes_of(value_width))
    return total
