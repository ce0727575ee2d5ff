"""What each layer of a model keeps for a sequence: KV of its tokens, or a recurrent state.

The rules are llama.cpp's (`load_arch_hparams` of each architecture, `create_memory`,
`n_embd_r` and `n_embd_s`), because its caches are what is planned for.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from brim.core.model import KvLayer
from brim.registry.gguf_keys import GgufKeys

RECURRENT_TENSOR = re.compile(r"blk\.(\d+)\.(ssm_|time_mix_|shortconv)")
"""Hybrids say in many ways which layers are recurrent; those that are have such weights."""

WITHOUT_KV = frozenset({
    "bert", "modern-bert", "nomic-bert", "nomic-bert-moe", "neo-bert", "jina-bert-v2",
    "jina-bert-v3", "eurobert", "gemma-embedding", "dream", "llada", "llada-moe", "rnd1",
})  # fmt: skip
"""Embedders and diffusion models: llama.cpp makes no cache for them."""

LINEAR_ATTENTION = frozenset({"minimax-01"})
"""Architectures whose recurrent layers have attention's weights, and so are told by keys alone."""

PARALLEL_HYBRIDS = frozenset({"falcon-h1"})
"""Architectures whose layers are recurrent and attend as well."""


class Windows(NamedTuple):
    """How an architecture spreads sliding windows over its layers.

    Of every `period` layers the last one sees everything, or the first with `is_full_first`;
    period 0 gives every layer a window, None leaves it to an array in the file.
    """

    period: int | None
    is_full_first: bool = False
    default_tokens: int | None = None
    """Window where the file gives none."""
    fixed_tokens: int | None = None
    """Window whatever the file gives, unless that is 0."""


WINDOWS = {
    "afmoe": Windows(4),
    "cohere2": Windows(4),
    "cohere2moe": Windows(4, is_full_first=True),
    "dots3note": Windows(None),
    "exaone-moe": Windows(4, default_tokens=128),
    "exaone4": Windows(4, default_tokens=4096),
    "gemma2": Windows(2, default_tokens=4096),
    "gemma3": Windows(6),
    "gemma3n": Windows(5),
    "gemma4": Windows(None),
    "gpt-oss": Windows(2),
    "granite_swa": Windows(None),
    "laguna": Windows(4, is_full_first=True),
    "lfm2": Windows(0),
    "llama4": Windows(4, default_tokens=8192, fixed_tokens=8192),
    "maple": Windows(None),
    "mellum": Windows(4),
    "mimo2": Windows(None),
    "muse-glimmer": Windows(4),
    "olmo2": Windows(4),
    "plamo3": Windows(8),
    "smallthinker": Windows(4, is_full_first=True, fixed_tokens=4096),
    "spark2_5": Windows(None),
    "step35": Windows(None),
}
"""Architectures whose windows llama.cpp respects.

For others (Mistral 7B, Qwen2, Phi-3) a file may name a window, and everything is kept all the same.
"""

SINGLE_SIZE = {"exaone4": 64}
"""Architectures of which only the size with so many layers has windows."""

GEMMA_3N_KV_LAYERS = 20
"""Layers of Gemma 3n that keep KV; those after them read an earlier layer's."""


def recurrent_layers(
    keys: GgufKeys, num_layers: int, tensor_names: Iterable[str]
) -> tuple[bool, ...]:
    """Whether each layer keeps a recurrent state."""
    if keys.architecture in LINEAR_ATTENTION:
        interval = keys.count("full_attention_interval", default=8)
        listed = keys.flags("attention.recurrent_layers", num_layers)
        return listed or tuple((i + 1) % interval != 0 for i in range(num_layers))
    found = (RECURRENT_TENSOR.match(name) for name in tensor_names)
    with_state = {int(match[1]) for match in found if match}
    return tuple(i in with_state for i in range(num_layers))


def recurrent_state_values(keys: GgufKeys, hidden_size: int, num_heads: int, key_dim: int) -> int:
    """Values that one recurrent layer keeps for a sequence, f32 each whatever the KV type is.

    Source: `n_embd_r` and `n_embd_s` of llama.cpp's llama-hparams.cpp: RWKV, LFM2, Kimi's delta
    attention, MiniMax's linear attention, and all that have Mamba's keys (Mamba, Jamba,
    Qwen3-Next, ...).
    """
    kernel = keys.optional("ssm.conv_kernel")
    if head_size := keys.optional("wkv.head_size"):
        return hidden_size * (keys.count("token_shift_count", default=2) + head_size)
    if cache := keys.optional("shortconv.l_cache"):
        return hidden_size * (cache - 1)
    if head_size := keys.optional("kda.head_dim"):
        convolved = 3 * ((kernel or 4) - 1) * num_heads * head_size
        return convolved + head_size * head_size * num_heads
    if keys.architecture in LINEAR_ATTENTION:
        return key_dim * key_dim * num_heads
    inner, state = keys.optional("ssm.inner_size"), keys.optional("ssm.state_size")
    convolved = inner + 2 * keys.optional("ssm.group_count") * state
    return max(0, kernel - 1) * convolved + state * inner


def num_kv_heads(
    keys: GgufKeys, num_blocks: int, heads: tuple[int, ...], is_recurrent: tuple[bool, ...]
) -> tuple[int, ...]:
    """KV heads of each layer; 0 for a layer that does not attend.

    Args:
        keys: The model's.
        num_blocks: Blocks of the file, which may be more than there are layers.
        heads: Query heads of each layer.
        is_recurrent: Of each layer.

    Raises:
        ModelFileError: A key is damaged.
    """
    kv_heads = heads
    if keys.has("attention.head_count_kv"):
        kv_heads = keys.per_layer("attention.head_count_kv", num_blocks, default=0)[: len(heads)]
    # Hybrids such as qwen3next give one number and say which layers attend at all.
    interval = keys.count("full_attention_interval", default=1)
    attends = [
        (i % interval == 0) and (not recurs or keys.architecture in PARALLEL_HYBRIDS)
        for i, recurs in enumerate(is_recurrent, start=1)
    ]
    return tuple(n if attending else 0 for n, attending in zip(kv_heads, attends, strict=True))


def window_tokens(
    keys: GgufKeys, num_layers: int, is_recurrent: tuple[bool, ...]
) -> tuple[int | None, ...]:
    """How far each layer looks back; None for everything.

    Raises:
        ModelFileError: A key is damaged.
    """
    rule = WINDOWS.get(keys.architecture)
    only_layers = SINGLE_SIZE.get(keys.architecture, num_layers)
    tokens = 0
    if rule is not None and only_layers == num_layers:
        tokens = keys.optional("attention.sliding_window")
        if not keys.has("attention.sliding_window"):
            tokens = rule.default_tokens or 0
        elif tokens and rule.fixed_tokens:
            tokens = rule.fixed_tokens
    if rule is None or not tokens:
        return (None,) * num_layers
    listed = keys.flags("attention.sliding_window_pattern", num_layers)
    if listed is None:
        listed = _spread(keys, rule, num_layers)
    return tuple(
        tokens if windowed and not recurs else None
        for windowed, recurs in zip(listed, is_recurrent, strict=True)
    )


def _spread(keys: GgufKeys, rule: Windows, num_layers: int) -> tuple[bool, ...]:
    if rule.period is None:
        return (False,) * num_layers
    period = keys.count("attention.sliding_window_pattern", default=rule.period)
    if period == 0:
        return (True,) * num_layers
    if rule.is_full_first:
        return tuple(i % period != 0 for i in range(num_layers))
    return tuple(i % period < period - 1 for i in range(num_layers))


def kv_layers(
    keys: GgufKeys,
    kv_heads: tuple[int, ...],
    is_recurrent: tuple[bool, ...],
    *,
    key_dim: int,
    value_dim: int,
) -> tuple[KvLayer, ...]:
    """What each layer stores for a token of a sequence.

    Raises:
        ModelFileError: A key is damaged.
    """
    num_layers = len(kv_heads)
    if keys.architecture in WITHOUT_KV:
        return (KvLayer(key_width=0, value_width=0),) * num_layers
    windows = window_tokens(keys, num_layers, is_recurrent)
    with_kv = _layers_with_kv(keys, num_layers)
    # A windowed layer of Gemma 4 has smaller heads than one that sees everything.
    windowed_key = keys.count("attention.key_length_swa", default=key_dim)
    windowed_value = keys.count("attention.value_length_swa", default=value_dim)
    is_compressed = keys.has("attention.key_length_mla") and keys.has("attention.value_length_mla")
    index_width = _index_width(keys) if is_compressed else 0
    found = []
    for i, (heads, window) in enumerate(zip(kv_heads, windows, strict=True)):
        key = heads * (key_dim if window is None else windowed_key)
        value = heads * (value_dim if window is None else windowed_value)
        if heads == 0 or i >= with_kv:
            key, value = 0, 0
        elif is_compressed:  # V is the first part of K
            key, value = key + index_width, 0
        found.append(KvLayer(key_width=key, value_width=value, window_tokens=window))
    return tuple(found)


def _layers_with_kv(keys: GgufKeys, num_layers: int) -> int:
    """How many layers keep KV of their own; those after them read an earlier layer's."""
    if keys.architecture == "gemma3n":
        return GEMMA_3N_KV_LAYERS
    if keys.architecture == "gemma4":
        return num_layers - keys.optional("attention.shared_kv_layers")
    return num_layers


def _index_width(keys: GgufKeys) -> int:
    """Keys of the index by which DeepSeek's sparse attention picks tokens, kept as others are."""
    if keys.architecture in ("deepseek32", "glm-dsa"):
        return keys.optional("attention.indexer.key_length")
    return 0
