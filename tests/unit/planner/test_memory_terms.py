"""Bytes of a loaded model, checked against what llama.cpp says it allocated."""

from typing import Any

import msgspec
import pytest

from brim.core.model import ModelSpec
from brim.errors import ConfigError
from brim.planner.memory import (
    KV_TYPES,
    kv_bytes_per_token,
    llamacpp_compute_bytes,
    memory_terms,
    pad_kv_tokens,
    repacked_bytes,
)

MIB = 1024**2

SHAPES = {
    # name: (layers, hidden, heads, KV heads, head width, feed-forward, vocabulary)
    "1m": (2, 128, 2, 1, 64, 384, 4096),
    "6m": (6, 256, 4, 2, 64, 768, 4096),
    "half b": (24, 896, 14, 2, 64, 4864, 151936),
    "1b": (16, 2048, 32, 8, 64, 8192, 128256),
    "4b": (36, 2560, 32, 8, 128, 9728, 151936),
    "7b": (32, 4096, 32, 32, 128, 11008, 32000),
    "8b": (32, 4096, 32, 8, 128, 14336, 128256),
}

RECORDED_MIB = [
    # shape, cells, rows, sequences, flash attention -> compute buffer, output buffer.
    # Log lines of llama.cpp (llama-cpp-python 0.3.36) on x86, f16 KV, unified pool.
    ("1m", 1024, 512, 1, False, 7.51, 0.02),
    ("1m", 8192, 512, 16, True, 11.26, 0.25),
    ("6m", 8192, 512, 16, False, 83.01, 0.25),
    ("6m", 1024, 512, 1, True, 7.51, 0.02),
    ("half b", 8192, 512, 16, False, 249.26, 9.27),
    ("half b", 32768, 512, 1, True, 67.51, 0.58),
    ("1b", 8192, 512, 1, False, 550.01, 0.49),
    ("1b", 1024, 512, 16, True, 65.01, 7.83),
    ("4b", 1024, 512, 1, False, 101.01, 0.58),
    ("4b", 32768, 512, 16, True, 112.01, 9.27),
    ("7b", 8192, 512, 16, False, 584.01, 1.95),
    ("7b", 1024, 512, 1, True, 97.51, 0.12),
    ("8b", 32768, 512, 16, False, 2156.01, 7.83),
    ("8b", 8192, 512, 1, True, 124.01, 0.49),
]


def spec_of(name: str, spec: ModelSpec) -> ModelSpec:
    layers, hidden, heads, kv_heads, width, feed_forward, vocabulary = SHAPES[name]
    return msgspec.structs.replace(
        spec, num_layers=layers, hidden_size=hidden, num_heads=heads,
        num_kv_heads=(kv_heads,) * layers, key_dim=width, value_dim=width, vocab_size=vocabulary,
        feed_forward_size=feed_forward,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "cells", "rows", "sequences", "flash", "compute_mib", "output_mib"), RECORDED_MIB
)
def test_compute_buffers_are_what_llamacpp_logged(
    llama_1b: ModelSpec, shape: str, cells: int, rows: int, sequences: int, flash: bool,
    compute_mib: float, output_mib: float,
) -> None:  # fmt: skip
    """The forecast of scratch and output buffers is within 9 % of recorded ones."""
    forecast = llamacpp_compute_bytes(
        spec_of(shape, llama_1b), kv_tokens=cells, max_sequences=sequences,
        micro_batch_tokens=rows, flash_attention=flash,
    )  # fmt: skip
    assert forecast / MIB == pytest.approx(compute_mib + output_mib, rel=0.09)


@pytest.mark.parametrize(
    ("kv_type", "num_bytes"),
    [("f32", 128), ("f16", 64), ("bf16", 64), ("q8_0", 34), ("q5_1", 24), ("q5_0", 22),
     ("q4_1", 20), ("q4_0", 18), ("iq4_nl", 18)],
)  # fmt: skip
def test_bytes_of_kv_types(llama_1b: ModelSpec, kv_type: str, num_bytes: int) -> None:
    """32 values take exactly what ggml's blocks take, and every type is covered."""
    assert len(KV_TYPES) == 9
    one = msgspec.structs.replace(llama_1b, num_kv_heads=(1,), key_dim=32, value_dim=32)
    assert kv_bytes_per_token(one, kv_type_k=kv_type, kv_type_v=kv_type) == 2 * num_bytes


def test_kv_follows_each_layer(llama_1b: ModelSpec) -> None:
    """A layer without attention adds no KV, and K and V may differ in width and type."""
    mixed = msgspec.structs.replace(llama_1b, num_kv_heads=(8, 0, 2), key_dim=64, value_dim=32)
    assert kv_bytes_per_token(mixed) == 10 * (64 + 32) * 2
    assert kv_bytes_per_token(mixed, kv_type_k="q8_0") == 10 * (68 + 64)


def test_kv_is_what_llamacpp_logged(llama_1b: ModelSpec) -> None:
    """8,192 cells of the 6 M model are the 24 MiB that llama.cpp's KV buffer took."""
    assert kv_bytes_per_token(spec_of("6m", llama_1b)) * 8192 == 24 * MIB


@pytest.mark.parametrize(("asked", "padded"), [(1, 256), (256, 256), (257, 512), (8192, 8192)])
def test_pools_are_padded(asked: int, padded: int) -> None:
    """A pool is rounded up to 256 cells."""
    assert pad_kv_tokens(asked) == padded


def test_unknown_kv_type_is_refused(llama_1b: ModelSpec) -> None:
    """A type that ggml lacks, or whose blocks do not divide the heads, is a ConfigError."""
    with pytest.raises(ConfigError, match="no KV type named 'q8'; choose one of f32, f16"):
        kv_bytes_per_token(llama_1b, kv_type_k="q8")
    narrow = msgspec.structs.replace(llama_1b, value_dim=80)
    with pytest.raises(ConfigError, match="value heads of 80 values"):
        kv_bytes_per_token(narrow, kv_type_v="q8_0")


def test_repacking_copies_what_llamacpp_copied(llama_1b: ModelSpec) -> None:
    """The second copy of this model's weights is forecast within 1 % of the 445 MiB logged."""
    assert repacked_bytes(llama_1b) / MIB == pytest.approx(445, rel=0.01)


@pytest.mark.parametrize("quant", ["F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "IQ4_XS", ""])
def test_other_types_are_not_copied(llama_1b: ModelSpec, quant: str) -> None:
    """Types that llama.cpp leaves in place cost no second copy."""
    assert repacked_bytes(msgspec.structs.replace(llama_1b, quant=quant)) == 0


def test_terms_of_a_plan(llama_1b: ModelSpec) -> None:
    """Weights, KV of a padded pool and overhead are all there, and repacking is an option."""
    terms = memory_terms(
        llama_1b, engine="llamacpp", kv_tokens=1000, max_sequences=1, kv_type_k="f16",
        kv_type_v="f16", micro_batch_tokens=512, flash_attention=True, repack_weights=False,
    )  # fmt: skip
    assert terms.weights_bytes == llama_1b.weights_bytes
    assert terms.kv_bytes == 1024 * 32768
    assert terms.repacked_bytes == 0
    assert terms.overhead_bytes == 40 * MIB + 400 * 128_256


def test_recurrent_states_are_there_for_every_sequence(llama_1b: ModelSpec) -> None:
    """They come on top of the pool, as often as there may be sequences."""
    hybrid = msgspec.structs.replace(llama_1b, recurrent_state_bytes=3 * MIB)

    def kv_bytes(spec: ModelSpec, max_sequences: int) -> int:
        return memory_terms(
            spec, engine="llamacpp", kv_tokens=1024, max_sequences=max_sequences, kv_type_k="f16",
            kv_type_v="f16", micro_batch_tokens=512, flash_attention=True, repack_weights=False,
        ).kv_bytes  # fmt: skip

    for num_sequences in (1, 16):
        more = kv_bytes(hybrid, num_sequences) - kv_bytes(llama_1b, num_sequences)
        assert more == num_sequences * 3 * MIB


@pytest.mark.parametrize("quant", ["Q4_K_M", "Q2_K", "F16"])
@pytest.mark.parametrize(
    "absurd",
    [
        {"num_parameters": 1},
        {"num_layers": 1, "num_kv_heads": ()},
        {"num_heads": 0, "num_kv_heads": (0,) * 16, "key_dim": 0, "value_dim": 0},
        {"weights_bytes": 0, "feed_forward_size": 0},
        {"vocab_size": 2**31, "feed_forward_size": 2**31},
    ],
)
def test_no_header_makes_a_term_negative(
    llama_1b: ModelSpec, absurd: dict[str, Any], quant: str
) -> None:
    """Whatever a header says, nothing is forecast to give memory back, and a process costs some."""
    terms = memory_terms(
        msgspec.structs.replace(llama_1b, quant=quant, **absurd), engine="llamacpp", kv_tokens=1,
        max_sequences=1, kv_type_k="q8_0", kv_type_v="q8_0", micro_batch_tokens=1,
        flash_attention=True, repack_weights=True,
    )  # fmt: skip
    assert min(msgspec.structs.asdict(terms).values()) >= 0
    assert terms.total_bytes >= 40 * MIB


def test_unknown_engine_is_refused(llama_1b: ModelSpec) -> None:
    """There is no forecast for an engine that the planner does not know."""
    with pytest.raises(ConfigError, match="no memory forecast for an engine named 'x'"):
        memory_terms(
            llama_1b, engine="x", kv_tokens=1, max_sequences=1, kv_type_k="f16", kv_type_v="f16",
            micro_batch_tokens=1, flash_attention=True, repack_weights=False,
        )  # fmt: skip
