"""Finds what of a prompt is there already: in live and idle sequences, being read, or on disk."""

from collections.abc import Callable, Iterable

import msgspec

from brim.chat.turns import locate
from brim.core.cache import CacheReport, CacheSource, MissReason, PrefixStats
from brim.core.plan import Plan
from brim.engine.base import Engine
from brim.errors import Busy, DoesNotFit, StoreError
from brim.prefix_cache.store import Lookup, PrefixCache, Segment
from brim.prefix_cache.tree import common_length
from brim.scheduler.keeper import Keeper
from brim.scheduler.pool import Held, Match, Pool
from brim.scheduler.sequence import Job, Prefill

MIN_SHARED_TOKENS = 16
"""Fewer are computed rather than forked or waited for: one tile of a step."""

MIN_RESTORED_TOKENS = 32
"""Fewer are computed rather than fetched from disk: a file costs about a millisecond whatever it
holds, and the fastest GPUs read this many tokens in a few."""

MIN_TOLD_TOKENS = 8
"""Prompts that have less in common share a begin token and a role's name, which says nothing."""


class Placement(msgspec.Struct, frozen=True):
    """Where a prompt is to begin."""

    match: Match | None
    """In memory."""
    lookup: Lookup | None
    """On disk, where that reaches further."""
    report: CacheReport


class Reuse:
    """Looks prompts up, restores them, and has new ones kept.

    Args:
        engine: The engine.
        plan: Its plan.
        pool: The sequences.
        cache: The store; None keeps nothing on disk.
        min_tokens: Shortest prefix that is worth keeping there.
        clock: Seconds.
    """

    def __init__(
        self,
        engine: Engine,
        plan: Plan,
        pool: Pool,
        cache: PrefixCache | None,
        *,
        min_tokens: int,
        clock: Callable[[], float],
    ) -> None:
        self._engine = engine
        self._pool = pool
        self._cache = cache
        self._clock = clock
        self._forks_prefix = engine.capabilities.can_fork_prefix
        self._can_truncate = engine.capabilities.can_truncate
        self._keeper = None if cache is None else Keeper(engine, plan, pool, cache, min_tokens)
        self._counts = _Counts()

    @property
    def has_exports(self) -> bool:
        """Whether something waits to be kept."""
        return self._keeper is not None and self._keeper.has_work

    def stats(self) -> PrefixStats:
        """The counters."""
        counts, pool = self._counts, self._pool
        return PrefixStats(
            num_prompt_tokens=counts.num_prompt_tokens,
            num_memory_tokens=counts.num_tokens[CacheSource.MEMORY],
            num_disk_tokens=counts.num_tokens[CacheSource.DISK],
            num_memory_hits=counts.num_hits[CacheSource.MEMORY],
            num_disk_hits=counts.num_hits[CacheSource.DISK],
            misses=dict(counts.misses),
            num_idle_sequences=pool.num_idle,
            num_idle_tokens=pool.num_idle_cells,
            num_idle_evicted=pool.num_evicted,
            store=None if self._cache is None else self._cache.stats(),
        )

    # --- before a request is admitted ------------------------------------------------------------

    def num_in_memory(self, job: Job) -> int:
        """Prompt tokens that live and idle sequences hold now."""
        if job.namespace is None:
            return 0
        match = self._pool.find(job.namespace, job.usable)
        return match.num_tokens if match else 0

    def place(self, job: Job) -> Placement:
        """The longest prefix of the prompt that is there."""
        if job.namespace is None:
            return Placement(None, None, CacheReport(miss=MissReason.TURNED_OFF))
        usable = job.usable
        found = self._pool.find(job.namespace, usable)
        match = found if found and self._pool.can_begin_with(found) else None
        if match is not None and match.num_tokens < MIN_SHARED_TOKENS:
            match = None
        num_held = match.num_tokens if match else 0
        lookup = None
        if self._cache is not None and len(usable) - num_held >= MIN_RESTORED_TOKENS:
            lookup = self._cache.find(job.namespace, usable, num_held if self._can_truncate else 0)
        report = _report(job, found, lookup, num_held)
        if lookup is None or lookup.num_tokens < num_held + MIN_RESTORED_TOKENS:
            return Placement(match, None, report)
        # What comes from disk replaces what is held behind its start.
        return Placement(_shortened(match, lookup.segments[0].start), lookup, report)

    def leader(
        self, job: Job, prefilling: Iterable[Prefill], num_held: int
    ) -> tuple[Prefill, int] | None:
        """Who is reading more of the same prompt than is there yet, so that waiting pays.

        Where a state cannot be cut, it pauses where the prompts part.

        Returns:
            The one that will have most of it, and how many tokens that is.
        """
        if job.namespace is None:
            return None
        best, best_common = None, num_held + MIN_SHARED_TOKENS - 1
        for prefill in prefilling:
            if prefill.choice.held.namespace != job.namespace:
                continue
            common = common_length(prefill.job.prompt[: prefill.num_target], job.usable)
            if not self._forks_prefix:
                common = _last_stop(prefill, job, common)
            if common > max(best_common, prefill.num_done):
                best, best_common = prefill, common
        if best is None:
            return None
        if not self._forks_prefix:
            best.stops = sorted({*best.stops, best_common})
        return best, best_common

    # --- while it is read ------------------------------------------------------------------------

    def begin(self, prefill: Prefill, placement: Placement) -> None:
        """Note where a prompt begins, what of it comes from disk, and where it must pause."""
        job, num_held = prefill.job, prefill.num_done
        self._counts.num_prompt_tokens += len(job.prompt)
        if placement.lookup is not None:
            prefill.segments.extend(placement.lookup.segments)
            prefill.num_restorable = placement.lookup.num_tokens
        if self._keeper is not None and job.request.keeps_on_disk:
            prefill.stops = self._keeper.stops(prefill)
        elif not self._forks_prefix and job.namespace is not None:
            prefill.stops = [end for end in job.request.boundaries if end <= len(job.usable)]
        source = CacheSource.MEMORY if num_held else CacheSource.NONE
        job.report = msgspec.structs.replace(placement.report, source=source, num_tokens=num_held)
        prefill.choice.num_cached_tokens = num_held
        if not prefill.segments:
            self._counts.add(job.report)

    def restore_one(self, prefill: Prefill) -> None:
        """Import the next segment of a prompt; one that cannot be had ends the restoring.

        Raises:
            BrimError: The engine failed.
        """
        started_s = self._clock()
        held, segment = prefill.choice.held, prefill.segments.popleft()
        if segment.start < len(held.tokens):
            self._pool.truncate(held, segment.start)
        assert self._cache is not None
        block = self._cache.read(segment)
        miss = MissReason.DAMAGED if block is None else self._import(prefill, segment, block)
        if miss is not None or not prefill.segments:
            prefill.segments.clear()
            if prefill.num_done > prefill.num_restorable:
                self._pool.truncate(held, prefill.num_restorable)
        self._note_restored(prefill, miss, self._clock() - started_s)

    def _import(self, prefill: Prefill, segment: Segment, block: memoryview) -> MissReason | None:
        """Append a block to the prompt's sequence; why not, where it was not possible."""
        held = prefill.choice.held
        # The last segment may reach beyond the prompt, and is cut when it is in.
        self._pool.make_room(max(0, segment.end - held.bound))
        try:
            try:
                self._engine.import_kv(held.seq_id, block)
            except Busy:
                # Appending may take a free sequence.
                self._pool.spare_sequence(keep=held)
                self._engine.import_kv(held.seq_id, block)
        except StoreError:
            if self._cache is not None:
                self._cache.discard(segment)
            return MissReason.DAMAGED
        except (Busy, DoesNotFit):
            prefill.segments.clear()
        else:
            self._pool.feed(held, segment.tokens)
        return None

    def _note_restored(self, prefill: Prefill, miss: MissReason | None, spent_s: float) -> None:
        report, num_done = prefill.job.report, prefill.num_done
        source = report.source
        if num_done > report.num_tokens:
            source = CacheSource.DISK
        elif num_done == 0:
            source = CacheSource.NONE
        prefill.job.report = msgspec.structs.replace(
            report,
            source=source,
            num_tokens=num_done,
            miss=miss or report.miss,
            restore_s=report.restore_s + spent_s,
        )
        prefill.choice.num_cached_tokens = num_done
        if not prefill.segments:
            self._counts.add(prefill.job.report)

    def paused(self, prefill: Prefill) -> None:
        """A chunk ended: keep the state where it cannot be cut later.

        Raises:
            BrimError: The engine failed.
        """
        if prefill.num_done not in prefill.stops:
            return
        if self._keeper is not None and prefill.job.request.keeps_on_disk:
            self._keeper.paused(prefill)
        else:
            self._pool.checkpoint(prefill.choice.held)

    def finished(self, prefill: Prefill) -> None:
        """A prompt was read: have what is new of it kept."""
        if self._keeper is not None:
            self._keeper.finished(prefill)

    def num_on_disk(self, held: Held) -> int:
        """Tokens at the beginning of a sequence that are kept on disk."""
        if self._cache is None or held.namespace is None:
            return 0
        return self._cache.stored(held.namespace, held.tokens.view())

    def is_waiting(self, held: Held) -> bool:
        """Whether a part of a sequence is still to be kept."""
        return self._keeper is not None and self._keeper.is_waiting(held)

    def export_one(self) -> None:
        """Keep the next part in line."""
        if self._keeper is not None:
            self._keeper.run_one()

    def export_idle(self) -> None:
        """Keep what waits of idle sequences, as far as the store takes it now."""
        if self._keeper is not None:
            self._keeper.run_idle()


class _Counts:
    """What `PrefixStats` is made of."""

    def __init__(self) -> None:
        self.num_prompt_tokens = 0
        self.num_tokens = dict.fromkeys(CacheSource, 0)
        self.num_hits = dict.fromkeys(CacheSource, 0)
        self.misses: dict[str, int] = {}

    def add(self, report: CacheReport) -> None:
        self.num_tokens[report.source] += report.num_tokens
        self.num_hits[report.source] += 1
        if report.miss is not None:
            self.misses[report.miss] = self.misses.get(report.miss, 0) + 1


def _report(job: Job, found: Match | None, lookup: Lookup | None, num_held: int) -> CacheReport:
    """Why no more of a prompt is there than is there."""
    num_in_memory = found.num_common if found else 0
    num_on_disk = 0
    if lookup is not None:
        diverges = lookup.miss is MissReason.DIVERGES
        num_on_disk = lookup.diverges_at if diverges else lookup.num_tokens
    if max(num_held, num_on_disk) >= len(job.usable):
        return CacheReport()
    if found is not None and num_in_memory >= max(num_on_disk, MIN_TOLD_TOKENS):
        if num_in_memory == len(found.held.tokens):
            return CacheReport()  # all of it is here, and the rest of the prompt is new
        return _diverging(job, num_in_memory)
    if lookup is None or lookup.miss in (None, MissReason.NO_ENTRY):
        # What there is ends, and the rest of the prompt is new.
        return CacheReport(miss=None if num_on_disk or num_held else MissReason.NO_ENTRY)
    if lookup.miss is MissReason.DIVERGES:
        return _diverging(job, lookup.diverges_at)
    return CacheReport(miss=lookup.miss)


def _shortened(match: Match | None, num_tokens: int) -> Match | None:
    if match is None or num_tokens < MIN_SHARED_TOKENS:
        return None
    return Match(match.held, min(match.num_tokens, num_tokens), match.num_common)


def _diverging(job: Job, position: int) -> CacheReport:
    token, turn = locate(position, job.request.turn_starts)
    return CacheReport(miss=MissReason.DIVERGES, diverges_at_token=token, diverges_in_turn=turn)


def _last_stop(prefill: Prefill, job: Job, num_common: int) -> int:
    """The longest prefix that two prompts share and at whose end a turn ends."""
    ends = (*prefill.job.request.boundaries, *job.request.boundaries)
    return max((end for end in ends if end <= num_common), default=0)
