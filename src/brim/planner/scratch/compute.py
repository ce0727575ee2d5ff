"""Scratch memory of llama.cpp: what it reserves for its largest micro-batch, and what it uses."""

from functools import lru_cache
from typing import NamedTuple

from brim.core.model import ModelSpec
from brim.planner.kv import is_latent, is_quantised, kv_layers, pad_kv_tokens, window_cells
from brim.planner.scratch.architectures import graph_model
from brim.planner.scratch.graph import ROTATION_WIDTH, build
from brim.planner.scratch.layers import Batch, GraphModel
from brim.planner.scratch.liveness import allocate, touched_bytes


class ComputeBytes(NamedTuple):
    """Bytes of the backend's own scratch buffers."""

    reserved: int
    """The compute buffer: the high-water mark of the largest graph."""
    touched: int
    """What of it a full micro-batch over a full pool writes."""
    output: int
    """Logits on their way to the sampler."""


class GraphBytes(NamedTuple):
    """Bytes of the tensors of one graph."""

    reserved: int
    """Of llama.cpp's buffer for it, with the holes that its allocator leaves."""
    touched: int
    live: int
    """The most that is needed at once, wherever it lies."""


def llamacpp_compute_bytes(
    spec: ModelSpec,
    *,
    kv_tokens: int,
    max_sequences: int,
    kv_type_k: str,
    kv_type_v: str,
    micro_batch_tokens: int,
    flash_attention: bool,
    full_windows: bool = True,
    on_gpu: bool = False,
) -> ComputeBytes:
    """Compute and output buffers of llama.cpp, as its log says them.

    Exact to the resolution of that log for the architectures that `architectures` knows; a model
    of another one is taken for the usual transformer.  With a GPU the embedding and the step's
    inputs stand in a second buffer, on the CPU's side.

    Source: compared with llama.cpp's dry run by the integration tests; the second buffer is as
    llama.cpp's log shows it on Metal.
    """
    kv_tokens = pad_kv_tokens(kv_tokens)
    found = graph_bytes(
        spec,
        kv_tokens=kv_tokens,
        max_sequences=max_sequences,
        kv_type_k=kv_type_k,
        kv_type_v=kv_type_v,
        micro_batch_tokens=micro_batch_tokens,
        flash_attention=flash_attention,
        full_windows=full_windows,
    )
    inputs = 0
    if on_gpu:
        rows = min(kv_tokens, micro_batch_tokens)
        inputs = rows * (8 * spec.hidden_size + kv_tokens * (2 if flash_attention else 4))
    output = 4 * max_sequences * spec.vocab_size
    return ComputeBytes(found.reserved + inputs, found.touched + inputs, output)


def graph_bytes(
    spec: ModelSpec,
    *,
    kv_tokens: int,
    max_sequences: int,
    kv_type_k: str,
    kv_type_v: str,
    micro_batch_tokens: int,
    flash_attention: bool,
    full_windows: bool = True,
) -> GraphBytes:
    """What the largest graph takes over `kv_tokens` cells, a padded pool."""
    num_rows = min(kv_tokens, micro_batch_tokens)
    layers = kv_layers(spec)
    windows = [layer.window_tokens for layer in layers if layer.window_tokens]
    is_rotated = not is_latent(spec)
    batch = Batch(
        # Every sequence has as many rows in the graph that is reserved.
        num_rows=-(-num_rows // max_sequences) * max_sequences,
        num_outputs=min(max_sequences, num_rows),
        num_cells=kv_tokens,
        num_window_cells=window_cells(
            max(windows, default=None),
            kv_tokens=kv_tokens,
            max_sequences=max_sequences,
            micro_batch_tokens=micro_batch_tokens,
            full_windows=full_windows,
        ),
        num_sequences=max_sequences,
        flash_attention=flash_attention,
        rotate_k=is_rotated and _rotates(kv_type_k, spec.key_dim),
        rotate_v=is_rotated and _rotates(kv_type_v, spec.value_dim),
    )
    return _graph_bytes(graph_model(spec), batch)


def _rotates(kv_type: str, head_dim: int) -> bool:
    return is_quantised(kv_type) and head_dim > 0 and head_dim % ROTATION_WIDTH == 0


@lru_cache(maxsize=256)
def _graph_bytes(model: GraphModel, batch: Batch) -> GraphBytes:
    """A plan asks for the same sizes several times."""
    graph = build(model, batch)
    room = allocate(graph)
    return GraphBytes(room.buffer_bytes, touched_bytes(graph), room.live_bytes)
