"""What the planner says that each layer stores in MLX is what mlx-lm's classes store."""

import importlib
from typing import Any, NamedTuple

import msgspec
import pytest
from conftest import require_engine
from support.mlx_models import COMMON, FAMILIES

from brim.core.model import KvLayer, ModelSpec
from brim.planner.mlx_kv import (
    mlx_kv_types,
    mlx_layers,
    mlx_state_bytes,
    shares_kv,
    why_not_quantised,
)
from brim.registry.config_json import spec_from_config

MORE: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window": 32, "attn_logit_softcapping": 50.0,
               "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 64},
    "gemma4_text": {
        "num_hidden_layers": 6, "sliding_window": 32, "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "global_head_dim": 128, "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 4096, "tie_word_embeddings": True},
    "mamba": {"state_size": 16, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True,
              "time_step_rank": 8, "intermediate_size": 128, "tie_word_embeddings": True},
    "deepseek_v2": FAMILIES["deepseek_v3"] | {
        "rope_scaling": {"type": "yarn", "factor": 2, "mscale_all_dim": 1.0, "mscale": 1.0,
                         "original_max_position_embeddings": 4096, "beta_fast": 32,
                         "beta_slow": 1},
        "scoring_func": "softmax", "topk_method": "greedy"},
    "deepseek_v32": FAMILIES["deepseek_v3"] | {
        "index_head_dim": 32, "index_n_heads": 2, "index_topk": 64},
}  # fmt: skip
"""Families of which nothing else is tested, for what they store differently."""

CONFIGS = FAMILIES | MORE

NOT_QUANTISED = {
    "gemma2": "attention by itself", "gemma4_text": "another layer's cache",
    "gpt_oss": "attention sinks", "mamba": "no layer", "mamba2": "no layer",
    "deepseek_v3": "one compressed vector", "deepseek_v32": "one compressed vector",
    "granitemoehybrid": "heads of 16 and 16",
}  # fmt: skip


class Stored(NamedTuple):
    """What one layer of mlx-lm holds after a few tokens."""

    layer: KvLayer
    state_bytes: int


def spec_of(family: str, dtype: str) -> ModelSpec:
    config = COMMON | CONFIGS[family] | {"model_type": family}
    spec = spec_from_config(config, quant="MLX bf16", name=family)
    return msgspec.structs.replace(spec, matrix_bytes={dtype: 1})


def model_of(family: str) -> Any:
    module = importlib.import_module(f"mlx_lm.models.{family}")
    config = COMMON | CONFIGS[family] | {"model_type": family}
    return module.Model(module.ModelArgs.from_dict(config))


def stored_by_mlx(family: str, dtype: str) -> list[Stored]:
    """Layer by layer, after five tokens through a model with initial weights."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    model = model_of(family)
    model.set_dtype({"F32": mx.float32, "BF16": mx.bfloat16}[dtype])
    caches = make_prompt_cache(model)
    mx.eval(model(mx.array([[1, 2, 3, 4, 5]]), cache=caches))
    return [_stored(cache) for cache in caches]


def _stored(cache: Any) -> Stored:
    """Sums over the parts of a layer that keeps several things."""
    parts = getattr(cache, "caches", (cache,))
    key = value = state_bytes = 0
    window = None
    for part in parts:
        if hasattr(part, "cache"):
            state_bytes += sum(array.nbytes for array in part.cache)
        else:
            key += part.keys.shape[1] * part.keys.shape[3]
            value += part.values.shape[1] * part.values.shape[3]
            window = getattr(part, "max_size", None)
    return Stored(KvLayer(key_width=key, value_width=value, window_tokens=window), state_bytes)


DTYPES = [
    # On a processor MLX computes experts in f32 alone.
    (family, dtype)
    for family in CONFIGS
    for dtype in ("F32", "BF16")
    if dtype == "F32"
    or not {"num_local_experts", "num_experts", "n_routed_experts"} & set(CONFIGS[family])
]


@pytest.mark.parametrize(("family", "dtype"), DTYPES)
def test_layers_store_what_is_planned(family: str, dtype: str) -> None:
    """Each layer's widths and window, and the states of all, are as the planner counts them."""
    require_engine("mlx")
    spec = spec_of(family, dtype)
    stored = stored_by_mlx(family, dtype)
    layers = mlx_layers(spec)
    # Layers that read another one's cache have none in mlx-lm's list.
    planned = layers[: len(stored)] if shares_kv(spec) else layers
    assert not any(layer.key_width for layer in layers[len(planned) :])
    assert len(stored) == len(planned)
    for ours, theirs in zip(planned, stored, strict=True):
        # Where K and V are views of one vector, how it is split is nobody's concern.
        assert (
            ours.key_width + ours.value_width == theirs.layer.key_width + theirs.layer.value_width
        )
        if ours.key_width:
            assert ours.window_tokens == theirs.layer.window_tokens
    assert mlx_state_bytes(spec) == sum(layer.state_bytes for layer in stored)


@pytest.mark.parametrize("family", CONFIGS)
def test_what_can_be_quantised_is_known_beforehand(family: str) -> None:
    """Whether a cache can be quantised is told from the config as the model's class decides it."""
    require_engine("mlx")
    from brim.engine.mlx.caches import CacheMaker

    spec = spec_of(family, "F32")
    reason = why_not_quantised(spec) or ""
    assert NOT_QUANTISED.get(family, "") in reason
    assert (reason == "") == (family not in NOT_QUANTISED)
    assert mlx_kv_types(spec) == ({"f16"} if reason else {"f16", "q8_0", "q4_0"})
    maker = CacheMaker(model_of(family), kv_type="f16")
    assert maker.can_quantise == (not reason)
