"""Memory terms of a model that MLX runs.

MLX reads safetensors into arrays: weights are dirty anonymous memory, nothing is mapped.  Freed
arrays stay in a cache up to the limit that the engine sets, so that limit is granted as well.
"""

from brim.core.memory import MemoryTerms
from brim.core.model import ModelSpec
from brim.planner.kv import is_latent, pad_kv_tokens
from brim.planner.mlx_kv import (
    attention_is_fused,
    float_bytes,
    layer_row_bytes,
    mlx_kv_bytes,
    mlx_layers,
    mlx_window_cells,
)
from brim.planner.mlx_limits import MAX_SCORES_BYTES, ROW_TILE
from brim.planner.overhead import MIB, WORKER_OVERHEAD_BYTES

MLX_LIBRARY_BYTES = {"cpu": 25 * MIB, "gpu": 150 * MIB}
"""What MLX and mlx-lm's model classes add to a worker that has imported everything else.

Measured on a CPU: a worker that decoded with a model of 2 MB was 68 MiB resident, 34 of them
anonymous, with `tokenizers` and without transformers (x86-64 Linux, mlx 0.32.4, November 2026).  On
a GPU an allowance: Metal's own library of kernels is over 100 MiB, of which it takes what it needs.
"""

TOKENIZER_BYTES_PER_TOKEN = 750
"""Tables of `tokenizers` and what brim keeps beside them: 610 at 32,000 tokens, 680 at 152,000 and
735 at 262,000, each with as many merges (x86-64 Linux, tokenizers 0.23, November 2026)."""

ROW_WIDTHS = 12
"""Arrays as wide as the widest of hidden size and heads that a layer's rows hold at once.

Measured as the peak of one evaluation of 512 rows over its results (CPU, f32, 6 layers): 8 where
heads are wide, 12 where they are narrow; the feed-forward's own width counts `FEED_FORWARDS` times
(6,144 against 1,536 wide: 18.5 MiB more for 9 MiB a factor).
"""

FEED_FORWARDS = 2

CPU_VALUE_BYTES = 4
"""A CPU multiplies two-byte floats through f32 copies: 13.7 MiB of bf16 rows where f32 took 18.7
and two bytes a value would be 9."""

SCORES = 1.25
"""Scores of attention that is not fused, in arrays of heads x rows x tokens: 1.03 to 1.2 measured,
where masks are added last (CPU; and MLX's quantised attention everywhere)."""

SCAN_ROWS = 256
"""Rows that mlx-lm's scan of a state-space model takes at once."""

SCAN_MATRICES, SCAN_WIDTHS = 8, 4
"""What a scan has in use, f32: matrices of heads x 256 x 256, and rows as wide as all heads.

34.8 MiB measured for 512 rows of 16 heads of 64 (40 by these), 77.1 of 32 heads (80), 47.3 of 16
heads of 128 (48); CPU, bf16.
"""

LOGIT_ROWS = 6
"""Arrays of one row of logits, f32, for each sequence: the model's, as f32, those of the step that
was launched ahead, and what drawing among the likeliest 40 takes (1.2 measured)."""

SORTED_ROWS = 20
"""The same for a sequence that has its whole vocabulary sorted: 12 to 16 measured without top-k, 21
with typical sampling besides.  Counted once: few requests ask for it, and seldom at one time."""

FREED_SHARE = 2
"""A part of 1/2 of the compute term is the cache of freed arrays.

One evaluation's arrays are freed into it and taken out again by the next one, so a limit below that
would allocate anew in every layer, and more would never be used.
"""


def freed_arrays_limit_bytes(compute_bytes: int) -> int:
    """The limit of MLX's cache of freed arrays that a plan's compute term grants.

    Example:
        >>> freed_arrays_limit_bytes(1000)
        500
    """
    return compute_bytes // FREED_SHARE


def mlx_terms(
    spec: ModelSpec,
    *,
    kv_tokens: int,
    max_sequences: int,
    kv_type_k: str,
    kv_type_v: str,
    micro_batch_tokens: int,
    on_gpu: bool,
) -> MemoryTerms:
    """Bytes of one model in MLX; see `planner.memory.memory_terms`."""
    kv_bytes = mlx_kv_bytes(
        spec,
        kv_tokens=kv_tokens,
        max_sequences=max_sequences,
        kv_type_k=kv_type_k,
        kv_type_v=kv_type_v,
    )
    in_use = activation_bytes(
        spec,
        num_rows=min(pad_kv_tokens(kv_tokens), micro_batch_tokens),
        kv_tokens=pad_kv_tokens(kv_tokens),
        kv_type=kv_type_k,
        on_gpu=on_gpu,
    )
    in_use += 4 * spec.vocab_size * (LOGIT_ROWS * max_sequences + SORTED_ROWS)
    compute_bytes = FREED_SHARE * in_use
    library_bytes = MLX_LIBRARY_BYTES["gpu" if on_gpu else "cpu"]
    tokenizer_bytes = TOKENIZER_BYTES_PER_TOKEN * spec.vocab_size
    overhead_bytes = WORKER_OVERHEAD_BYTES + library_bytes + tokenizer_bytes
    return MemoryTerms(
        weights_bytes=spec.weights_bytes,
        kv_bytes=kv_bytes,
        compute_bytes=compute_bytes,
        compute_touched_bytes=compute_bytes,
        overhead_bytes=overhead_bytes,
        # Weights come layer by layer; while one is stacked or cast it is there twice.
        load_peak_bytes=overhead_bytes
        + spec.weights_bytes
        + spec.weights_bytes // max(1, spec.num_layers),
    )


def activation_bytes(
    spec: ModelSpec, *, num_rows: int, kv_tokens: int, kv_type: str, on_gpu: bool
) -> int:
    """Most bytes that one evaluation of `num_rows` rows has in use beside weights and caches."""
    expert = spec.widths.get("expert_feed_forward_length", spec.feed_forward_size)
    width = max(
        spec.hidden_size,
        spec.num_heads * max(spec.key_dim, spec.value_dim),
        spec.widths.get("ssm.inner_size", 0),
        # Rows are gathered once for each expert they go to.
        spec.num_active_experts * spec.hidden_size // 4,
    )
    feed_forward = max(spec.feed_forward_size, spec.num_active_experts * expert)
    num_bytes = float_bytes(spec)
    value_bytes = num_bytes if on_gpu else CPU_VALUE_BYTES
    in_use = num_rows * (ROW_WIDTHS * width + FEED_FORWARDS * feed_forward) * value_bytes
    if not attention_is_fused(spec, kv_type=kv_type, on_gpu=on_gpu):
        in_use += _scores_bytes(spec, num_rows, kv_tokens)
    in_use += _moved_windows_bytes(spec, kv_tokens)
    if spec.num_recurrent_layers and spec.architecture != "mamba":
        heads, inner = (
            spec.widths.get(f"ssm.{key}", 0) for key in ("time_step_rank", "inner_size")
        )
        in_use += 4 * (SCAN_MATRICES * heads * SCAN_ROWS**2 + SCAN_WIDTHS * num_rows * inner)
    if is_latent(spec):
        # Keys and values of every head are made from the compressed ones for a prompt piece.
        widths = spec.widths
        whole = widths.get("attention.key_length_mla", 0) + widths.get(
            "attention.value_length_mla", 0
        )
        in_use += spec.num_heads * kv_tokens * whole * num_bytes
    return in_use


def _moved_windows_bytes(spec: ModelSpec, kv_tokens: int) -> int:
    """New buffers of all windows that a piece of a prompt fills, beside the old ones.

    A piece moves every layer's window in one evaluation.  Measured as the peak's growth by eight
    more windows of 1,280 tokens: 9.1 MiB a layer, whose buffers take 10 (CPU, f32); a decoded token
    takes those of one layer.
    """
    windows = [
        (mlx_window_cells(layer.window_tokens), layer_row_bytes(spec, layer, "f16"))
        for layer in mlx_layers(spec)
        if layer.window_tokens is not None
    ]
    return round(sum(cells * row_bytes for cells, row_bytes in windows if cells < kv_tokens))


def _scores_bytes(spec: ModelSpec, num_rows: int, kv_tokens: int) -> int:
    """Of one layer, whose rows grow fewer as the context grows (`mlx_limits`)."""
    row_bytes = max(1, spec.num_heads) * kv_tokens * float_bytes(spec)
    return round(SCORES * min(num_rows * row_bytes, max(MAX_SCORES_BYTES, ROW_TILE * row_bytes)))
