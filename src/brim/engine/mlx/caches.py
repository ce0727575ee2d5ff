"""A sequence's caches: one for each layer, made to the model's own list.

How to step without copying them.  MLX writes into a buffer in place only while nothing else holds
it, and whatever an evaluation reads is held until the evaluation has ended, on the CPU and on Metal
alike.  A pass that is launched (`mx.async_eval`) while an earlier one over the same sequence is
still in flight therefore copies every buffer, at twice the memory: 139 ms a step instead of 5 for
256 MiB of buffers on a CPU.  So a pass may be built ahead at any time, but is launched only when
the one before has ended; then a step copies nothing.  For the same reason nobody keeps `arrays()`,
or slices of them, over a step.
"""

from functools import cached_property
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    ConcatenateKVCache,
    KVCache,
    RotatingKVCache,
    make_prompt_cache,
)

from brim.engine.mlx import cache_state
from brim.engine.mlx.kv_cache import KV_BITS, LayerKV, PlainKV, QuantisedKV, group_size_for
from brim.engine.mlx.leaves import (
    arrays_in,
    can_drop,
    copy_leaf,
    kind_of,
    leaves_of,
    mark_of,
    return_to,
)
from brim.engine.mlx.window_kv import ChunkKV, WindowKV
from brim.errors import EngineError

_PROBE_TOKENS = 16
"""Recurrent layers of all known models look back over fewer tokens, so states have their final
shapes after as many."""


class CacheMaker:
    """Makes the caches of one model's sequences.

    Args:
        model: Of an mlx-lm class; its weights need not be evaluated.
        kv_type: 'f16' for the model's own float type, or a key of KV_BITS.

    Raises:
        EngineError: MLX has no such KV type, or no layer of this model can be stored in it.
    """

    def __init__(self, model: Any, *, kv_type: str) -> None:
        self._model = model
        self._bits = _bits_of(kv_type)
        if self._bits is not None and not self.can_quantise:
            raise EngineError(
                f"mlx: no layer's cache of this model can be stored as {kv_type} "
                f"({', '.join(self.kinds)}); use f16"
            )

    def new(self, max_tokens: int | None = None) -> "SequenceCaches":
        """Caches of an empty sequence, which take memory when the first token is fed.

        Args:
            max_tokens: Most tokens that will be fed; None where that is not known.
        """
        return SequenceCaches(self, max_tokens)

    def layers(self, max_tokens: int | None) -> list[Any]:
        """Empty caches, as the model is called with."""
        return self._layers(max_tokens, self._bits)

    @property
    def kinds(self) -> tuple[str, ...]:
        """What the model's layers keep, in words, each once."""
        return tuple(dict.fromkeys(kind_of(leaf) for leaf in self._plain_leaves))

    @property
    def is_known(self) -> bool:
        """Whether all kinds are understood; others can only grow, be copied whole and dropped."""
        return all(isinstance(leaf, LayerKV | ArraysCache) for leaf in self._plain_leaves)

    @property
    def can_truncate(self) -> bool:
        """Whether any prefix of a sequence can be kept."""
        return all(
            isinstance(leaf, LayerKV) and not isinstance(leaf, WindowKV)
            for leaf in self._plain_leaves
        )

    @property
    def can_fork_prefix(self) -> bool:
        """Whether any prefix of a sequence can be copied."""
        return self.can_truncate

    @property
    def can_quantise(self) -> bool:
        """Whether any layer's cache can be stored in 8 or 4 bits."""
        return self.num_quantised_layers > 0

    @property
    def num_quantised_layers(self) -> int:
        """Layers whose caches a quantised KV type would store in 8 or 4 bits."""
        return len(self._group_sizes)

    @cached_property
    def _plain_leaves(self) -> list[Any]:
        return leaves_of(self._layers(None, None))

    @cached_property
    def _group_sizes(self) -> dict[int, int]:
        """Group size of each leaf that can be quantised, by its number.

        Whether a model's attention takes quantised keys is found out by building its graph with
        them, which computes nothing: latent attention and attention with sinks do not.
        """
        sizes: dict[int, int] = {}
        for number, leaf in enumerate(self._probe(self._layers(None, None), 1)):
            if isinstance(leaf, PlainKV) and not isinstance(leaf, WindowKV) and leaf.parts:
                size = group_size_for(*(part.shape[3] for part in leaf.parts))
                if size is not None:
                    sizes[number] = size
        try:
            self._probe(self._layers(None, max(KV_BITS.values()), sizes), 2)
        except Exception:  # whatever a model class raises on keys that it does not expect
            return {}
        return sizes

    def _probe(self, layers: list[Any], num_tokens: int) -> list[Any]:
        """Leaves after so many tokens, with shapes and types and nothing computed."""
        self._model(mx.zeros((1, num_tokens), mx.int32), cache=layers)
        return leaves_of(layers)

    def expected_leaves(self, num_tokens: int) -> list[Any]:
        """Leaves with the shapes and types that a sequence of `num_tokens` has; not computed."""
        layers = self.layers(None)
        if num_tokens == 0:
            return leaves_of(layers)
        return self._probe(layers, min(num_tokens, _PROBE_TOKENS))

    def _layers(
        self, max_tokens: int | None, bits: int | None, sizes: dict[int, int] | None = None
    ) -> list[Any]:
        """mlx-lm's list for this model with brim's caches in it."""
        if bits is not None and sizes is None:
            sizes = self._group_sizes
        made: dict[int, Any] = {}

        def replaced(cache: Any) -> Any:
            if cache is None:
                return None
            if isinstance(cache, CacheList):
                return CacheList(*(replaced(part) for part in cache.caches))
            if id(cache) not in made:
                size = sizes.get(len(made)) if sizes else None
                made[id(cache)] = _replacement(cache, max_tokens, bits, size)
            return made[id(cache)]

        originals = make_prompt_cache(self._model)
        layers = [replaced(cache) for cache in originals]
        # `replaced` refers to itself, a cycle: what it made would outlive its sequence, until the
        # garbage collector happens to run.
        made.clear()
        return layers


def _bits_of(kv_type: str) -> int | None:
    if kv_type == "f16":
        return None
    if kv_type not in KV_BITS:
        raise EngineError(f"mlx: no KV type {kv_type}; use one of f16, {', '.join(KV_BITS)}")
    return KV_BITS[kv_type]


def _replacement(
    cache: Any, max_tokens: int | None, bits: int | None, group_size: int | None
) -> Any:
    """The cache of ours in place of one of mlx-lm's; the same where there is no better one."""
    # Subclasses may do more than their base, so only the very classes are replaced.
    kind = type(cache)
    if kind in (KVCache, ConcatenateKVCache):
        if bits is not None and group_size is not None:
            return QuantisedKV(bits, group_size, max_tokens)
        return PlainKV(max_tokens)
    if kind is RotatingKVCache and cache.keep == 0:
        return WindowKV(cache.max_size, max_tokens)
    if kind is ChunkedKVCache:
        return ChunkKV(cache.chunk_size, max_tokens)
    return cache


class SequenceCaches:
    """The caches of one sequence.

    Args:
        maker: Of the model's caches.
        max_tokens: Most tokens that will be fed, where that is known.

    Attributes:
        layers: What the model is called with.
        num_tokens: How many tokens were fed; whoever calls the model counts.
    """

    def __init__(self, maker: CacheMaker, max_tokens: int | None) -> None:
        self._maker = maker
        self._max_tokens = max_tokens
        self.num_tokens = 0
        self._clear()

    @property
    def nbytes(self) -> int:
        """Bytes that are taken, whatever they hold."""
        return sum(getattr(leaf, "nbytes", 0) for leaf in self._leaves)

    @property
    def num_cells(self) -> int:
        """Tokens for which memory is taken, by the layers that keep all of them."""
        return max(
            (
                leaf.parts[0].shape[2]
                for leaf in self._leaves
                if isinstance(leaf, LayerKV) and not isinstance(leaf, WindowKV) and leaf.parts
            ),
            default=self.num_tokens,
        )

    def compacted(self) -> "SequenceCaches":
        """A copy, evaluated, that takes memory for what is held and no more until it is fed."""
        copy = self.fork(self.num_tokens, self.num_tokens)
        copy.expect(self._max_tokens)
        return copy

    def arrays(self) -> list[mx.array]:
        """Everything that a step changed, to evaluate."""
        found: list[mx.array] = []
        for leaf in self._leaves:
            if isinstance(leaf, WindowKV):
                leaf.settle()
            found += arrays_in(leaf.state)
        return found

    def can_cut(self, num_tokens: int) -> bool:
        """Whether the first `num_tokens` can be kept or copied."""
        return num_tokens == 0 or all(
            can_drop(leaf, self._num_over(leaf, num_tokens)) for leaf in self._leaves
        )

    def truncate(self, num_tokens: int) -> None:
        """Keep the first `num_tokens`; 0 always works, and starts anew.

        Raises:
            EngineError: The state cannot be cut there; nothing was changed.
        """
        if num_tokens == 0:
            self._clear()
            return
        self._check_cut(num_tokens)
        for leaf in self._leaves:
            if num_over := self._num_over(leaf, num_tokens):
                leaf.trim(num_over)
        self.num_tokens = num_tokens

    def fork(self, num_tokens: int, max_tokens: int | None) -> "SequenceCaches":
        """A copy of the first `num_tokens`, evaluated, with cells for `max_tokens`.

        Raises:
            EngineError: The state cannot be cut there.
        """
        self._check_cut(num_tokens)
        target = SequenceCaches(self._maker, max_tokens)
        if num_tokens == 0:
            return target
        dropped = self.num_tokens - num_tokens
        for leaf, twin in zip(self._leaves, target._leaves, strict=True):
            copy_leaf(leaf, twin, dropped)
        target.num_tokens = num_tokens
        mx.eval(target.arrays())
        return target

    def checkpoint(self) -> object:
        """Where the sequence is, to `roll_back` to after a step; holds no buffers."""
        return self.num_tokens, [mark_of(leaf) for leaf in self._leaves]

    def roll_back(self, checkpoint: object) -> None:
        """Take back what was fed since a `checkpoint`, at most ROLL_BACK_TOKENS tokens."""
        assert isinstance(checkpoint, tuple)
        self.num_tokens, marks = checkpoint
        for leaf, mark in zip(self._leaves, marks, strict=True):
            return_to(leaf, mark)

    def expect(self, max_tokens: int | None) -> None:
        """Be for so many tokens from now on, or for who knows how many.

        A buffer that is smaller grows once, when it is full.
        """
        self._max_tokens = max_tokens
        for leaf in self._leaves:
            if isinstance(leaf, LayerKV):
                leaf.expect(max_tokens)

    def export_size(self, start: int = 0, end: int | None = None) -> int:
        """Bytes that `export_into` writes."""
        return cache_state.size_of(self._leaves, start, self.num_tokens if end is None else end)

    def export_into(self, address: int, size: int, start: int = 0, end: int | None = None) -> int:
        """Write the state of tokens [start, end), and what it is, to memory; the bytes written.

        Only caches that can be cut anywhere can be written in part.

        Raises:
            StoreError: The model keeps state that cannot be written, or `size` is too small.
        """
        end = self.num_tokens if end is None else end
        return cache_state.write(self._leaves, start, end, address, size)

    def import_from(self, state: memoryview, num_tokens: int) -> None:
        """Append what `export_into` wrote of the tokens that follow, up to `num_tokens`.

        Caches that cannot be cut must be empty.

        Raises:
            StoreError: It is damaged, or of another place, model or KV type; the caches hold what
                they held.
        """
        before = self.num_tokens
        expected = self._maker.expected_leaves(num_tokens)
        try:
            cache_state.read(self._leaves, expected, state, before, num_tokens)
        except BaseException:
            self.truncate(before)
            raise
        self.num_tokens = num_tokens

    def _clear(self) -> None:
        self.layers = self._maker.layers(self._max_tokens)
        self._leaves = leaves_of(self.layers)
        self.num_tokens = 0

    def _num_over(self, leaf: Any, num_tokens: int) -> int:
        """Tokens beyond `num_tokens` in one cache; a pass that failed has fed only some of them."""
        num_held = leaf.offset if isinstance(leaf, LayerKV) else self.num_tokens
        return max(0, num_held - num_tokens)

    def _check_cut(self, num_tokens: int) -> None:
        if not self.can_cut(num_tokens):
            kinds = ", ".join(self._maker.kinds)
            raise EngineError(
                f"mlx: {num_tokens} of {self.num_tokens} tokens cannot be kept alone by this "
                f"model's caches ({kinds})"
            )
