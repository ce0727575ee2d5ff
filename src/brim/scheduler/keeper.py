"""Keeps prefixes on disk: exports what is new of a prompt, at turn boundaries, after it was read.

Each export is short (a copy of memory), counts as step time, and never goes beyond the store's
bounds: the store says no, and the prefix is computed again some day.
"""

import functools
from collections import deque

import msgspec

from brim.core.plan import Plan
from brim.engine.base import Allocate, Engine
from brim.errors import BrimError, Busy
from brim.prefix_cache.store import PrefixCache
from brim.scheduler.pool import Held, Pool
from brim.scheduler.sequence import Prefill

SEGMENT_BYTES = 64 * 1024 * 1024
"""Of one export or import.  An export of so much takes about 40 ms, most of it for pages that the
file's mapping touches first; an import 7 ms, or a fifth of a second from a slow disk.  Several go
one after the other, with steps between."""

LAST_WAIT_S = 0.5
"""For a disk to take what is in flight before sequences go: 256 MiB at 500 MB/s.  Who decodes waits
meanwhile, and memory is short."""

MIN_SEGMENT_TOKENS = 64
"""A system prompt that is shorter is kept with the turn behind it."""


class Export(msgspec.Struct, frozen=True):
    """A part of a sequence that is to be kept."""

    held: Held
    namespace: str
    start: int
    end: int


class Keeper:
    """Decides what of a prompt to keep, and exports it.

    Args:
        engine: The engine.
        plan: Its plan, for the bytes of a token.
        pool: The sequences.
        cache: The store.
        min_tokens: Fewer new tokens wait for more.
    """

    def __init__(
        self, engine: Engine, plan: Plan, pool: Pool, cache: PrefixCache, min_tokens: int
    ) -> None:
        self._engine = engine
        self._pool = pool
        self._cache = cache
        self._min_tokens = min_tokens
        self._takes_ranges = engine.capabilities.can_export_range
        self._token_bytes = max(1, plan.memory.kv_bytes // max(1, plan.kv_tokens))
        self._segment_tokens = max(MIN_SEGMENT_TOKENS, SEGMENT_BYTES // self._token_bytes)
        self._exports: deque[Export] = deque()

    @property
    def has_work(self) -> bool:
        """Whether something waits to be exported."""
        return bool(self._exports)

    def is_waiting(self, held: Held) -> bool:
        """Whether a part of a sequence waits to be exported."""
        return any(export.held is held for export in self._exports)

    def stops(self, prefill: Prefill) -> list[int]:
        """Lengths at which a sequence must pause, because only there can it be kept."""
        if self._takes_ranges:
            return []
        # The last token is always fed, so that a prompt that is sent again begins with the others.
        most = len(prefill.job.usable)
        ends = {min(end, most) for end in prefill.job.request.boundaries or (most,)}
        return sorted(end for end in ends if self._min_tokens <= end)

    def paused(self, prefill: Prefill) -> None:
        """Keep a sequence as a whole, at one of its stops."""
        held, end = prefill.choice.held, prefill.num_done
        if held.namespace is None or self._takes_ranges:
            return
        if self._cache.stored(held.namespace, held.tokens.view()) < end:
            self._export(Export(held, held.namespace, 0, end))

    def finished(self, prefill: Prefill) -> None:
        """Line up what is new of a prompt that was read."""
        job, held = prefill.job, prefill.choice.held
        if held.namespace is None or not self._takes_ranges or not job.request.keeps_on_disk:
            return
        ends = [end for end in job.request.boundaries if end <= prefill.num_done]
        end = ends[-1] if ends else len(job.usable)
        start = self._cache.stored(held.namespace, job.prompt[:end])
        if end - start < self._min_tokens:
            return
        system_end = ends[0] if ends else 0
        while start < end:
            stop = min(end, start + self._segment_tokens)
            if start + MIN_SEGMENT_TOKENS <= system_end < stop:
                stop = system_end
            self._exports.append(Export(held, held.namespace, start, stop))
            start = stop

    def run_one(self) -> None:
        """Export the next part in line, unless the disk has enough to do with earlier ones."""
        export = self._exports[0]
        if self._cache.must_wait((export.end - export.start) * self._token_bytes):
            return
        self._exports.popleft()
        if export.held.is_open and export.held.is_pure:
            self._export(export)

    def run_idle(self) -> None:
        """Export what waits of idle sequences, which are about to go.

        The disk is waited for once, and not for long; what it cannot take then is dropped.
        """
        waiting = [export for export in self._exports if export.held.is_idle]
        self._exports = deque(export for export in self._exports if not export.held.is_idle)
        has_waited = False
        for export in waiting:
            num_bytes = (export.end - export.start) * self._token_bytes
            if self._cache.must_wait(num_bytes) and not has_waited:
                has_waited = True
                self._cache.flush(LAST_WAIT_S)
            if self._cache.must_wait(num_bytes):
                return
            if export.held.is_open and export.held.is_pure:
                self._export(export)

    def _export(self, export: Export) -> None:
        """Export one part; where there is no sequence for it now, it goes back in line."""
        held, is_busy = export.held, False

        def measured(allocate: Allocate, num_bytes: int) -> memoryview:
            # What the store will have in flight is known best from what engines really export.
            self._token_bytes = max(self._token_bytes, num_bytes // (export.end - export.start))
            return allocate(num_bytes)

        def fill(allocate: Allocate) -> object:
            nonlocal is_busy
            for is_retry in (False, True):
                try:
                    return self._engine.export_kv(
                        held.seq_id,
                        export.start,
                        export.end,
                        allocate=functools.partial(measured, allocate),
                    )
                except Busy:
                    # Exporting a part may take a free sequence.
                    is_busy = is_retry or not self._pool.spare_sequence(keep=held)
                    if is_busy:
                        raise
            raise AssertionError("unreachable")

        tokens = held.tokens.view()[: export.end].copy()
        if self._cache.stored(export.namespace, tokens) == export.end:
            return  # another prompt that begins alike was faster
        try:
            is_kept = self._cache.write(export.namespace, tokens, export.start, fill)
        except BrimError:
            is_kept = False
        if is_kept:
            return
        if is_busy and self._pool.num_running > 1:
            self._exports.appendleft(export)
            return
        # What follows builds upon it.
        self._exports = deque(other for other in self._exports if other.held is not held)
