"""Writes complete model directories with random weights, one tiny model for each family.

The shapes are mlx-lm's own model classes', so every family has its real caches: plain, windowed,
recurrent, hybrid, latent.  Weights are drawn by name, distinct everywhere, at scales that spread
the logits: repeated rows would give exact ties, on which equality says nothing.
"""

import functools
import importlib
import json
import math
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import Any

from support.models import PYSTD_1M

HIDDEN, WIDE = 64, 128

COMMON: dict[str, Any] = {
    "hidden_size": HIDDEN, "num_hidden_layers": 2, "intermediate_size": WIDE,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 4096,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": [2, 0],
}  # fmt: skip

EXPERTS: dict[str, Any] = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
    "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip

MAMBA: dict[str, Any] = {
    "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_ssm": 128, "mamba_d_state": 16,
    "mamba_n_groups": 1, "mamba_d_conv": 4, "mamba_proj_bias": False, "mamba_conv_bias": True,
}  # fmt: skip

WINDOW = 32
"""Shorter than the prompts of the tests, so that windows slide in every one of them."""

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    # Heads of hidden_size / num_attention_heads = 32, where a quantised cache's groups are of 32.
    "qwen2": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32},
    "qwen3": {},
    "qwen3_moe": EXPERTS,
    "gemma3_text": {
        "num_hidden_layers": 4, "sliding_window": WINDOW, "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 64, "rope_local_base_freq": 1000.0},
    "gpt_oss": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64,
        "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "mamba2": {
        "num_heads": 4, "head_dim": 32, "state_size": 16, "conv_kernel": 4, "n_groups": 1,
        "expand": 2, "layer_norm_epsilon": 1e-5, "use_bias": False, "use_conv_bias": True,
        "time_step_limit": [0.0, 100.0], "time_step_rank": 4, "chunk_size": 64},
    "falcon_h1": MAMBA,
    "granitemoehybrid": MAMBA | {
        "num_hidden_layers": 3, "layer_types": ["mamba", "attention", "mamba"],
        "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 64,
        "embedding_multiplier": 1.0, "attention_multiplier": 0.125, "logits_scaling": 1.0,
        "residual_multiplier": 1.0, "attention_bias": False, "position_embedding_type": "nope",
        "head_dim": 16},
    "qwen3_next": EXPERTS | {
        "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_conv_kernel_dim": 4,
        "shared_expert_intermediate_size": 64, "partial_rotary_factor": 0.25},
    "lfm2": {
        "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"],
        "norm_eps": 1e-5, "conv_bias": False, "conv_L_cache": 3, "block_dim": HIDDEN,
        "block_ff_dim": WIDE, "block_multiple_of": 32, "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 32, "tie_word_embeddings": True},
    "deepseek_v3": {
        "num_hidden_layers": 3, "first_k_dense_replace": 1, "moe_layer_freq": 1,
        "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
        "moe_intermediate_size": 64, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0,
        "kv_lora_rank": 64, "q_lora_rank": 48, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32,
        "v_head_dim": 32, "num_key_value_heads": 4, "head_dim": 32},
}  # fmt: skip
"""Family (`model_type`) -> what its config adds to COMMON."""


ROUNDED_CHUNKS = frozenset({"mamba2", "falcon_h1", "granitemoehybrid", "deepseek_v3"})
"""Families that add in another order where a piece has one token: mlx-lm's state-space scan takes
a piece as a whole, and its latent attention absorbs a matrix for one token only."""

ROUNDED_WINDOWS = frozenset({"gemma3_text", "gpt_oss"})
"""Families whose windows mlx-lm attends to in the order of its ring and brim in that of time."""

ROUNDING = 1e-4
"""Of float32 logits with a spread of several units: 2e-5 was seen, and a token more or less in the
history moves logits by units."""


@functools.cache
def family_dir(family: str, *, dtype: str = "float32", quant_bits: int | None = None) -> Path:
    """A model directory that a session's tests share; see make_model_dir."""
    root = Path(tempfile.mkdtemp(prefix="brim-test-"))
    return make_model_dir(root / f"{family}-{dtype}", family, dtype=dtype, quant_bits=quant_bits)


def make_model_dir(
    path: Path,
    family: str,
    *,
    dtype: str = "float32",
    quant_bits: int | None = None,
    num_files: int = 1,
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Write a model of `family` with random weights and the 1 M model's tokenizer.

    Args:
        path: A directory that does not exist yet, or is empty.
        family: One of FAMILIES.
        dtype: MLX's name of the weights' type.
        quant_bits: Quantise matrices to so many bits, in groups of 32, which every row holds.
        num_files: How many safetensors files share the weights; an index names them if several.
        seed: Other weights of the same shape.
        **overrides: Values of config.json.

    Returns:
        `path`.
    """
    import mlx.core as mx
    from mlx.utils import tree_map_with_path

    config = COMMON | FAMILIES[family] | overrides | {"model_type": family, "torch_dtype": dtype}
    module = importlib.import_module(f"mlx_lm.models.{family}")
    model = module.Model(module.ModelArgs.from_dict(config))
    keeps_float32 = getattr(model, "cast_predicate", lambda _: True)

    def drawn(name: str, weight: Any) -> Any:
        value = _drawn(name, weight.shape, seed)
        return value.astype(getattr(mx, dtype)) if keeps_float32(name) else value

    model.update(tree_map_with_path(drawn, model.parameters()))
    if quant_bits is not None:
        from mlx_lm.utils import quantize_model

        model, config = quantize_model(model, config, 32, quant_bits)
    path.mkdir(parents=True, exist_ok=True)
    _write_weights(path, model, num_files)
    (path / "config.json").write_text(json.dumps(config, indent=1))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(PYSTD_1M / name, path / name)
    return path


def _drawn(name: str, shape: tuple[int, ...], seed: int) -> Any:
    """A value for the parameter of that name, at the scale that its place in a model needs."""
    import mlx.core as mx

    key = mx.random.key(zlib.crc32(f"{seed} {name}".encode()))
    last = name.rpartition(".")[2]
    if last == "A_log":
        # Decay rates from 1 to 16, as Mamba and its kin are initialised.
        return mx.log(mx.random.uniform(1.0, 16.0, shape, key=key))
    if last == "dt_bias":
        # Steps of about 0.02 to 0.3 after the softplus: a state that lasts tens of tokens.
        return mx.random.uniform(-4.0, -1.0, shape, key=key)
    noise = mx.random.normal(shape, key=key)
    if "embed_tokens" in name or "embeddings" in name:
        return noise
    if last == "bias" or "correction_bias" in name:
        return 0.2 * noise
    if len(shape) == 1:
        return noise if last == "sinks" else 1.0 + 0.2 * noise
    # Convolutions are (channels, taps, 1): one channel's fan-in is its taps.
    fan_in = shape[1] if "conv" in name and shape[-1] == 1 else shape[-1]
    return GAIN * noise / math.sqrt(fan_in)


GAIN = 2.0
"""Over the variance-keeping scale: what layers add outweighs the embedding of the last token, so
that greedy runs wander over the vocabulary even where the output matrix is the embedding."""


def _write_weights(path: Path, model: Any, num_files: int) -> None:
    import mlx.core as mx
    from mlx.utils import tree_flatten

    weights = dict(tree_flatten(model.parameters()))
    if num_files == 1:
        mx.save_safetensors(str(path / "model.safetensors"), weights, {"format": "mlx"})
        return
    names = sorted(weights)
    weight_map: dict[str, str] = {}
    for part in range(num_files):
        file = f"model-{part + 1:05}-of-{num_files:05}.safetensors"
        held = {name: weights[name] for name in names[part::num_files]}
        mx.save_safetensors(str(path / file), held, {"format": "mlx"})
        weight_map |= dict.fromkeys(held, file)
    index = {
        "metadata": {"total_size": sum(weight.nbytes for weight in weights.values())},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
