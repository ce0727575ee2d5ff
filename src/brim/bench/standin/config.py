"""Dimensions from a Hugging Face config.json, for the architectures that have a template.

How publishers call things is the registry's knowledge: it lays out the large tensors, and what is
asked here are their shapes and keys.
"""

from collections.abc import Mapping
from typing import Any

from brim.bench.standin.dimensions import DELTA_NETS, Dimensions
from brim.bench.standin.templates import ARCHITECTURES
from brim.errors import ModelFileError, Unsupported
from brim.registry.config_layout import ConfigLayout
from brim.registry.config_reader import Config
from brim.registry.gguf_header import GgufArray

_WINDOWED = ("gemma2", "gemma3", "gpt-oss")
"""Templates whose loader looks at windows; others carry the key and ignore it."""

_ALWAYS_BIASED = ("qwen2", "gpt-oss")
"""Their query, key and value have biases even where the config does not say so."""


def dimensions_from_config(config: Mapping[str, Any], name: str) -> Dimensions:
    """What a template needs of the model that a config.json describes.

    Args:
        config: The parsed file.
        name: The model, for messages.

    Raises:
        ModelFileError: It is no config of a language model, or lacks a key.
        Unsupported: There is no template of its architecture.
    """
    source = Config(config, name)
    layout = ConfigLayout(source)
    architecture = layout.family.architecture
    if architecture not in ARCHITECTURES:
        raise Unsupported(
            f"a stand-in of {name} needs a GGUF file of it (a header on the hub is enough): "
            f"there is no template for '{architecture}'"
        )
    found = _Layout(layout)
    return Dimensions(
        architecture=architecture,
        num_layers=layout.num_layers,
        hidden_size=layout.hidden_size,
        vocab_size=layout.vocab_size,
        context_tokens=found.key("context_length", 4096),
        num_heads=layout.num_heads,
        feed_forward_size=found.width("ffn_down"),
        is_tied="output.weight" not in found.shapes,
        has_qkv_bias=source.flag("attention_bias", architecture in _ALWAYS_BIASED),
        has_head_norms=source.flag("use_qk_norm"),
        has_rope_factors=_has_rope_factors(source, architecture),
        rope_freq_base=source.real("rope_theta", 10_000.0),
        **_attention(found),
        **_experts(found, layout.num_layers),
        **_windows(found, architecture),
        **_recurrent(found, architecture),
    )


class _Layout:
    """Shapes and keys of a laid out config, asked for by name."""

    def __init__(self, layout: ConfigLayout) -> None:
        self.shapes = dict(layout.shapes)
        self.metadata = layout.metadata
        self.prefix = layout.family.architecture

    def key(self, name: str, default: int = 0) -> int:
        value = self.metadata.get(f"{self.prefix}.{name}", default)
        return value if isinstance(value, int) else default

    def list(self, name: str) -> tuple[int, ...]:
        value = self.metadata.get(f"{self.prefix}.{name}")
        items = value.items or () if isinstance(value, GgufArray) else ()
        return tuple(item for item in items if isinstance(item, int))

    def shape(self, part: str) -> tuple[int, ...] | None:
        """The shape of the first layer's tensor of this name, if any layer has it."""
        suffix = f".{part}"
        names = (f"{part}.weight", part)
        for name, shape in self.shapes.items():
            if name.startswith("blk.") and name.endswith(suffix + ".weight"):
                return shape
            if name.startswith("blk.") and name.split(".", 2)[2] in names:
                return shape
        return None

    def width(self, part: str) -> int:
        """Row length of that tensor; 0 where no layer has it."""
        shape = self.shape(part)
        return shape[0] if shape else 0


def _attention(found: _Layout) -> dict[str, Any]:
    kv_heads = max(found.list("attention.head_count_kv"), default=0)
    width = found.key("attention.key_length")
    uncompressed = found.key("attention.key_length_mla")
    if not uncompressed:
        return {"num_kv_heads": kv_heads, "head_dim": width}
    rank = found.key("attention.value_length")
    return {
        "num_kv_heads": kv_heads,
        "head_dim": uncompressed,
        "q_lora_rank": found.width("attn_q_b"),
        "kv_lora_rank": rank,
        "rope_head_dim": width - rank,
        "value_head_dim": found.key("attention.value_length_mla"),
    }


def _experts(found: _Layout, num_layers: int) -> dict[str, Any]:
    if not found.key("expert_count"):
        return {}
    width, shared = found.width("ffn_down_exps"), found.width("ffn_down_shexp")
    mixtures = (f"blk.{layer}.ffn_gate_inp.weight" in found.shapes for layer in range(num_layers))
    if not width or shared % width:
        raise ModelFileError("the config's shared experts are no multiple of its routed ones")
    return {
        "num_experts": found.key("expert_count"),
        "num_active_experts": found.key("expert_used_count"),
        "expert_feed_forward_size": width,
        "num_shared_experts": shared // width,
        "num_leading_dense_layers": next(
            (layer for layer, is_mixture in enumerate(mixtures) if is_mixture), num_layers
        ),
    }


def _windows(found: _Layout, architecture: str) -> dict[str, Any]:
    tokens = found.key("attention.sliding_window")
    if architecture not in _WINDOWED or not tokens:
        return {}
    windows = found.list("attention.sliding_window_pattern")
    # Only whether a layer sees everything repeats; the number is the first one's that does.
    pattern = windows.index(0) + 1 if 0 in windows else 0
    return {"window_tokens": tokens, "window_pattern": pattern}


def _recurrent(found: _Layout, architecture: str) -> dict[str, Any]:
    if kernel := found.key("shortconv.l_cache"):
        return {"conv_kernel": kernel, "recurrent_layers": _without_kv(found)}
    inner = found.key("ssm.inner_size")
    if not inner:
        return {}
    state, groups = found.key("ssm.state_size"), found.key("ssm.group_count")
    if not state:
        raise ModelFileError("the config's recurrent layers keep no state; give it as published")
    if architecture == "mamba":
        rank, groups = found.width("ssm_dt"), 0
    elif architecture in DELTA_NETS:
        rank = inner // state
    else:
        columns = found.shape("ssm_in") or (0, 0)
        rank = columns[1] - 2 * inner - 2 * groups * state
    return {
        "state_size": state,
        "inner_size": inner,
        "conv_kernel": found.key("ssm.conv_kernel"),
        "time_step_rank": rank,
        "group_count": groups,
        "recurrent_layers": () if architecture == "mamba" else _without_kv(found),
    }


def _without_kv(found: _Layout) -> tuple[int, ...]:
    """The recurrent layers of a hybrid.

    Raises:
        ModelFileError: All of them are, on which backends abort.
    """
    heads = found.list("attention.head_count_kv")
    if not any(heads):
        raise ModelFileError("none of the config's layers attends; give it as published")
    return tuple(layer for layer, number in enumerate(heads) if number == 0)


def _has_rope_factors(source: Config, architecture: str) -> bool:
    """Whether converters write a table of frequency factors."""
    scaling = source.part("rope_scaling")
    kinds = {scaling.items.get("rope_type"), scaling.items.get("type")}
    return bool(kinds & ({"longrope", "su"} if architecture == "phi3" else {"llama3"}))
