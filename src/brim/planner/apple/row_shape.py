"""The speed shape of a published row's model, from its architecture and its quant.

What the row prints (file size, bytes read) wins; what it leaves out is counted from the dimensions.
"""

import re
from typing import Annotated

import msgspec

from brim.core.forecast import SpeedShape
from brim.core.model import KvLayer
from brim.errors import ConfigError
from brim.planner.apple.quant_family import bits_per_weight, other_bits_per_weight
from brim.planner.apple.rows import GIB, Row

MAX_LAYERS = 10_000
"""Far above any model (126 for 405 B); a row that claims more would build a list without end."""

PER_LAYER_EMBEDDING_WINDOW = 512
"""Sliding window of the models with per-layer embedding tables (Gemma 3n and 4 E2B, E4B), whose
rows give no windows; every fifth layer attends to everything.  Source: their config.json."""


def shape_of(row: Row) -> SpeedShape | None:
    """The model's speed shape, or None where the row has no usable architecture.

    Raises:
        ConfigError: The architecture's numbers cannot be (too many layers, a negative width).
    """
    if not row.arch:
        return None
    try:
        arch = msgspec.convert(row.arch, _Arch)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"the architecture of {row.model} cannot be read: {error}; mend that field"
        ) from error
    if arch.moe is not None and arch.moe.active > arch.moe.experts:
        raise ConfigError(f"the architecture of {row.model} uses more experts than it has")
    quant = row.quant or ""
    counted = _Parameters.of(arch)
    weights = _first(row.weights_gib, row.weights_gib_calc)
    weights_bytes = weights * GIB if weights else counted.total_bytes(quant)
    active_bytes = _active_bytes(row, counted, weights_bytes)
    if active_bytes < 1 or counted.active < 1:
        raise ConfigError(f"the weights of {row.model} come to nothing; mend its sizes")
    kv_layers = _kv_layers(row, arch)
    num_recurrent = 0 if arch.linear_attention is None else arch.layers - len(kv_layers)
    return SpeedShape(
        num_layers=arch.layers,
        hidden_size=arch.hidden,
        num_heads=arch.heads,
        num_kv_heads=arch.kv_heads,
        key_dim=_key_dim(arch),
        vocab_size=arch.vocab,
        active_bytes=int(active_bytes),
        weights_bytes=int(max(weights_bytes, active_bytes)),
        active_parameters=int(counted.active),
        kv_layers=kv_layers,
        num_experts=arch.moe.experts if arch.moe else 0,
        num_active_experts=arch.moe.active if arch.moe else 0,
        num_recurrent_layers=num_recurrent,
        # A gated delta layer keeps heads x head width x 128 values in f32.
        recurrent_state_bytes=num_recurrent * arch.heads * arch.head_dim * 128 * 4,
        quant=quant,
    )


Positive = Annotated[int, msgspec.Meta(gt=0, le=10**9)]
Layers = Annotated[int, msgspec.Meta(ge=0, le=MAX_LAYERS)]


class _Experts(msgspec.Struct, frozen=True):
    experts: Positive
    active: Positive
    shared: Annotated[int, msgspec.Meta(ge=0, le=10**4)] = 0
    moe_ffn: Positive | None = None
    dense_ffn: Positive | None = None


class _Mla(msgspec.Struct, frozen=True):
    kv_lora_rank: Positive = 512
    rope_dim: Positive = 64


class _Arch(msgspec.Struct, frozen=True):
    """`arch` of a row, as config.json has it."""

    layers: Annotated[int, msgspec.Meta(gt=0, le=MAX_LAYERS)]
    hidden: Positive
    heads: Positive
    kv_heads: Positive
    head_dim: Positive
    vocab: Positive
    ffn: Positive | None = None
    moe: _Experts | None = None
    mla: _Mla | None = None
    tied_embeddings: bool | None = None
    kv_layers_full: Layers | None = None
    kv_layers_sliding: Layers | None = None
    sliding_window: Positive | None = None
    global_head_dim: Positive | None = None
    global_kv_heads: Positive | None = None
    linear_attention: str | None = None
    per_layer_embeddings: str | None = None


class _Parameters(msgspec.Struct, frozen=True, kw_only=True):
    """Weights counted from the dimensions, good to a few percent."""

    body: float
    """Of all layers, without routed experts and tables."""
    routed: float
    """Of all routed experts."""
    active_routed: float
    embedding: float
    """Of one table of the vocabulary."""
    num_tables: int
    """1 where the input embedding is the output matrix as well."""
    looked_up: float = 0.0
    """Of tables that only look rows up, beyond the input embedding."""

    @classmethod
    def of(cls, arch: _Arch) -> "_Parameters":
        embedding = float(arch.vocab * arch.hidden)
        num_tables = 1 if arch.tied_embeddings else 2
        if arch.per_layer_embeddings and (stated := _stated(arch.per_layer_embeddings)):
            tables, total = stated
            return cls(
                body=total - tables - num_tables * embedding, routed=0, active_routed=0,
                embedding=embedding, num_tables=num_tables, looked_up=tables,
            )  # fmt: skip
        body, moe, routed, active = _attention_parameters(arch), arch.moe, 0.0, 0.0
        if moe is None:
            body += arch.layers * 3.0 * arch.hidden * (arch.ffn or 0)
        else:
            expert = arch.layers * 3.0 * arch.hidden * (moe.moe_ffn or arch.ffn or 0)
            body += arch.layers * 3.0 * arch.hidden * (moe.dense_ffn or 0) + expert * moe.shared
            routed, active = expert * moe.experts, expert * moe.active
        return cls(
            body=body, routed=routed, active_routed=active, embedding=embedding,
            num_tables=num_tables,
        )  # fmt: skip

    @property
    def active(self) -> float:
        """What one token is multiplied with, the output matrix included."""
        return self.body + self.active_routed + self.embedding

    def active_bytes(self, quant: str) -> float:
        """Bytes of `active`."""
        bits = bits_per_weight(quant)
        other = other_bits_per_weight(quant)
        # K-quant recipes keep the output matrix at 6 bits.
        output = max(bits, 6.57) if "_K" in quant.upper() else other
        total = self.body * other + self.active_routed * bits + self.embedding * output
        return total / 8

    def total_bytes(self, quant: str) -> float:
        """Bytes of the whole file."""
        bits = bits_per_weight(quant)
        sleeping = self.routed - self.active_routed + self.looked_up
        sleeping += (self.num_tables - 1) * self.embedding
        return self.active_bytes(quant) + sleeping * bits / 8


def _attention_parameters(arch: _Arch) -> float:
    width = arch.heads * arch.head_dim
    if arch.mla is not None:
        # Query and output matrices with low-rank factors: about 1.5 x rank 1,536 of the queries.
        per_layer = arch.hidden * (width + 1536 + arch.mla.kv_lora_rank) + 1536 * width * 1.5
        per_layer += arch.mla.kv_lora_rank * width * 2
        return arch.layers * per_layer
    full = arch.hidden * (2.0 * width + 2 * arch.kv_heads * arch.head_dim)
    if arch.linear_attention is None or arch.kv_layers_full is None:
        return arch.layers * full
    # Gated attention has a second query matrix; a gated delta layer has q, k, v, gate and output.
    gated, linear = full + arch.hidden * width, 4.0 * arch.hidden * width
    return arch.kv_layers_full * gated + (arch.layers - arch.kv_layers_full) * linear


def _active_bytes(row: Row, counted: _Parameters, weights_bytes: float) -> float:
    """Weights read for one token: the row's own figure, else their share of the file."""
    given = _first(row.read_gib_calc, row.active_gib_calc)
    if given:
        return given * GIB
    quant = row.quant or ""
    return weights_bytes * min(counted.active_bytes(quant) / counted.total_bytes(quant), 1.0)


def _stated(sentence: str) -> tuple[float, float] | None:
    """Tables and total of '2.35e9 of 4.65e9 parameters are per-layer embedding tables ...'."""
    match = re.match(r"\s*([\d.]+e\d+) of ([\d.]+e\d+)", sentence)
    if match is None:
        return None
    tables, total = float(match[1]), float(match[2])
    return (tables, total) if 0 <= tables < total else None


def _kv_layers(row: Row, arch: _Arch) -> tuple[KvLayer, ...]:
    """The layers that read KV for each token, whichever layer stored it."""
    width = arch.kv_heads * arch.head_dim
    if arch.mla is not None:
        compressed = KvLayer(
            key_width=arch.mla.kv_lora_rank + arch.mla.rope_dim, value_width=0
        )  # fmt: skip
        return (compressed,) * arch.layers
    wide = width
    if arch.global_head_dim is not None:
        wide = (arch.global_kv_heads or arch.kv_heads) * arch.global_head_dim
    full, window = arch.kv_layers_full, arch.sliding_window
    sliding = arch.kv_layers_sliding or 0
    if arch.per_layer_embeddings is not None and full is None:
        full, window, wide = arch.layers // 5, PER_LAYER_EMBEDDING_WINDOW, 2 * width
        sliding = arch.layers - full
    if full is None:
        full = arch.layers - sliding
    if full + sliding > arch.layers:
        raise ConfigError(f"the architecture of {row.model} has more layers with KV than layers")
    # mlx-lm gives every Gemma 2 layer a whole cache: its memory grows by 483 KB a token.
    if row.model.startswith("Gemma 2") and "mlx" in row.engine.lower():
        window = None
    return (KvLayer(key_width=wide, value_width=wide),) * full + (
        KvLayer(key_width=width, value_width=width, window_tokens=window),
    ) * sliding


def _key_dim(arch: _Arch) -> int:
    """Width of a key head where layers see everything: twice that of windows in Gemma 3n and 4."""
    if arch.global_head_dim is not None:
        return arch.global_head_dim
    return arch.head_dim if arch.per_layer_embeddings is None else 2 * arch.head_dim


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value), None)
