"""Scratch memory: where the tensors of a graph lie, and the buffer that holds them."""

from typing import Any

import msgspec
import pytest

from brim.core.model import ModelSpec
from brim.planner.scratch.compute import llamacpp_compute_bytes
from brim.planner.scratch.liveness import Graph, allocate, touched_bytes

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
        feed_forward_size=feed_forward, kv_layers=(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "cells", "rows", "sequences", "flash", "compute_mib", "output_mib"), RECORDED_MIB
)
def test_buffers_are_what_llamacpp_logged(
    llama_1b: ModelSpec, shape: str, cells: int, rows: int, sequences: int, flash: bool,
    compute_mib: float, output_mib: float,
) -> None:  # fmt: skip
    """Compute and output buffers come out to the two decimals that were logged."""
    forecast = llamacpp_compute_bytes(
        spec_of(shape, llama_1b), kv_tokens=cells, max_sequences=sequences, kv_type_k="f16",
        kv_type_v="f16", micro_batch_tokens=rows, flash_attention=flash,
    )  # fmt: skip
    assert forecast.reserved / MIB == pytest.approx(compute_mib, abs=0.006)
    assert forecast.output / MIB == pytest.approx(output_mib, abs=0.006)
    assert forecast.touched < forecast.reserved


@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts": 8, "num_active_experts": 0},
        {"num_layers": 0, "num_kv_heads": ()},
        {"num_layers": 1, "num_kv_heads": (8,), "vocab_size": 1},
        {"num_heads": 0, "num_kv_heads": (0,) * 16, "key_dim": 0, "value_dim": 0},
        {"hidden_size": 0, "feed_forward_size": 0, "vocab_size": 0},
        {"hidden_size": 1, "feed_forward_size": 0, "num_recurrent_layers": 16},
        {"num_recurrent_layers": 16, "num_kv_heads": (0,) * 16, "widths": {"ssm.inner_size": 1}},
    ],
)
@pytest.mark.parametrize("architecture", ["llama", "falcon-h1", "qwen3next", "lfm2", "deepseek2"])
def test_odd_shapes_have_a_size(
    llama_1b: ModelSpec, changes: dict[str, Any], architecture: str
) -> None:
    """A header may leave out or hollow any dimension; a million cells are still a quick sum."""
    spec = msgspec.structs.replace(llama_1b, architecture=architecture, kv_layers=(), **changes)
    found = llamacpp_compute_bytes(
        spec, kv_tokens=2**20, max_sequences=3, kv_type_k="f16", kv_type_v="f16",
        micro_batch_tokens=512, flash_attention=True,
    )  # fmt: skip
    assert 0 <= found.touched <= found.reserved
    assert found.output == 12 * spec.vocab_size


def test_a_block_is_free_after_its_last_reader() -> None:
    """A chain of operations that cannot work in place needs two blocks, however long it is."""
    graph = Graph()
    tensor = graph.input(1024)
    for _ in range(10):
        tensor = graph.op((1024,), tensor)
    graph.expand(tensor)
    assert allocate(graph).buffer_bytes == 2 * 4096


def test_a_tensor_without_values_takes_and_gives_nothing() -> None:
    """An empty result, as of a width of 0, may lie beyond all that is in use when it is freed."""
    graph = Graph()
    rows = graph.input(8)
    empty = graph.op((0,), graph.op((1024,), rows))
    graph.expand(graph.op((8,), empty, rows))
    assert allocate(graph).buffer_bytes == 32 + 4096


def test_an_operation_in_place_takes_its_operand() -> None:
    """It needs no block of its own, unless the operand has another reader or is a view."""
    for keep, num_blocks in (("nothing", 1), ("reader", 2), ("view", 2)):
        graph = Graph()
        first = graph.input(1024)
        source = graph.view(first, 32, 32) if keep == "view" else first
        changed = graph.change(source)
        graph.expand(graph.op((1,), changed, first) if keep == "reader" else changed)
        assert allocate(graph).buffer_bytes // 4096 == num_blocks, keep


def test_a_view_keeps_its_root_alive() -> None:
    """The root's block is not given away while a view of it is still to be read."""
    graph = Graph()
    root = graph.op((1024,), graph.input(8))
    view = graph.view(root, 512)
    other = graph.op((1024,), root)
    graph.expand(view)
    graph.expand(other)
    graph.expand(graph.op((1024,), other, view))
    allocate(graph)
    blocks = [node.offset for node in graph.nodes if node.root is None]
    assert len(set(blocks)) == 3


def test_the_smallest_hole_that_fits_is_taken() -> None:
    """A small tensor does not break up a large hole while a small one is free."""
    graph = Graph()
    large, wall, small, end = (graph.op((size,), graph.input(8)) for size in (4096, 64, 512, 64))
    for tensor in (large, wall, small, end):
        graph.expand(tensor)
    graph.expand(graph.op((8,), large, small))
    late = graph.op((512,), wall)
    graph.expand(late)
    graph.expand(graph.op((8,), end, late))
    allocate(graph)
    assert late.offset == small.offset


def test_inputs_that_nobody_fills_are_not_touched() -> None:
    """They take room in the buffer, and no memory."""
    graph = Graph()
    unused = graph.input(1024, is_written=False)
    graph.expand(unused)
    graph.expand(graph.op((1024,), graph.input(1024)))
    assert allocate(graph) == (3 * 4096, 3 * 4096)
    assert touched_bytes(graph) == 2 * 4096
