"""mlx-lm's own generation, step for step: what brim's MLX engine must equal."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

KV_BITS = {"q8_0": 8, "q4_0": 4}


@functools.cache
def load(model_dir: Path) -> Any:
    """The model as mlx-lm loads it, once a process."""
    from mlx_lm.utils import load_model

    return load_model(model_dir)[0]


def greedy(
    model_dir: Path, prompt: Sequence[int], num_tokens: int, kv_type: str = "f16"
) -> tuple[list[int], list[NDArray[np.float32]]]:
    """Tokens of mlx_lm's generate_step without a sampler, and the logits behind each.

    A quantised cache is quantised from the first token on: generate_step's own `kv_bits` would
    read the first piece of the prompt unquantised.
    """
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    model = load(model_dir)
    all_logits: list[Any] = []

    def keep(_tokens: Any, logits: Any) -> Any:
        all_logits.append(logits)
        return logits

    steps = generate_step(
        mx.array(list(prompt)),
        model,
        max_tokens=num_tokens,
        prompt_cache=caches(model, kv_type),
        logits_processors=[keep],
    )
    tokens = [int(token) for token, _ in steps]
    logits = [np.array(one[0].astype(mx.float32)) for one in all_logits[:num_tokens]]
    return tokens, logits


def caches(model: Any, kv_type: str) -> list[Any]:
    """mlx-lm's caches for one sequence; every plain one quantised if `kv_type` is."""
    from mlx_lm.models.cache import KVCache, make_prompt_cache

    made = make_prompt_cache(model)
    if kv_type == "f16":
        return list(made)
    bits = KV_BITS[kv_type]
    head_dim = getattr(model.args, "head_dim", None)
    head_dim = head_dim or model.args.hidden_size // model.args.num_attention_heads
    group_size = 64 if head_dim % 64 == 0 else 32
    return [
        cache.to_quantized(group_size=group_size, bits=bits) if type(cache) is KVCache else cache
        for cache in made
    ]
