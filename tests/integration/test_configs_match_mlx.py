"""A config's parameters are those of the model that mlx-lm builds from it."""

import importlib
from typing import Any

import pytest
from conftest import require_engine

from brim.registry.config_json import spec_from_config

BASE: dict[str, Any] = {
    "hidden_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 64, "intermediate_size": 2816, "vocab_size": 32000,
    "max_position_embeddings": 4096, "rope_scaling": None, "rope_theta": 1e4,
    "rms_norm_eps": 1e-6, "norm_eps": 1e-6,
    "layer_norm_eps": 1e-6, "tie_word_embeddings": False, "attention_bias": False,
    "norm_topk_prob": True, "use_qk_norm": True, "partial_rotary_factor": 1.0,
    "layer_norm_epsilon": 1e-6, "mlp_bias": False, "use_bias": False, "conv_bias": False,
}  # fmt: skip

EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 512, "n_group": 1, "topk_group": 1,
           "routed_scaling_factor": 1.0}  # fmt: skip

MLA = {"kv_lora_rank": 256, "q_lora_rank": 384, "qk_rope_head_dim": 32, "qk_nope_head_dim": 64,
       "v_head_dim": 64, "num_key_value_heads": 16, "n_routed_experts": 16, "n_shared_experts": 1,
       "first_k_dense_replace": 1, "rope_scaling": None, "moe_layer_freq": 1}  # fmt: skip

DELTA = {"linear_num_key_heads": 8, "linear_num_value_heads": 16, "linear_key_head_dim": 64,
         "linear_value_head_dim": 64, "linear_conv_kernel_dim": 4}  # fmt: skip

MAMBA = {"mamba_n_heads": 32, "mamba_d_head": 64, "mamba_d_state": 64, "mamba_n_groups": 1,
         "mamba_d_conv": 4, "mamba_proj_bias": False, "mamba_conv_bias": False}  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "qwen3_moe": EXPERTS | {"num_experts": 16, "mlp_only_layers": [], "decoder_sparse_step": 1},
    "qwen3_next": EXPERTS | DELTA | {
        "num_experts": 16, "mlp_only_layers": [], "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 512},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "gemma2": {"tie_word_embeddings": True, "attn_logit_softcapping": 50.0,
               "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 64},
    "phi3": {"rope_scaling": None},
    "glm4": {"use_qk_norm": False},
    "glm4_moe": EXPERTS | {"n_routed_experts": 16, "n_shared_experts": 1,
                           "first_k_dense_replace": 1},
    "deepseek_v3": EXPERTS | MLA,
    "gpt_oss": EXPERTS | {"num_local_experts": 16, "num_experts": 16, "intermediate_size": 512,
                          "sliding_window": 128, "rope_scaling": None},
    "granitemoehybrid": EXPERTS | MAMBA | {
        "layer_types": ["mamba", "attention", "mamba", "mamba"], "num_local_experts": 16,
        "shared_intermediate_size": 1024, "embedding_multiplier": 1.0, "logits_scaling": 1.0,
        "attention_multiplier": 1.0, "residual_multiplier": 1.0, "intermediate_size": 512,
        "position_embedding_type": "nope", "time_step_limit": [0.0, 100.0]},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 2048, "tie_word_embeddings": False},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"], "conv_L_cache": 3,
             "block_dim": 1024, "block_ff_dim": 4224, "block_multiple_of": 256,
             "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": True,
             "tie_word_embeddings": True, "head_dim": 64},
    "mamba2": {"num_heads": 32, "head_dim": 64, "state_size": 64, "conv_kernel": 4, "n_groups": 1,
               "expand": 2, "hidden_act": "silu", "time_step_limit": [0.0, 1.0],
               "time_step_rank": 64, "use_conv_bias": True, "intermediate_size": 2048,
               "tie_word_embeddings": True, "residual_in_fp32": False, "rescale_prenorm_residual":
               False, "chunk_size": 64, "ssm_state_size": 64},
    "nemotron_h": EXPERTS | {
        "hybrid_override_pattern": "M*-E", "mamba_num_heads": 32, "mamba_head_dim": 64,
        "mamba_proj_bias": False, "ssm_state_size": 64, "conv_kernel": 4, "n_groups": 1,
        "use_conv_bias": False, "n_routed_experts": 16, "n_shared_experts": 1,
        "moe_shared_expert_intermediate_size": 1024},
    "cohere2": {"sliding_window": 128, "sliding_window_pattern": 4, "tie_word_embeddings": True},
    "olmo2": {},
    "smollm3": {"tie_word_embeddings": True},
}  # fmt: skip

TOLERANCE = 0.003
"""Biases and small vectors are left out of a blueprint; of models as narrow as these they are up to
0.2 %, of published ones under 0.04 %."""


@pytest.mark.parametrize("model_type", CONFIGS)
def test_parameters(model_type: str) -> None:
    """mlx-lm builds, without computing a weight, as many parameters as the blueprint has."""
    require_engine("mlx")
    from mlx.utils import tree_flatten

    config = BASE | CONFIGS[model_type] | {"model_type": model_type}
    module = importlib.import_module(f"mlx_lm.models.{model_type}")
    arrays: Any = tree_flatten(module.Model(module.ModelArgs.from_dict(config)).parameters())
    ours = spec_from_config(config, quant="MLX bf16", name=model_type).num_parameters
    # A head is made and dropped where the embedding serves as one.
    is_tied = config["tie_word_embeddings"]
    theirs = sum(
        array.size for name, array in arrays if not (is_tied and name.startswith("lm_head"))
    )
    assert abs(ours / theirs - 1) < TOLERANCE
