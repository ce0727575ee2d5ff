"""The stand-ins that a machine is calibrated with: one for each thing whose cost is wanted.

Wide ones with a single tensor type for the cost of its bytes, a thin one with many layers for the
cost of a layer, a tiny one for what a layer costs without its bytes, one with a large vocabulary,
and three that are nearly all attention.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import msgspec

from brim.bench.standin import Blueprint, Dimensions, blueprint, write
from brim.core.memory import MemoryTerms
from brim.planner.overhead import WORKER_OVERHEAD_BYTES

Progress = Callable[[str], None]

WIDE_TYPES = ("Q4_K", "Q6_K", "Q8_0", "F16", "Q5_K", "Q4_0")
"""Tensor types of their own stand-in: what the recipes that people download are made of."""

_WIDE = Dimensions(
    architecture="llama", num_layers=3, hidden_size=2048, num_heads=32, num_kv_heads=8,
    head_dim=64, feed_forward_size=6144, vocab_size=4096, context_tokens=8192,
)  # fmt: skip
"""Matrices as large as a 1 B model's; three layers are 80 MB at 4.5 bits."""

_ATTENTION = msgspec.structs.replace(
    _WIDE, num_layers=2, hidden_size=1024, num_heads=16, num_kv_heads=4, feed_forward_size=1024
)

MAX_DEPTH = 4096
"""Tokens that a stand-in's KV is filled with at most."""

COMPUTE_BYTES = 320 * 1024 * 1024
"""Scratch of a micro-batch of 1,024 rows without flash attention at the largest depth, 16 heads."""

THIN, TINY, HEAD = "thin", "tiny", "head"
GROUPED, UNGROUPED, BROAD = "attention-grouped", "attention-ungrouped", "attention-broad"

_OTHERS: dict[str, tuple[Dimensions, str]] = {
    THIN: (
        msgspec.structs.replace(
            _WIDE, num_layers=24, hidden_size=512, num_heads=8, num_kv_heads=4,
            feed_forward_size=1536,
        ),
        "Q8_0",
    ),
    # Nothing but fixed costs: 32 layers of 0.6 MB.
    TINY: (
        msgspec.structs.replace(
            _WIDE, num_layers=32, hidden_size=256, num_heads=4, num_kv_heads=2,
            feed_forward_size=512,
        ),
        "Q8_0",
    ),
    HEAD: (msgspec.structs.replace(_WIDE, num_layers=1, vocab_size=65536, is_tied=True), "Q6_K"),
    # Four query heads share a KV head, as in most models; three times the layers, since the q8_0
    # cells of two layers stay in a cache, where they cost 33 ns a head instead of 44.
    GROUPED: (msgspec.structs.replace(_ATTENTION, num_layers=6), "Q8_0"),
    # As many KV heads as query heads, so that bytes and work come in another proportion, and twice
    # the layers, so that the KV of 4,096 tokens is larger than any cache.
    UNGROUPED: (msgspec.structs.replace(_ATTENTION, num_layers=4, num_kv_heads=16), "Q8_0"),
    # Heads of 128 values, as models of 3 B and more have them.
    BROAD: (msgspec.structs.replace(_ATTENTION, num_kv_heads=8, head_dim=128), "Q8_0"),
}  # fmt: skip


def wide(type_name: str) -> str:
    """The name of a tensor type's stand-in."""
    return f"wide-{type_name.lower()}"


@functools.cache
def blueprints() -> dict[str, Blueprint]:
    """Every stand-in's blueprint by its name."""
    plans = {wide(type_name): (_WIDE, type_name) for type_name in WIDE_TYPES} | _OTHERS
    return {
        name: pure(blueprint(dimensions, "F16"), type_name)
        for name, (dimensions, type_name) in plans.items()
    }


def pure(mixed: Blueprint, type_name: str) -> Blueprint:
    """The same model with every matrix in one type, unlike any recipe: its cost stands alone."""
    tensors = tuple(
        msgspec.structs.replace(tensor, type_name=type_name) if len(tensor.shape) > 1 else tensor
        for tensor in mixed.tensors
    )
    return msgspec.structs.replace(mixed, tensors=tensors)


def needed_bytes() -> int:
    """Disk that all stand-ins take together."""
    return sum(plan.file_bytes for plan in blueprints().values())


def memory_needed() -> MemoryTerms:
    """The most that one of them takes when it is loaded, to be granted before."""
    weights = [plan.weights_bytes for plan in blueprints().values()]
    deepest = _OTHERS[UNGROUPED][0]
    width = 2 * deepest.num_kv_heads * deepest.head_dim
    return MemoryTerms(
        weights_bytes=max(weights),
        # f16 at the largest depth that the suite fills, and as much for its export.
        kv_bytes=2 * deepest.num_layers * width * 2 * MAX_DEPTH,
        compute_bytes=COMPUTE_BYTES,
        overhead_bytes=WORKER_OVERHEAD_BYTES,
        # No engine rearranges the largest, F16; half of it is more than any other's copy.
        repacked_bytes=max(weights) // 2,
    )


def write_all(directory: Path, progress: Progress = lambda _: None) -> dict[str, Path]:
    """Write every stand-in below `directory`; gives the files by name.

    Raises:
        OSError: The disk is full or the place cannot be written.
    """
    paths = {}
    for name, plan in blueprints().items():
        progress(f"making {name}")
        paths[name] = write(directory / f"{name}.gguf", plan)
    return paths
