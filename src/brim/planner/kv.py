"""Bytes of KV cache: by type, by layer, for a token and for a whole pool.

A layer that looks back without end stores every token of the pool; one with a window may store
fewer; recurrent layers keep one state for each sequence, whatever its length.
"""

from typing import NamedTuple

import msgspec

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
"""The types that llama.cpp accepts for K and V (ggml's type traits).

MLX's affine caches keep an f16 scale and bias for 64 values, half a bit a value: 8, 5 and 4 bits
are exactly as large as q8_0, q5_0 and q4_0.
"""

KV_PADDING_TOKENS = 256
"""llama.cpp rounds a context up to a multiple of this, so a pool in between would grow anyway;
MLX's caches grow by as many tokens at a time."""


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


MLX_WITHOUT_WINDOWS = frozenset({"gemma2"})
"""Architectures whose windows mlx-lm leaves out: every layer keeps and reads everything.

Source: its models/gemma2.py makes no caches of its own; a 9 B one grows by 483 KB a token.
"""


def mlx_layers(spec: ModelSpec) -> tuple[KvLayer, ...]:
    """What each layer stores in mlx-lm."""
    layers = kv_layers(spec)
    if spec.architecture not in MLX_WITHOUT_WINDOWS:
        return layers
    return tuple(msgspec.structs.replace(layer, window_tokens=None) for layer in layers)


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


def mlx_kv_bytes(
    spec: ModelSpec,
    *,
    kv_tokens: int,
    max_sequences: int,
    kv_type_k: str,
    kv_type_v: str,
    micro_batch_tokens: int,
) -> int:
    """Bytes of mlx-lm's caches when the sequences have filled `kv_tokens` between them.

    Every sequence has caches of its own that grow by 256 tokens, so each may waste a step; a
    window's cache rotates, once it holds the window and a prefill step.

    Raises:
        ConfigError: A type is unknown or does not suit the model's heads.

    Source: KVCache and RotatingKVCache of mlx-lm's models/cache.py.
    """
    check_kv_types(spec, kv_type_k, kv_type_v)
    key, value = KV_TYPES[kv_type_k], KV_TYPES[kv_type_v]
    cells = pad_kv_tokens(kv_tokens) + (max_sequences - 1) * KV_PADDING_TOKENS
    total = max_sequences * spec.recurrent_state_bytes
    for layer in mlx_layers(spec):
        most = cells
        if layer.window_tokens is not None:
            turning = pad_kv_tokens(layer.window_tokens + micro_batch_tokens)
            most = min(cells, max_sequences * turning)
        total += most * (key.bytes_of(layer.key_width) + value.bytes_of(layer.value_width))
    return total
