"""Bytes of KV cache: types, layers, windows."""

import msgspec
import pytest

from brim.core.model import KvLayer, ModelSpec
from brim.errors import ConfigError
from brim.planner.kv import (
    KV_TYPES,
    kv_bytes_per_token,
    llamacpp_kv_bytes,
    pad_kv_tokens,
    window_cells,
)


@pytest.mark.parametrize(
    ("kv_type", "num_bytes"),
    [("f32", 128), ("f16", 64), ("bf16", 64), ("q8_0", 34), ("q5_1", 24), ("q5_0", 22),
     ("q4_1", 20), ("q4_0", 18), ("iq4_nl", 18)],
)  # fmt: skip
def test_bytes_of_kv_types(llama_1b: ModelSpec, kv_type: str, num_bytes: int) -> None:
    """32 values take exactly what ggml's blocks take, and every type is covered."""
    assert len(KV_TYPES) == 9
    one = msgspec.structs.replace(
        llama_1b, num_kv_heads=(1,), key_dim=32, value_dim=32, kv_layers=()
    )
    assert kv_bytes_per_token(one, kv_type_k=kv_type, kv_type_v=kv_type) == 2 * num_bytes


def test_kv_follows_each_layer(llama_1b: ModelSpec) -> None:
    """A layer without attention adds no KV, and K and V may differ in width and type."""
    mixed = msgspec.structs.replace(
        llama_1b, num_kv_heads=(8, 0, 2), key_dim=64, value_dim=32, kv_layers=()
    )
    assert kv_bytes_per_token(mixed) == 10 * (64 + 32) * 2
    assert kv_bytes_per_token(mixed, kv_type_k="q8_0") == 10 * (68 + 64)


@pytest.mark.parametrize(("asked", "padded"), [(1, 256), (256, 256), (257, 512), (8192, 8192)])
def test_pools_are_padded(asked: int, padded: int) -> None:
    """A pool is rounded up to 256 cells."""
    assert pad_kv_tokens(asked) == padded


@pytest.mark.parametrize(
    ("window", "sequences", "full", "cells"),
    [(None, 1, False, 8192), (512, 1, True, 8192), (512, 1, False, 1024), (512, 8, False, 4608),
     (4096, 8, False, 8192), (100, 1, False, 768)],
)  # fmt: skip
def test_a_window_keeps_itself_and_a_micro_batch(
    window: int | None, sequences: int, full: bool, cells: int
) -> None:
    """Its cache holds each sequence's window and the rows that move over it, up to the pool."""
    found = window_cells(
        window, kv_tokens=8192, max_sequences=sequences, micro_batch_tokens=512, full_windows=full
    )
    assert found == cells


def test_without_flash_attention_v_is_as_wide_as_the_widest(llama_1b: ModelSpec) -> None:
    """llama.cpp pads a transposed V cache to one width for all layers."""
    layers = (KvLayer(key_width=64, value_width=64), KvLayer(key_width=64, value_width=256))
    spec = msgspec.structs.replace(llama_1b, kv_layers=layers)

    def kv_bytes(flash_attention: bool) -> int:
        return llamacpp_kv_bytes(
            spec, kv_tokens=256, max_sequences=1, kv_type_k="f16", kv_type_v="f16",
            micro_batch_tokens=512, flash_attention=flash_attention,
        )  # fmt: skip

    assert kv_bytes(True) == 256 * 2 * (64 + 64 + 64 + 256)
    assert kv_bytes(False) == 256 * 2 * (64 + 64 + 256 + 256)


def test_what_cannot_be_stored_is_refused(llama_1b: ModelSpec) -> None:
    """An unknown type, blocks that do not divide the heads, and two types for MLA's one vector."""
    with pytest.raises(ConfigError, match="no KV type named 'q8'; choose one of f32, f16"):
        kv_bytes_per_token(llama_1b, kv_type_k="q8")
    narrow = msgspec.structs.replace(llama_1b, value_dim=80)
    with pytest.raises(ConfigError, match="value heads of 80 values"):
        kv_bytes_per_token(narrow, kv_type_v="q8_0")
    latent = msgspec.structs.replace(
        llama_1b, kv_layers=(KvLayer(key_width=576, value_width=0),), key_dim=576, value_dim=512
    )
    with pytest.raises(ConfigError, match="so both have one type; use q8_0 for both"):
        kv_bytes_per_token(latent, kv_type_k="q8_0", kv_type_v="f16")
    assert kv_bytes_per_token(latent, kv_type_k="q8_0", kv_type_v="q8_0") == 612
