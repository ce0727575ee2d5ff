"""What a layer mixes tokens with (attention in its forms, or a recurrent state), as tensors.

Each mixer adds its tensors for one layer; `describe_layers` adds the keys that llama.cpp's rules
for KV and recurrent states read.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from brim.registry.config_reader import Config
from brim.registry.families import EXPANDED_LATENT

if TYPE_CHECKING:
    from brim.registry.config_layout import ConfigLayout

KINDS = {
    "full_attention": "attention", "sliding_attention": "attention",
    "chunked_attention": "attention", "attention": "attention", "linear_attention": "delta",
    "conv": "conv", "mamba": "mamba2", "mlp": "mlp", "moe": "moe",
    "M": "mamba2", "*": "attention", "-": "mlp", "E": "moe",
}  # fmt: skip
"""What configs call the kinds of layers."""

RECURRENT = ("delta", "conv", "mamba1", "mamba2", "kda")


def kinds_of_layers(config: Config, num_layers: int) -> list[str]:
    """The mixer of each layer; two joined by '+' work side by side.

    Raises:
        ModelFileError: The config names a kind that is not known.
    """
    model_type = config.model_type
    whole = {
        "falcon_h1": "attention+mamba2", "mamba": "mamba1", "falcon_mamba": "mamba1",
        "mamba2": "mamba2",
    }.get(model_type)  # fmt: skip
    if whole:
        return [whole] * num_layers
    if model_type == "kimi_linear":
        full = config.part("linear_attn_config").numbers("full_attn_layers")
        return ["mla" if i + 1 in full else "kda" for i in range(num_layers)]
    attention = "mla" if config.number("kv_lora_rank", default=0) else "attention"
    pattern = config.items.get("hybrid_override_pattern")
    listed = (
        list(pattern)
        if isinstance(pattern, str)
        else config.words("hybrid_override_pattern", "layers_block_type", "layer_types")
    )
    if listed is None:
        return _by_interval(config, num_layers, attention)
    kinds = [KINDS.get(word, "") for word in listed[:num_layers]]
    if "" in kinds or len(kinds) < num_layers:
        raise config.lacks(f"kind that is known for each of {num_layers} layers ({listed[:4]}...)")
    return [attention if kind == "attention" else kind for kind in kinds]


def _by_interval(config: Config, num_layers: int, attention: str) -> list[str]:
    if attending := config.numbers("full_attn_idxs"):
        return ["attention" if i in attending else "conv" for i in range(num_layers)]
    if config.model_type in ("qwen3_next", "qwen3_5", "qwen3_5_moe"):
        interval = max(1, config.number("full_attention_interval", default=4))
        return ["delta" if (i + 1) % interval else "attention" for i in range(num_layers)]
    return [attention] * num_layers


def num_shared_kv(config: Config) -> int:
    """Layers at the end that read an earlier layer's keys and values."""
    return config.number("num_kv_shared_layers", default=0)


def head_dim(layout: "ConfigLayout") -> int:
    """Width of one head."""
    default = layout.hidden_size // max(1, layout.num_heads)
    return layout.config.number("head_dim", "attention_head_dim", default=default)


def is_windowed(layout: "ConfigLayout", layer: int) -> bool:
    """Whether the config says that the layer looks back a window only."""
    types = layout.config.words("layer_types")
    if types is not None:
        return layer < len(types) and types[layer] in ("sliding_attention", "chunked_attention")
    period = layout.config.number("sliding_window_pattern", default=0)
    return period > 0 and layer % period < period - 1


# --- mixers ------------------------------------------------------------------------------------


def attention(layout: "ConfigLayout", layer: int) -> None:
    """Queries, keys and values of several heads, whichever of them share keys."""
    hidden, blk = layout.hidden_size, f"blk.{layer}"
    width, kv_heads = _heads_of_layer(layout, layer)
    query, kv = layout.num_heads * width, kv_heads * width
    if layout.family.is_qkv_fused:
        layout.add(f"{blk}.attn_qkv", hidden, query + 2 * kv)
    else:
        layout.add(f"{blk}.attn_q", hidden, query * (2 if layout.family.has_query_gate else 1))
        is_shared = layer >= layout.num_layers - num_shared_kv(layout.config)
        if not (is_shared and layout.family.architecture == "gemma4"):
            layout.add(f"{blk}.attn_k", hidden, kv)
            # Gemma 4's largest take the keys for values where everything is seen.
            if not (layout.config.flag("attention_k_eq_v") and not is_windowed(layout, layer)):
                layout.add(f"{blk}.attn_v", hidden, kv)
    layout.add(f"{blk}.attn_output", query, hidden)


def _heads_of_layer(layout: "ConfigLayout", layer: int) -> tuple[int, int]:
    """Width and number of a layer's KV heads; Gemma 4 has others where everything is seen."""
    if layout.family.architecture != "gemma4" or is_windowed(layout, layer):
        return head_dim(layout), layout.config.for_layer(
            layer, "num_key_value_heads", default=layout.num_kv_heads
        ) or layout.num_kv_heads
    width = layout.config.number("global_head_dim", default=0) or head_dim(layout)
    return width, layout.config.number(
        "num_global_key_value_heads", default=0
    ) or layout.num_kv_heads


def mla(layout: "ConfigLayout", layer: int) -> None:
    """Attention over one compressed vector for each token (DeepSeek's MLA)."""
    config, hidden, blk = layout.config, layout.hidden_size, f"blk.{layer}"
    rank, rope, nope, value = _mla_sizes(config)
    query = layout.num_heads * (nope + rope)
    query_rank = config.number("q_lora_rank", default=0)
    if query_rank:
        layout.add(f"{blk}.attn_q_a", hidden, query_rank)
        layout.add(f"{blk}.attn_q_b", query_rank, query)
    else:
        layout.add(f"{blk}.attn_q", hidden, query)
    layout.add(f"{blk}.attn_kv_a_mqa", hidden, rank + rope)
    layout.add(f"{blk}.attn_k_b", nope, rank, layout.num_heads)
    layout.add(f"{blk}.attn_v_b", rank, value, layout.num_heads)
    layout.add(f"{blk}.attn_output", layout.num_heads * value, hidden)
    if index := config.number("index_head_dim", default=0):
        layout.add(f"{blk}.indexer.attn_k", hidden, index)
        heads = config.number("index_n_heads")
        layout.add(f"{blk}.indexer.attn_q_b", query_rank, heads * index)
        layout.add(f"{blk}.indexer.proj", hidden, heads)


def _mla_sizes(config: Config) -> tuple[int, int, int, int]:
    keys = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    rank, rope, nope, value = (config.number(key) for key in keys)
    return rank, rope, nope, value


def delta(layout: "ConfigLayout", layer: int) -> None:
    """Gated delta net (Qwen3-Next, Qwen3.5)."""
    hidden, blk = layout.hidden_size, f"blk.{layer}"
    key, value, value_heads, kernel = _delta_sizes(layout.config)
    layout.add(f"{blk}.attn_qkv", hidden, 2 * key + value)
    layout.add(f"{blk}.attn_gate", hidden, value)
    layout.add(f"{blk}.ssm_conv1d", kernel, 2 * key + value)
    if layout.family.architecture == "qwen3next":
        layout.add(f"{blk}.ssm_ba", hidden, 2 * value_heads)
    else:
        layout.add(f"{blk}.ssm_alpha", hidden, value_heads)
        layout.add(f"{blk}.ssm_beta", hidden, value_heads)
    layout.add(f"{blk}.ssm_out", value, hidden)


def _delta_sizes(config: Config) -> tuple[int, int, int, int]:
    """Width of all keys, of all values, number of value heads, and the convolution's length."""
    value_heads = config.number("linear_num_value_heads")
    return (
        config.number("linear_num_key_heads") * config.number("linear_key_head_dim"),
        value_heads * config.number("linear_value_head_dim"),
        value_heads,
        config.number("linear_conv_kernel_dim", default=4),
    )


def conv(layout: "ConfigLayout", layer: int) -> None:
    """Short convolution with gates (LFM2)."""
    hidden, blk = layout.hidden_size, f"blk.{layer}.shortconv"
    layout.add(f"{blk}.conv", layout.config.number("conv_L_cache"), hidden)
    layout.add(f"{blk}.in_proj", hidden, 3 * hidden)
    layout.add(f"{blk}.out_proj", hidden, hidden)


def mamba1(layout: "ConfigLayout", layer: int) -> None:
    """Selective state space of Mamba."""
    hidden, blk, state = (
        layout.hidden_size,
        f"blk.{layer}",
        layout.config.number("state_size", "d_state"),
    )
    inner, rank = _mamba1_sizes(layout)
    layout.add(f"{blk}.ssm_in", hidden, 2 * inner)
    layout.add(f"{blk}.ssm_conv1d", layout.config.number("conv_kernel", default=4), inner)
    layout.add(f"{blk}.ssm_x", inner, rank + 2 * state)
    layout.add(f"{blk}.ssm_dt", rank, inner)
    layout.shapes.append((f"{blk}.ssm_a", (state, inner)))
    layout.add(f"{blk}.ssm_out", inner, hidden)


def _mamba1_sizes(layout: "ConfigLayout") -> tuple[int, int]:
    expand = layout.config.number("expand", default=2)
    inner = layout.config.number(
        "intermediate_size", "d_inner", default=expand * layout.hidden_size
    )
    rank = layout.config.items.get("time_step_rank")
    default = -(-layout.hidden_size // 16)
    return inner, default if rank in ("auto", None) else layout.config.number("time_step_rank")


def mamba2(layout: "ConfigLayout", layer: int) -> None:
    """State space with heads, of Mamba 2 and the hybrids."""
    hidden, blk = layout.hidden_size, f"blk.{layer}"
    heads, inner, groups, state, kernel = _mamba2_sizes(layout)
    convolved = inner + 2 * groups * state
    layout.add(f"{blk}.ssm_in", hidden, inner + convolved + heads)
    layout.add(f"{blk}.ssm_conv1d", kernel, convolved)
    layout.add(f"{blk}.ssm_out", inner, hidden)


def _mamba2_sizes(layout: "ConfigLayout") -> tuple[int, int, int, int, int]:
    """Heads, width of all heads, groups, state and convolution length."""
    config = layout.config
    heads = config.number("mamba_n_heads", "mamba_num_heads", "num_heads")
    width = config.number("mamba_d_head", "mamba_head_dim", "head_dim")
    return (
        heads,
        heads * width,
        config.number("mamba_n_groups", "n_groups", default=1),
        config.number("mamba_d_state", "ssm_state_size", "state_size"),
        config.number("mamba_d_conv", "conv_kernel", default=4),
    )


def kda(layout: "ConfigLayout", layer: int) -> None:
    """Kimi's delta attention."""
    hidden, blk = layout.hidden_size, f"blk.{layer}"
    width, kernel = _kda_sizes(layout.config)
    inner = layout.num_heads * width
    for name in ("q", "k", "v"):
        layout.add(f"{blk}.attn_{name}", hidden, inner)
        layout.add(f"{blk}.ssm_conv1d_{name}", kernel, inner)
    for name in ("f", "g"):
        layout.add(f"{blk}.ssm_{name}_a", hidden, width)
        layout.add(f"{blk}.ssm_{name}_b", width, inner)
    layout.add(f"{blk}.ssm_beta", hidden, layout.num_heads)
    layout.add(f"{blk}.attn_output", inner, hidden)


def _kda_sizes(config: Config) -> tuple[int, int]:
    part = config.part("linear_attn_config")
    return part.number("head_dim"), part.number("short_conv_kernel_size", default=4)


def nothing(layout: "ConfigLayout", layer: int) -> None:
    """A layer of a feed-forward alone."""


MIXERS: dict[str, Callable[["ConfigLayout", int], None]] = {
    "attention": attention, "mla": mla, "delta": delta, "conv": conv, "mamba1": mamba1,
    "mamba2": mamba2, "kda": kda, "mlp": nothing, "moe": nothing,
}  # fmt: skip


# --- keys --------------------------------------------------------------------------------------


def describe_layers(layout: "ConfigLayout", kinds: Sequence[str]) -> None:
    """Add the keys from which KV and states of each layer follow."""
    used = {part for kind in kinds for part in kind.split("+")}
    layout.key(
        "attention.head_count_kv", [_kv_heads(layout, i, kind) for i, kind in enumerate(kinds)]
    )
    if "mla" in used:
        rank, rope, nope, value = _mla_sizes(layout.config)
        layout.key("attention.key_length", rank + rope)
        layout.key("attention.value_length", rank)
        layout.key("attention.kv_lora_rank", rank)
        layout.key("attention.q_lora_rank", layout.config.number("q_lora_rank", default=0))
        layout.key("rope.dimension_count", rope)
        layout.key("attention.key_length_mla", nope + rope)
        layout.key("attention.value_length_mla", value)
        if layout.config.model_type in EXPANDED_LATENT:
            layout.key("attention.latent_expanded", 1)
        if index := layout.config.number("index_head_dim", default=0):
            layout.key("attention.indexer.key_length", index)
    elif "attention" in used:
        _describe_attention(layout, len(kinds))
    for kind in used.intersection(RECURRENT):
        _describe_state(layout, kind)


def _kv_heads(layout: "ConfigLayout", layer: int, kind: str) -> int:
    if kind == "mla":
        return 1  # of one compressed vector
    return _heads_of_layer(layout, layer)[1] if "attention" in kind else 0


def _describe_attention(layout: "ConfigLayout", num_layers: int) -> None:
    config, width = layout.config, head_dim(layout)
    windows = [is_windowed(layout, i) for i in range(num_layers)]
    if layout.family.architecture == "gemma4":
        layout.key("attention.key_length_swa", width)
        layout.key("attention.value_length_swa", width)
        layout.key("attention.shared_kv_layers", num_shared_kv(config))
        width = config.number("global_head_dim", default=0) or width
    layout.key("attention.key_length", width)
    layout.key("attention.value_length", width)
    tokens = config.number("sliding_window", "attention_chunk_size", default=0)
    if tokens:
        layout.key("attention.sliding_window", tokens)
    if any(windows):
        layout.key("attention.sliding_window_pattern", windows)


def _describe_state(layout: "ConfigLayout", kind: str) -> None:
    config = layout.config
    if kind == "conv":
        layout.key("shortconv.l_cache", config.number("conv_L_cache"))
        return
    if kind == "kda":
        width, kernel = _kda_sizes(config)
        layout.key("kda.head_dim", width)
        layout.key("ssm.conv_kernel", kernel)
        return
    if kind == "delta":
        _, inner, rank, kernel = _delta_sizes(config)
        state, groups = config.number("linear_key_head_dim"), config.number("linear_num_key_heads")
    elif kind == "mamba1":
        inner, rank = _mamba1_sizes(layout)
        kernel, state, groups = (
            config.number("conv_kernel", default=4), config.number("state_size", "d_state"), 0,
        )  # fmt: skip
    else:
        rank, inner, groups, state, kernel = _mamba2_sizes(layout)
    layout.key("ssm.time_step_rank", rank)
    layout.key("ssm.conv_kernel", kernel)
    layout.key("ssm.inner_size", inner)
    layout.key("ssm.state_size", state)
    layout.key("ssm.group_count", groups)
