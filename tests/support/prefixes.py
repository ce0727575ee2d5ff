"""Prefix cache stores for tests, and engines that fill them and continue what they restore."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from brim.core.cache import CacheOptions
from brim.core.step import Feed, StepPlan
from brim.engine.base import Engine
from brim.engine.factory import create
from brim.errors import StoreError
from brim.prefix_cache.store import Model, PrefixCache
from support.driver import GREEDY
from support.models import plan_for

TOY_MODEL = Model(name="toy", paths=(), identity="toy")

MIB = 1024 * 1024


class Clock:
    """Seconds since 1970 that pass when a test says so."""

    def __init__(self, now_s: float = 1_800_000_000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


def options_at(directory: Path, **changes: Any) -> CacheOptions:
    """Bounds that nothing small meets, but for those that are given."""
    wide = CacheOptions(
        directory=str(directory),
        budget_bytes=64 * MIB,
        daily_write_bytes=1024 * MIB,
        free_disk_floor_bytes=0,
        max_inflight_bytes=64 * MIB,
        min_tokens=4,
    )
    return msgspec.structs.replace(wide, **changes)


def open_store(
    directory: Path,
    *,
    model: Model = TOY_MODEL,
    can_cut: bool = True,
    can_export_range: bool = True,
    clock: Clock | None = None,
    **changes: Any,
) -> PrefixCache:
    """A store of the toy's entries, with wide bounds."""
    return PrefixCache(
        options_at(directory, **changes),
        model,
        can_cut=can_cut,
        can_export_range=can_export_range,
        clock=clock or Clock(),
    )


def ids(tokens: Sequence[int]) -> NDArray[np.int32]:
    """Tokens as a store takes them."""
    return np.array(tokens, np.int32)


class Filler:
    """An engine that reads prompts, has them kept, and goes on from what was restored."""

    def __init__(self, engine: Engine | None = None) -> None:
        if engine is None:
            engine = create("toy")
            engine.load(plan_for("toy", max_sequences=16))
        self.engine = engine

    def read(self, tokens: Sequence[int]) -> int:
        """A sequence that holds the tokens."""
        seq_id = self.engine.open(GREEDY)
        for start in range(0, len(tokens), 256):
            self.engine.step(StepPlan([Feed(seq_id, tokens[start : start + 256], False)]))
        return seq_id

    def keep(
        self,
        cache: PrefixCache,
        tokens: Sequence[int],
        *,
        start: int | None = None,
        namespace: str = "",
    ) -> bool:
        """Read a prompt and have the store keep what it lacks of it.

        Args:
            cache: The store.
            tokens: The prompt.
            start: Where the segment begins; where the store says that its own end, unless given.
            namespace: Whose it is.
        """
        if start is None:
            start = cache.stored(namespace, ids(tokens))
        seq_id = self.read(tokens)
        try:
            return cache.write(
                namespace,
                ids(tokens),
                start,
                lambda allocate: self.engine.export_kv(seq_id, start, allocate=allocate),
            )
        finally:
            self.engine.close(seq_id)

    def restore(
        self, cache: PrefixCache, tokens: Sequence[int], namespace: str = ""
    ) -> tuple[int, int]:
        """A sequence with what the store has of a prompt, as a scheduler makes it; its length."""
        found = cache.find(namespace, ids(tokens))
        seq_id = self.engine.open(GREEDY)
        for segment in found.segments:
            if self.engine.num_tokens(seq_id) > segment.start:
                self.engine.truncate(seq_id, segment.start)
            if (block := cache.read(segment)) is None:
                return seq_id, self.engine.num_tokens(seq_id)
            try:
                self.engine.import_kv(seq_id, block)
            except StoreError:
                cache.discard(segment)
                return seq_id, self.engine.num_tokens(seq_id)
        if self.engine.num_tokens(seq_id) > found.num_tokens:
            self.engine.truncate(seq_id, found.num_tokens)
        return seq_id, found.num_tokens

    def assert_restores(
        self, cache: PrefixCache, tokens: Sequence[int], namespace: str = ""
    ) -> int:
        """What is restored goes on exactly as if it were read anew; gives its length."""
        seq_id, num_tokens = self.restore(cache, tokens, namespace)
        anew = self.read(tokens[:num_tokens])
        assert np.array_equal(self._next(seq_id), self._next(anew))
        self.engine.close(seq_id)
        self.engine.close(anew)
        return num_tokens

    def _next(self, seq_id: int) -> NDArray[np.float32]:
        self.engine.step(StepPlan([Feed(seq_id, [7])]))
        return np.array(self.engine.logits(seq_id))
