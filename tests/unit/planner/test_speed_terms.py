"""Units of work, counted by hand on a small model."""

import msgspec
import pytest
from support.calibrated import shape

from brim.core.model import KvLayer, ModelSpec
from brim.planner.shape import speed_shape
from brim.planner.speed_terms import (
    KvTypes,
    active_bytes_by_type,
    decode_terms,
    kv_bytes_read,
    prefill_terms,
    rowwise_bytes_by_type,
)

F16 = KvTypes("f16", "f16", True)
SMALL = shape("F16", num_layers=4, hidden_size=256, num_heads=4, num_kv_heads=2, feed_forward=512)
QUERY, KEYS = 4 * 64, 2 * 64


def test_a_decoded_token_sees_every_cell_once_for_each_query_head() -> None:
    """Work grows with query heads and widths, bytes with KV heads; the token sees itself too."""
    terms = decode_terms(SMALL, kv=F16, repack_weights=False, depth_tokens=99)
    assert terms["cells flash"] == 4 * 4 * 100
    assert terms["scores f16/f16 flash"] == 4 * 4 * 100 * 2 * 64
    assert terms["kv bytes"] == 4 * 99 * 2 * KEYS * 2
    assert (terms["token"], terms["layer"], terms["vocabulary"]) == (1, 4, 4096)
    assert terms["bytes F16"] == SMALL.active_bytes


def test_a_prompt_in_two_pieces_is_the_same_work_as_in_one() -> None:
    """Cells of a prompt behind a depth add up to those of the whole."""

    def cells(depth: int, prompt: int) -> float:
        return prefill_terms(
            SMALL, kv=F16, repack_weights=False, depth_tokens=depth, prompt_tokens=prompt,
            micro_batch_tokens=512,
        )["cells flash"]  # fmt: skip

    assert cells(0, 300) == cells(0, 100) + cells(100, 200)


@pytest.mark.parametrize("depth", [0, 30, 100, 500])
@pytest.mark.parametrize("rows", [1, 40, 200])
def test_a_window_bounds_what_each_row_sees(depth: int, rows: int) -> None:
    """Counted row by row: the cells before it and itself, at most the window."""
    layers = (KvLayer(key_width=KEYS, value_width=KEYS, window_tokens=64),)
    windowed = msgspec.structs.replace(SMALL, kv_layers=layers)
    terms = prefill_terms(
        windowed, kv=F16, repack_weights=False, depth_tokens=depth, prompt_tokens=rows,
        micro_batch_tokens=512,
    )  # fmt: skip
    seen = sum(min(64, depth + row + 1) for row in range(rows))
    assert terms["cells flash"] == pytest.approx(4 * seen)
    assert kv_bytes_read(windowed, F16, depth) == min(depth, 64) * 2 * KEYS * 2


def test_the_last_feed_forward_and_the_output_are_for_the_drawn_token_alone() -> None:
    """Rows of a prompt skip them, rows of sequences that decode together do not."""
    in_layer = 256 * (2 * QUERY + 2 * KEYS + 3 * 512)
    rowwise = rowwise_bytes_by_type(SMALL)["F16"]
    assert rowwise == pytest.approx(2 * (4 * in_layer - 256 * 3 * 512))
    both = {
        draws: prefill_terms(
            SMALL, kv=F16, repack_weights=False, depth_tokens=0, prompt_tokens=8,
            micro_batch_tokens=512, draws_every_row=draws,
        )
        for draws in (False, True)
    }  # fmt: skip
    assert both[False]["bytes F16"] == pytest.approx(8 * rowwise)
    assert both[False]["drawing bytes"] == pytest.approx(SMALL.active_bytes - rowwise)
    assert both[True]["bytes F16"] == pytest.approx(8 * SMALL.active_bytes)
    assert both[True]["drawing bytes"] == 0


def test_weights_are_read_once_for_each_micro_batch() -> None:
    """1,025 rows in micro-batches of 512 are three passes over layers and weights."""
    terms = prefill_terms(
        SMALL, kv=F16, repack_weights=True, depth_tokens=0, prompt_tokens=1025,
        micro_batch_tokens=512,
    )  # fmt: skip
    assert terms["token"] == 3
    assert terms["layer"] == 12
    assert terms["pass F16 repacked"] == 3 * rowwise_bytes_by_type(SMALL)["F16"]


def test_experts_that_are_not_used_are_not_read() -> None:
    """A token reads the active share of each type; a prompt's pass reads all of it."""
    sparse = msgspec.structs.replace(
        SMALL, matrix_bytes={"F16": 8 * SMALL.active_bytes}, num_experts=64, num_active_experts=8
    )
    assert active_bytes_by_type(sparse) == {"F16": SMALL.active_bytes}
    dense_terms, sparse_terms = (
        prefill_terms(
            what, kv=F16, repack_weights=False, depth_tokens=0, prompt_tokens=512,
            micro_batch_tokens=512,
        )
        for what in (SMALL, sparse)
    )  # fmt: skip
    assert sparse_terms["bytes F16"] == dense_terms["bytes F16"]
    assert sparse_terms["pass F16"] == pytest.approx(8 * dense_terms["pass F16"])


def test_a_quant_stands_in_for_unknown_tensor_types() -> None:
    """A config alone has no tensors: all bytes then count as the recipe's main type."""
    bare = msgspec.structs.replace(SMALL, matrix_bytes={}, quant="Q4_K_M")
    assert active_bytes_by_type(bare) == {"Q4_K": SMALL.active_bytes}


def test_quantised_kv_is_read_in_fewer_bytes() -> None:
    """q8_0 keeps 34 bytes for 32 values of K and of V."""
    f16, q8 = (kv_bytes_read(SMALL, KvTypes(t, t, True), 1000) for t in ("f16", "q8_0"))
    assert q8 / f16 == pytest.approx(34 / 64)


def test_layers_without_kv_cost_no_attention() -> None:
    """A recurrent layer's state is counted instead, read and written for each token."""
    recurrent = msgspec.structs.replace(
        SMALL,
        kv_layers=(KvLayer(key_width=0, value_width=0),) * 4,
        num_recurrent_layers=4,
        recurrent_state_bytes=1000,
    )
    terms = decode_terms(recurrent, kv=F16, repack_weights=False, depth_tokens=5000)
    assert terms["scores f16/f16 flash"] == terms["cells flash"] == terms["kv bytes"] == 0
    assert terms["state bytes"] == 2000


def test_a_layer_without_kv_of_its_own_reads_anothers(llama_1b: ModelSpec) -> None:
    """Layers that share KV read the last cache of their kind, those that do not attend none."""
    wide, windowed = KvLayer(key_width=64, value_width=64), KvLayer(
        key_width=32, value_width=32, window_tokens=512
    )  # fmt: skip
    nothing = KvLayer(key_width=0, value_width=0)
    sharing = msgspec.structs.replace(nothing, window_tokens=512)
    spec = msgspec.structs.replace(
        llama_1b, num_layers=5, num_kv_heads=(1, 1, 1, 1, 0),
        kv_layers=(windowed, wide, sharing, nothing, nothing),
    )  # fmt: skip
    assert speed_shape(spec).kv_layers == (windowed, wide, windowed, wide, nothing)


def test_mlx_reads_all_of_gemma_2(llama_1b: ModelSpec) -> None:
    """Windows that mlx-lm leaves out are windows in llama.cpp alone."""
    layer = KvLayer(key_width=64, value_width=64, window_tokens=4096)
    spec = msgspec.structs.replace(llama_1b, architecture="gemma2", kv_layers=(layer,) * 16)
    assert speed_shape(spec).kv_layers[0].window_tokens == 4096
    assert speed_shape(spec, engine="mlx").kv_layers[0].window_tokens is None
