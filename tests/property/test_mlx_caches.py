"""Whatever is done to a sequence's caches, they are what its tokens alone would have made them."""

import ctypes
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

mx = pytest.importorskip("mlx.core")
caches = pytest.importorskip("brim.engine.mlx.caches")
mlx_lm_cache = pytest.importorskip("mlx_lm.models.cache")

WINDOW, WIDTH, MAX_TOKENS = 5, 64, 1500
"""The window's buffer has 320 cells and keeps 20 of them when it is full."""

PIECES = st.sampled_from([1, 1, 2, 9, 63, 300, 321])


class CuttableModel:
    """Stores rows that depend on token and position, as attention layers do."""

    def make_cache(self) -> list[Any]:
        return [mlx_lm_cache.KVCache(), mlx_lm_cache.RotatingKVCache(WINDOW)]

    def __call__(self, tokens: Any, cache: Any) -> list[Any]:
        """Everything that attention would have read."""
        return [part for layer in cache for part in flat(self.stored(tokens, layer))]

    def stored(self, tokens: Any, layer: Any) -> Any:
        places = mx.arange(layer.offset, layer.offset + tokens.shape[1])
        rows = mx.sin(mx.arange(WIDTH) * (tokens[0] + 0.1 * places)[:, None])[None, None]
        return layer.update_and_fetch(rows, rows + 1)


class RecurrentModel(CuttableModel):
    """Has a state beside, that every token changes for good."""

    def make_cache(self) -> list[Any]:
        return [mlx_lm_cache.CacheList(mlx_lm_cache.ArraysCache(1), *super().make_cache())]

    def __call__(self, tokens: Any, cache: Any) -> list[Any]:
        state, *layers = cache[0].caches
        held = mx.array(1, mx.uint32) if state[0] is None else state[0]
        for token in tokens[0].tolist():
            held = held * 31 + token
        state[0] = held
        return [held, *super().__call__(tokens, layers)]


def flat(parts: Any) -> list[Any]:
    """The arrays of nested tuples."""
    return [parts] if isinstance(parts, mx.array) else [one for part in parts for one in flat(part)]


class CachesMachine(RuleBasedStateMachine):
    """One sequence, its tokens, and what may happen to it."""

    @initialize(
        model=st.sampled_from([CuttableModel(), RecurrentModel()]),
        kv_type=st.sampled_from(["f16", "q8_0", "q4_0"]),
        bound=st.sampled_from([None, 100, MAX_TOKENS]),
    )
    def start(self, model: Any, kv_type: str, bound: int | None) -> None:
        self.model = model
        self.maker = caches.CacheMaker(model, kv_type=kv_type)
        self.sequence = self.maker.new(bound)
        self.tokens: list[int] = []
        self.next_token = 0

    def feed(self, sequence: Any, tokens: list[int]) -> list[Any]:
        fetched: list[Any] = self.model(mx.array([tokens]), cache=sequence.layers)
        sequence.num_tokens += len(tokens)
        mx.eval(fetched, sequence.arrays())
        return fetched

    def drawn(self, num_tokens: int) -> list[int]:
        """Tokens that were not there before."""
        self.next_token += num_tokens
        return [7919 * (self.next_token - place) % 997 for place in range(num_tokens)]

    @rule(num_tokens=PIECES)
    def fed(self, num_tokens: int) -> None:
        """A piece reads what it would read in a sequence that was made at once."""
        new = self.drawn(num_tokens)
        fetched = self.feed(self.sequence, new)
        scratch = self.maker.new(None)
        if self.tokens:
            self.feed(scratch, self.tokens)
        wanted = self.feed(scratch, new)
        self.tokens += new
        assert len(fetched) == len(wanted) > 0
        for one, other in zip(fetched, wanted, strict=True):
            assert mx.array_equal(one, other)

    @rule(data=st.data(), is_near=st.booleans())
    def cut(self, data: Any, is_near: bool) -> None:
        """Any prefix that can be kept is; a part of recurrent state never is."""
        end = len(self.tokens)
        kept = data.draw(st.integers(max(0, end - 10) if is_near else 0, end))
        if self.sequence.can_cut(kept):
            self.sequence.truncate(kept)
            del self.tokens[kept:]
        assert self.sequence.num_tokens == len(self.tokens)

    @rule(data=st.data(), bound=st.sampled_from([None, MAX_TOKENS]))
    def forked(self, data: Any, bound: int | None) -> None:
        """Go on with a copy, while the source is fed something else."""
        kept = data.draw(st.integers(0, len(self.tokens)))
        if not self.sequence.can_cut(kept):
            kept = len(self.tokens)
        fork = self.sequence.fork(kept, bound)
        self.feed(self.sequence, [996, 995])
        self.sequence = fork
        del self.tokens[kept:]

    @rule(num_tokens=st.integers(1, 3))
    def went_ahead_in_vain(self, num_tokens: int) -> None:
        """Steps that nobody wanted are taken back."""
        checkpoint = self.sequence.checkpoint()
        for token in self.drawn(num_tokens):
            self.feed(self.sequence, [token])
        self.sequence.roll_back(checkpoint)
        assert self.sequence.num_tokens == len(self.tokens)

    @precondition(lambda self: self.tokens)
    @rule(bound=st.sampled_from([None, 100, MAX_TOKENS]))
    def stored_and_restored(self, bound: int | None) -> None:
        """Go on with what was written to memory."""
        block = bytearray(self.sequence.export_size())
        address = ctypes.addressof(ctypes.c_char.from_buffer(block))
        assert self.sequence.export_into(address, len(block)) == len(block)
        self.sequence = self.maker.new(bound)
        self.sequence.import_from(memoryview(block), len(self.tokens))


CachesMachine.TestCase.settings = settings(max_examples=15, stateful_step_count=12, deadline=None)
TestCaches = CachesMachine.TestCase
