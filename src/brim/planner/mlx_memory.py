"""Memory terms of a model that MLX runs.

MLX reads safetensors into arrays: weights are dirty anonymous memory, nothing is mapped.  Freed
arrays stay in a cache up to the limit that the engine sets, so that limit is granted as well.
"""

from brim.core.memory import MemoryTerms
from brim.core.model import ModelSpec
from brim.planner.kv import mlx_kv_bytes, pad_kv_tokens
from brim.planner.overhead import WORKER_OVERHEAD_BYTES
from brim.planner.scratch.compute import graph_bytes

MLX_LIBRARY_BYTES = 150 * 1024 * 1024
"""What MLX and mlx-lm add to a worker: library, compiled kernels, tokenizer.

An allowance, not a measurement: `import mlx_lm` takes 110 to 130 MiB on the CPU build, and Metal
compiles its kernels into the process.
"""

ACTIVATION_BYTES = 2
"""MLX computes in bf16 where llama.cpp's buffers hold f32."""


def mlx_terms(
    spec: ModelSpec,
    *,
    kv_tokens: int,
    max_sequences: int,
    kv_type_k: str,
    kv_type_v: str,
    micro_batch_tokens: int,
) -> MemoryTerms:
    """Bytes of one model in MLX; see `planner.memory.memory_terms`."""
    graph = graph_bytes(
        spec,
        kv_tokens=pad_kv_tokens(kv_tokens),
        max_sequences=max_sequences,
        kv_type_k="f16",
        kv_type_v="f16",
        micro_batch_tokens=micro_batch_tokens,
        flash_attention=True,
    )
    logits = 4 * max_sequences * spec.vocab_size
    activations = graph.live * ACTIVATION_BYTES // 4
    return MemoryTerms(
        weights_bytes=spec.weights_bytes,
        kv_bytes=mlx_kv_bytes(
            spec,
            kv_tokens=kv_tokens,
            max_sequences=max_sequences,
            kv_type_k=kv_type_k,
            kv_type_v=kv_type_v,
            micro_batch_tokens=micro_batch_tokens,
        ),
        # Once in use and once more in the cache of freed arrays, whose limit is one step's worth.
        compute_bytes=2 * activations + logits,
        compute_touched_bytes=2 * activations + logits,
        overhead_bytes=WORKER_OVERHEAD_BYTES + MLX_LIBRARY_BYTES,
    )
