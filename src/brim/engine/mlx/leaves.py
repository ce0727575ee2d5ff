"""What can be done with one layer's cache, of whatever kind: ours, mlx-lm's, or unknown."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, CacheList

from brim.engine.mlx.kv_cache import LayerKV, QuantisedKV
from brim.engine.mlx.window_kv import ChunkKV, WindowKV
from brim.errors import EngineError


def leaves_of(layers: Sequence[Any]) -> list[Any]:
    """Caches without the lists around them; each once, also where layers share it."""
    found: dict[int, Any] = {}
    for layer in layers:
        parts = leaves_of(layer.caches) if isinstance(layer, CacheList) else [layer]
        found.update((id(part), part) for part in parts if part is not None)
    return list(found.values())


def kind_of(leaf: Any) -> str:
    """A cache's kind in words."""
    if isinstance(leaf, ChunkKV):
        return f"chunks of {leaf.chunk_size} tokens"
    if isinstance(leaf, WindowKV):
        return f"window of {leaf.window_tokens} tokens"
    if isinstance(leaf, QuantisedKV):
        return f"{leaf.bits}-bit keys and values in groups of {leaf.group_size}"
    if isinstance(leaf, LayerKV):
        return "all keys and values"
    if isinstance(leaf, ArraysCache):
        return f"recurrent state of {len(leaf.cache)} arrays"
    return type(leaf).__name__


def arrays_in(state: Any) -> Iterator[mx.array]:
    """Arrays of a nested state of tuples and lists."""
    if isinstance(state, mx.array):
        yield state
    elif isinstance(state, list | tuple):
        for part in state:
            yield from arrays_in(part)


def can_drop(leaf: Any, num_tokens: int) -> bool:
    """Whether a cache can do without its last `num_tokens`."""
    if num_tokens == 0:
        return True
    return isinstance(leaf, LayerKV) and (leaf.empty() or leaf.is_trimmable(num_tokens))


def copy_leaf(leaf: Any, twin: Any, dropped: int) -> None:
    """Make the empty `twin` a copy of `leaf` without its last `dropped` tokens."""
    if not isinstance(leaf, LayerKV):
        return_to(twin, mark_of(leaf))
        return
    if leaf.empty():
        return
    num_tokens = leaf.offset - dropped
    start, end = leaf.rows_at(num_tokens)
    twin.put([part[..., start:end, :] for part in leaf.parts], num_tokens)


def mark_of(leaf: Any) -> Any:
    """What it takes to return to where a cache is now.

    Recurrent layers put new arrays in the place of old ones, so references are enough.  Caches of
    unknown kinds may write into theirs, whose handles are therefore copied.
    """
    if isinstance(leaf, LayerKV):
        return leaf.offset
    if isinstance(leaf, ArraysCache):
        return list(leaf.cache), leaf.left_padding, leaf.lengths
    return copy.deepcopy(vars(leaf))


def return_to(leaf: Any, mark: Any) -> None:
    """Take back what was fed since `mark_of`.

    Raises:
        EngineError: The tokens before have been let go by a window.
    """
    if isinstance(leaf, LayerKV):
        if not leaf.is_trimmable(leaf.offset - mark):
            raise EngineError(f"mlx: a window cannot go back by {leaf.offset - mark} tokens")
        leaf.trim(leaf.offset - mark)
    elif isinstance(leaf, ArraysCache):
        state, leaf.left_padding, leaf.lengths = mark
        leaf.cache = list(state)
    else:
        vars(leaf).update(copy.deepcopy(mark))
