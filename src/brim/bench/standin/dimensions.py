"""The numbers that decide a stand-in's tensors: what a template needs of a model.

Named as in GGUF's keys and in `ModelSpec`; a field that an architecture lacks keeps its zero.
"""

import msgspec

from brim.errors import Unsupported


class Dimensions(msgspec.Struct, frozen=True, kw_only=True):
    """Hyperparameters of one model of one of `templates.ARCHITECTURES`."""

    architecture: str
    """GGUF's name: 'llama', 'qwen3moe', 'gpt-oss', ..."""
    num_layers: int
    hidden_size: int
    vocab_size: int
    context_tokens: int = 131_072
    """What it was trained for; it bounds what a plan may ask and costs nothing."""
    num_heads: int = 0
    num_kv_heads: int = 0
    """Of an attending layer."""
    head_dim: int = 0
    """Width of one query, key and value head."""
    feed_forward_size: int = 0
    """Width of a dense feed-forward."""
    is_tied: bool = False
    """Whether the embedding is the output matrix as well."""
    has_qkv_bias: bool = False
    has_head_norms: bool = False
    """GLM: norms of each query and key head; others have them or not by their architecture."""
    has_rope_factors: bool = False
    """Llama 3's table of frequency factors, or Phi-3's two."""
    rope_freq_base: float = 10_000.0

    num_experts: int = 0
    num_active_experts: int = 0
    expert_feed_forward_size: int = 0
    num_shared_experts: int = 0
    num_leading_dense_layers: int = 0

    window_tokens: int = 0
    """Sliding window of the layers that have one; which do is the architecture's rule."""
    window_pattern: int = 0
    """Every so manieth layer has no window; 0 leaves it to the architecture's default."""

    q_lora_rank: int = 0
    """MLA: width of the compressed query; 0 where queries are not compressed."""
    kv_lora_rank: int = 0
    rope_head_dim: int = 0
    """MLA: the rotated part of a key head."""
    value_head_dim: int = 0
    """MLA: width of an uncompressed value head, where `head_dim` is the key head's."""

    recurrent_layers: tuple[int, ...] = ()
    """Hybrids: indices of the layers that keep a state instead of KV."""
    state_size: int = 0
    inner_size: int = 0
    conv_kernel: int = 0
    """Mamba: tokens that the convolution sees; LFM2: the same of its short convolution."""
    time_step_rank: int = 0
    """Mamba: rank of the step size; Mamba 2 and delta nets: their number of heads."""
    group_count: int = 0


_COMMON: dict[str, object] = {
    "num_layers": 4,
    "hidden_size": 256,
    "vocab_size": 512,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 64,
    "feed_forward_size": 512,
    "context_tokens": 4096,
}
_EXPERTS: dict[str, object] = {
    "num_experts": 8,
    "num_active_experts": 2,
    "expert_feed_forward_size": 256,
}
_MAMBA: dict[str, object] = {
    "state_size": 16,
    "inner_size": 512,
    "conv_kernel": 4,
    "time_step_rank": 32,
}
_DELTA_NET: dict[str, object] = {
    "state_size": 64, "inner_size": 256, "conv_kernel": 4, "time_step_rank": 4, "group_count": 2,
}  # fmt: skip

_TINY: dict[str, dict[str, object]] = {
    "llama": {},
    "qwen2": {"has_qkv_bias": True, "is_tied": True},
    "qwen3": {"is_tied": True},
    "qwen3moe": _EXPERTS,
    "gemma2": {"is_tied": True, "window_tokens": 64},
    "gemma3": {"is_tied": True, "window_tokens": 64, "num_layers": 8},
    "phi3": {"has_rope_factors": True},
    "gpt-oss": {**_EXPERTS, "window_tokens": 128, "has_qkv_bias": True},
    "deepseek2": {
        **_EXPERTS,
        "num_shared_experts": 1,
        "num_leading_dense_layers": 1,
        "q_lora_rank": 256,
        "kv_lora_rank": 256,
        "head_dim": 192,
        "rope_head_dim": 64,
        "value_head_dim": 128,
    },
    "mamba": {**_MAMBA, "num_heads": 0, "num_kv_heads": 0, "head_dim": 0, "feed_forward_size": 0},
    "jamba": _MAMBA,
    "falcon-h1": {
        "state_size": 64,
        "inner_size": 512,
        "conv_kernel": 4,
        "time_step_rank": 8,
        "group_count": 1,
    },
    "lfm2": {"conv_kernel": 3, "is_tied": True},
    "mistral3": {},
    "smollm3": {"is_tied": True},
    "glm4moe": {
        **_EXPERTS,
        "num_shared_experts": 1,
        "num_leading_dense_layers": 1,
        "has_qkv_bias": True,
        "has_head_norms": True,
    },
    "qwen3next": {**_DELTA_NET, **_EXPERTS, "num_shared_experts": 1},
    "qwen35": _DELTA_NET,
    "qwen35moe": {**_DELTA_NET, **_EXPERTS, "num_shared_experts": 1},
}

_ATTENTION_INTERVAL = {"jamba": 2, "lfm2": 2, "qwen3next": 4, "qwen35": 4, "qwen35moe": 4}
"""Of the tiny hybrids: every so manieth layer attends, the others are recurrent."""

DELTA_NETS = ("qwen3next", "qwen35", "qwen35moe")
"""Architectures whose recurrent layers are gated delta nets."""


def tiny(architecture: str, **changes: object) -> Dimensions:
    """A model of a few megabytes with all the parts of its architecture, for tests.

    Args:
        architecture: One of `templates.ARCHITECTURES`.
        changes: Fields of `Dimensions` to set otherwise.

    Raises:
        Unsupported: There is no template of this name.
    """
    if architecture not in _TINY:
        raise Unsupported(f"no template for '{architecture}'; there are {', '.join(sorted(_TINY))}")
    fields = {"architecture": architecture, **_COMMON, **_TINY[architecture], **changes}
    found = msgspec.convert(fields, Dimensions)
    if (interval := _ATTENTION_INTERVAL.get(architecture)) and not found.recurrent_layers:
        layers = (layer for layer in range(found.num_layers) if (layer + 1) % interval)
        found = msgspec.structs.replace(found, recurrent_layers=tuple(layers))
    return found
