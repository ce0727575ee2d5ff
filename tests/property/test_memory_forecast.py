"""Properties of the memory forecast: more of anything never costs less, whatever the model."""

from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from brim.core.memory import MemoryTerms
from brim.core.model import KvLayer, ModelSpec
from brim.planner.kv import KV_TYPES, kv_bytes_per_token
from brim.planner.memory import memory_terms

HEAD_DIMS = st.sampled_from([64, 96, 128, 256])
ARCHITECTURES = st.sampled_from(
    ["llama", "qwen3moe", "gemma3", "phi3", "gpt-oss", "falcon-h1", "jamba", "qwen3next", "unknown"]
)


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    """Models of any shape: dense or with experts, with windows, with recurrent layers."""
    heads_per_group, kv_heads = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    head_dim, num_layers = draw(HEAD_DIMS), draw(st.integers(1, 8))
    num_experts = draw(st.sampled_from([0, 8, 64]))
    attends = [draw(st.booleans()) for _ in range(num_layers)]
    windows = [draw(st.sampled_from([None, 128, 1024])) for _ in range(num_layers)]
    width = kv_heads * head_dim
    layers = tuple(
        KvLayer(key_width=width * on, value_width=width * on, window_tokens=window)
        for on, window in zip(attends, windows, strict=True)
    )
    return ModelSpec(
        name="any", paths=(), format="gguf", architecture=draw(ARCHITECTURES), fingerprint="",
        num_parameters=1, weights_bytes=draw(st.integers(0, 2**40)), num_layers=num_layers,
        hidden_size=draw(st.integers(1, 64)) * 64, num_heads=heads_per_group * kv_heads,
        num_kv_heads=tuple(kv_heads * on for on in attends), key_dim=head_dim, value_dim=head_dim,
        vocab_size=draw(st.integers(1, 300_000)), trained_context_tokens=2**20, kv_layers=layers,
        feed_forward_size=draw(st.integers(0, 64)) * 64, num_experts=num_experts,
        num_active_experts=min(num_experts, draw(st.integers(1, 8))),
        num_recurrent_layers=attends.count(False),
        recurrent_state_bytes=draw(st.integers(0, 2**20)) * attends.count(False),
    )  # fmt: skip


def terms_of(spec: ModelSpec, **changes: Any) -> MemoryTerms:
    options: dict[str, Any] = {
        "engine": "llamacpp", "kv_tokens": 4096, "max_sequences": 2, "kv_type_k": "f16",
        "kv_type_v": "f16", "micro_batch_tokens": 512, "flash_attention": True,
        "repack_weights": False,
    }  # fmt: skip
    return memory_terms(spec, **(options | changes))


@settings(max_examples=60, deadline=None)
@given(
    spec=specs(), tokens=st.integers(1, 65_536), more=st.integers(1, 65_536), flash=st.booleans(),
    full=st.booleans(), engine=st.sampled_from(["llamacpp", "mlx"]),
)  # fmt: skip
def test_more_context_never_costs_less(
    spec: ModelSpec, tokens: int, more: int, flash: bool, full: bool, engine: str
) -> None:
    """No term falls with the pool, with flash attention or without, with windows cut or full.

    But llama.cpp's allocator may pack a larger graph with fewer holes, which only shows where
    256 cells of KV are smaller than a hole; MLX has no such buffer.
    """
    options = {"engine": engine, "flash_attention": flash, "full_windows": full}
    less = terms_of(spec, kv_tokens=tokens, **options)
    grown = terms_of(spec, kv_tokens=tokens + more, **options)
    assert less.kv_bytes <= grown.kv_bytes
    assert less.overhead_bytes <= grown.overhead_bytes
    holes = less.compute_bytes // 4 if engine == "llamacpp" else 0
    assert less.total_bytes - holes <= grown.total_bytes


@settings(max_examples=60, deadline=None)
@given(
    spec=specs(), fewer=st.integers(1, 32), more=st.integers(1, 32), flash=st.booleans(),
    engine=st.sampled_from(["llamacpp", "mlx"]),
)  # fmt: skip
def test_more_sequences_never_cost_less(
    spec: ModelSpec, fewer: int, more: int, flash: bool, engine: str
) -> None:
    """Every sequence adds logits, a sampler or buffers, and its recurrent states.

    llama.cpp reserves as many rows for each sequence, so 7 of them make 518 rows of 512 and 8 make
    512: by that share, and no more, scratch memory may fall.
    """
    options = {"engine": engine, "flash_attention": flash, "full_windows": False}
    less = terms_of(spec, max_sequences=fewer, **options)
    grown = terms_of(spec, max_sequences=fewer + more, **options)
    rows = [-(-512 // sequences) * sequences for sequences in (fewer, fewer + more)]
    assert less.kv_bytes <= grown.kv_bytes
    assert less.overhead_bytes <= grown.overhead_bytes
    rounding = less.compute_bytes * max(0, rows[0] - rows[1]) // rows[0]
    rounding += less.compute_bytes // 4  # holes, as above
    rounding = rounding if engine == "llamacpp" else 0
    assert less.total_bytes - rounding <= grown.total_bytes


@given(spec=specs(), one=st.sampled_from(sorted(KV_TYPES)), other=st.sampled_from(sorted(KV_TYPES)))
def test_more_bits_never_cost_less(spec: ModelSpec, one: str, other: str) -> None:
    """A type with larger blocks for 32 values takes at least as much KV, as K and as V."""
    sizes = [KV_TYPES[name].bytes_of(32) for name in (one, other)]
    small, large = (one, other) if sizes[0] <= sizes[1] else (other, one)
    for part in ("kv_type_k", "kv_type_v"):
        tokens = [kv_bytes_per_token(spec, **{part: name}) for name in (small, large)]
        assert tokens[0] <= tokens[1]


@settings(max_examples=60, deadline=None)
@given(spec=specs(), rows=st.sampled_from([1, 16, 512]), flash=st.booleans())
def test_what_is_touched_is_part_of_what_is_reserved(
    spec: ModelSpec, rows: int, flash: bool
) -> None:
    """A worker never holds more than it was granted, and every term is a size."""
    terms = terms_of(spec, micro_batch_tokens=rows, flash_attention=flash)
    assert 0 < terms.compute_touched_bytes <= terms.compute_bytes
    assert terms.resident_bytes <= terms.total_bytes
    assert min(msgspec.structs.asdict(terms).values()) >= 0
