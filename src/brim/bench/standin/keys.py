"""Metadata pairs of a template: what llama.cpp's loader asks for before it looks at tensors."""

from collections.abc import Iterator

from brim.bench.standin.blueprint import Pair, count_pair, counts_pair, real_pair, text_pair
from brim.bench.standin.dimensions import DELTA_NETS, Dimensions
from brim.bench.standin.vocabulary import tokenizer_pairs
from brim.registry.ggml_types import FILE_TYPES

_FILE_TYPE_NUMBERS = {name: number for number, name in FILE_TYPES.items()}

_SOFTMAX, _SIGMOID = 1, 2
"""llama.cpp's LLAMA_EXPERT_GATING_FUNC_TYPE."""

_RMS_EPSILON = 1e-5


def metadata_pairs(d: Dimensions, quant: str) -> Iterator[Pair]:
    """All pairs of a model with these dimensions, the tokenizer's last."""
    yield text_pair("general.architecture", d.architecture)
    yield text_pair("general.type", "model")
    # llama.cpp looks for tokens of Phi-3 and others by this name: it must say no model's.
    yield text_pair("general.name", "stand-in")
    yield count_pair("general.quantization_version", 2)
    yield count_pair("general.file_type", _FILE_TYPE_NUMBERS[quant])
    for pair in (*_common(d), *_attention(d), *_experts(d), *_recurrent(d)):
        yield Pair(f"{d.architecture}.{pair.key}", pair.kind, pair.payload)
    yield from tokenizer_pairs(d.vocab_size)


def _common(d: Dimensions) -> Iterator[Pair]:
    yield count_pair("context_length", d.context_tokens)
    yield count_pair("embedding_length", d.hidden_size)
    yield count_pair("block_count", d.num_layers)
    yield count_pair("feed_forward_length", d.feed_forward_size)
    yield count_pair("vocab_size", d.vocab_size)
    yield real_pair("attention.layer_norm_rms_epsilon", _RMS_EPSILON)


def _attention(d: Dimensions) -> Iterator[Pair]:
    yield count_pair("attention.head_count", d.num_heads)
    if d.recurrent_layers and d.architecture not in DELTA_NETS:
        heads = [0 if i in d.recurrent_layers else d.num_kv_heads for i in range(d.num_layers)]
        yield counts_pair("attention.head_count_kv", heads)
    elif not d.kv_lora_rank:
        yield count_pair("attention.head_count_kv", d.num_kv_heads)
    if d.num_heads:
        yield real_pair("rope.freq_base", d.rope_freq_base)
    if d.kv_lora_rank:
        yield from _latent_attention(d)
    elif d.num_heads:
        yield count_pair("attention.key_length", d.head_dim)
        yield count_pair("attention.value_length", d.head_dim)
        yield from _rotation(d)
    if d.window_tokens:
        yield count_pair("attention.sliding_window", d.window_tokens)
    if d.window_pattern:
        yield count_pair("attention.sliding_window_pattern", d.window_pattern)


def _rotation(d: Dimensions) -> Iterator[Pair]:
    if d.architecture not in DELTA_NETS:
        yield count_pair("rope.dimension_count", d.head_dim)
        return
    # A quarter of each head is rotated; Qwen3.5 counts positions in three sections of it.
    pairs = d.head_dim // 8
    third = -(-pairs // 3)
    yield count_pair("rope.dimension_count", 2 * pairs)
    if d.architecture != "qwen3next":
        yield counts_pair("rope.dimension_sections", [third, third, pairs - 2 * third, 0])


def _latent_attention(d: Dimensions) -> Iterator[Pair]:
    # The cache holds one compressed head that all query heads share.
    yield count_pair("attention.head_count_kv", 1)
    if d.q_lora_rank:
        yield count_pair("attention.q_lora_rank", d.q_lora_rank)
    yield count_pair("attention.kv_lora_rank", d.kv_lora_rank)
    yield count_pair("attention.key_length", d.kv_lora_rank + d.rope_head_dim)
    yield count_pair("attention.value_length", d.kv_lora_rank)
    yield count_pair("attention.key_length_mla", d.head_dim)
    yield count_pair("attention.value_length_mla", d.value_head_dim)
    yield count_pair("rope.dimension_count", d.rope_head_dim)


def _experts(d: Dimensions) -> Iterator[Pair]:
    if not d.num_experts:
        return
    yield count_pair("expert_count", d.num_experts)
    yield count_pair("expert_used_count", d.num_active_experts)
    if d.expert_feed_forward_size:
        yield count_pair("expert_feed_forward_length", d.expert_feed_forward_size)
    if d.architecture in ("deepseek2", "glm4moe"):
        yield count_pair("leading_dense_block_count", d.num_leading_dense_layers)
        yield count_pair("expert_shared_count", d.num_shared_experts)
        is_softmax = d.architecture == "deepseek2" and not d.q_lora_rank
        yield count_pair("expert_gating_func", _SOFTMAX if is_softmax else _SIGMOID)
    elif d.num_shared_experts:
        shared = d.expert_feed_forward_size * d.num_shared_experts
        yield count_pair("expert_shared_feed_forward_length", shared)


def _recurrent(d: Dimensions) -> Iterator[Pair]:
    if d.architecture == "lfm2":
        yield count_pair("shortconv.l_cache", d.conv_kernel)
        return
    if not d.state_size:
        return
    yield count_pair("ssm.conv_kernel", d.conv_kernel)
    yield count_pair("ssm.inner_size", d.inner_size)
    yield count_pair("ssm.state_size", d.state_size)
    yield count_pair("ssm.time_step_rank", d.time_step_rank)
    if d.group_count:
        yield count_pair("ssm.group_count", d.group_count)
    if d.architecture in DELTA_NETS:
        interval = next(i for i in range(d.num_layers) if i not in d.recurrent_layers) + 1
        yield count_pair("full_attention_interval", interval)
