"""The scheduling loop: `schedule` builds one step, the engine runs it, `absorb` makes text of it.

Continuous batching by time: each step carries the pending token of every decoding choice, and as
many prompt rows as keep it under the stall target.  No sockets, no threads, and the clock is handed
in; one thread calls everything here.  Every job that was added ends exactly once: each choice with
one delta that has a finish reason, or the whole job by `cancel`, without a word.
"""

import logging
import secrets
import time
from collections.abc import Callable

import msgspec

from brim.chat.stream import TextStream
from brim.core.answer import ErrorInfo, FinishReason
from brim.core.cache import PrefixStats
from brim.core.plan import Plan
from brim.core.stance import WorkLimits
from brim.core.step import Feed, Sampled, StepPlan, StepResult
from brim.engine.base import Engine
from brim.errors import BrimError, Busy, ConfigError, InvalidRequest
from brim.planner.kv import pad_kv_tokens
from brim.prefix_cache.store import PrefixCache
from brim.scheduler.admission import answer_bound, check_choices, check_fits, kv_bound
from brim.scheduler.answers import Deltas, advance, ending, error_deltas
from brim.scheduler.background import Courtesy, is_background
from brim.scheduler.gate import Gate
from brim.scheduler.order import urgency
from brim.scheduler.pace import Depths, StepPace
from brim.scheduler.pool import Pool
from brim.scheduler.reuse import Placement, Reuse
from brim.scheduler.sequence import Choice, Job, Prefill, ScheduledRequest
from brim.scheduler.upkeep import Upkeep

_log = logging.getLogger(__name__)

DEFAULT_STALL_TARGET_S = 0.3
"""A pause that readers of an answer hardly notice."""

MIN_KEPT_ON_DISK = 128
"""Tokens; where no settings say otherwise."""


class Scheduler:
    """Holds every request between `add` and its end, and fills the engine's steps.

    `step` does one round.  A caller that must do something between the parts (the worker reads
    cancellations while the engine runs) calls `schedule`, `absorb` or `fail`, and `take` itself.

    Args:
        engine: A loaded engine that nobody else steps.
        plan: The plan it was loaded with.
        cache: Where prefixes are kept on disk; None keeps none.
        stall_target_s: Longest step while something decodes.
        min_kept_tokens: Shortest prefix that is worth a place on disk.
        clock: Seconds; only differences count.
        draw_seed: A fresh seed for a request that has none.

    Raises:
        ConfigError: The plan's steps are too small for its sequences.
    """

    def __init__(
        self,
        engine: Engine,
        plan: Plan,
        *,
        cache: PrefixCache | None = None,
        stall_target_s: float = DEFAULT_STALL_TARGET_S,
        min_kept_tokens: int = MIN_KEPT_ON_DISK,
        clock: Callable[[], float] = time.monotonic,
        # 31 bits: below every backend's "no seed" value.
        draw_seed: Callable[[], int] = lambda: secrets.randbits(31),
    ) -> None:
        if plan.max_batch_tokens < plan.max_sequences:
            raise ConfigError(
                f"the plan has {plan.max_sequences} sequences but steps of {plan.max_batch_tokens} "
                "rows; every sequence needs a row in each step"
            )
        self._engine = engine
        self._tokenizer = engine.tokenizer
        self._plan = plan
        self._clock = clock
        self._draw_seed = draw_seed
        self._forks_share_kv = engine.capabilities.forks_share_kv
        self._pool = Pool(engine, plan, clock)
        self._gate = Gate(plan, self._pool)
        self._courtesy = Courtesy(plan, self._pool)
        self._pace = StepPace(stall_target_s, plan.max_batch_tokens, engine.capabilities.tile_rows)
        self._reuse = Reuse(
            engine, plan, self._pool, cache, min_tokens=min_kept_tokens, clock=clock
        )
        self._upkeep = Upkeep(engine, plan, self._pool, self._reuse)
        self._jobs: dict[int, Job] = {}
        self._waiting: list[Job] = []
        self._prefilling: list[Prefill] = []
        self._decoding: list[Choice] = []
        self._num_added = 0
        self._num_shifting = 0
        # The step that is under way: prompt chunks, who fed a drawn token, who draws one (in the
        # feeds' order), when it began, and whose sequences go when it is over.
        self._chunks: list[tuple[Prefill, int]] = []
        self._fed: list[Choice] = []
        self._sampling: list[Choice] = []
        self._step_started_s = 0.0
        self._leaving: list[Choice] = []
        self._deltas: Deltas = []

    @property
    def has_work(self) -> bool:
        """Whether a round would get anything further.

        Not for jobs that are held until limits are lifted or the pool grows.
        """
        return (
            len(self._jobs) > len(self._waiting)
            or self._reuse.has_exports
            or any(not self._gate.holds(job) for job in self._waiting)
        )

    @property
    def num_sequences(self) -> int:
        """Engine sequences that requests hold."""
        return self._pool.num_running

    @property
    def num_waiting(self) -> int:
        """Requests without a sequence."""
        return len(self._waiting)

    @property
    def kv_tokens(self) -> int:
        """Cells of the pool."""
        return self._pool.kv_tokens

    @property
    def num_needed_tokens(self) -> int:
        """Cells that running requests hold and were promised."""
        return self._pool.num_needed_cells

    @property
    def num_idle_tokens(self) -> int:
        """Cells that idle sequences hold and no running one needs."""
        return self._pool.num_idle_cells

    def stats(self) -> PrefixStats:
        """What was reused so far."""
        return self._reuse.stats()

    def tickets_in_step(self) -> set[int]:
        """Whose tokens the step that is under way feeds."""
        tickets = {choice.job.request.ticket for choice in self._sampling}
        tickets.update(prefill.job.request.ticket for prefill, _ in self._chunks)
        return tickets

    def set_limits(self, limits: WorkLimits) -> None:
        """Work within these limits from the next step on; what runs goes on."""
        self._gate.limit(limits)
        self._pace.limit(limits.stall_fraction)

    def resize(self, kv_tokens: int) -> int:
        """Give the pool another size; between two steps only.

        Idle sequences go, the least valuable first, until what is left fits.  What of them waits to
        be kept is exported first, as far as the store takes it at once.  Requests that wait and no
        longer fit go on waiting, and hold up nobody.

        Args:
            kv_tokens: Cells that are wanted.  The pool gets no fewer than running requests hold
                and were promised, no more than planned, and a whole number of blocks.

        Returns:
            Cells that the pool has now.

        Raises:
            CapacityError, StoreError: The engine could not.  The pool is as it was, without the
                idle sequences that had to go.
            EngineError: The engine could not, and lost its sequences; nothing can be stepped.
        """
        least = max(1, self._pool.num_needed_cells)
        wanted = min(pad_kv_tokens(max(kv_tokens, least)), self._plan.kv_tokens)
        if wanted < self._pool.kv_tokens:
            self._reuse.export_idle()
        self._pool.resize(wanted)
        return wanted

    def add(self, request: ScheduledRequest) -> None:
        """Accept a request; it waits until a sequence and KV are free for all its choices.

        Raises:
            ContextOverflow: The prompt fills the window, or `max_tokens` is over it.
            InvalidRequest: It has no tokens, too many choices, more KV than the whole pool, or a
                ticket that is in use.
        """
        num_prompt_tokens = len(request.prompt_tokens)
        if num_prompt_tokens == 0:
            raise InvalidRequest("the prompt has no tokens; send some text")
        check_choices(request.num_choices, self._plan)
        if request.ticket in self._jobs:
            raise InvalidRequest(f"ticket {request.ticket} is in use")
        max_tokens = answer_bound(
            num_prompt_tokens,
            request.max_tokens,
            context_tokens=self._plan.context_tokens,
            answer_tokens=request.max_tokens,
            may_outgrow=request.shift_keep_tokens is not None,
        )
        kv_tokens = kv_bound(
            num_prompt_tokens,
            # What outgrows the window never holds more than it.
            min(max_tokens, self._plan.context_tokens - num_prompt_tokens),
            request.num_choices,
            # What may be shifted needs cells of its own for that.
            forks_share_kv=self._forks_share_kv and request.shift_keep_tokens is None,
        )
        check_fits(kv_tokens, self._plan)
        seed = request.sampling.seed
        job = Job(
            request,
            number=self._num_added,
            max_tokens=max_tokens,
            kv_tokens=kv_tokens,
            seed=self._draw_seed() if seed is None else seed,
        )
        job.num_likely_cached = self._reuse.num_in_memory(job)
        self._num_added += 1
        self._num_shifting += request.shift_keep_tokens is not None
        self._jobs[request.ticket] = job
        self._waiting.append(job)

    def cancel(self, ticket: int) -> None:
        """Drop a request and free what it holds; no delta follows.

        An unknown ticket is ignored: the request may have ended while the word was on its way.
        """
        job = self._jobs.get(ticket)
        if job is not None:
            for choice in tuple(job.choices):
                self._leave(choice)
            self._forget(job)

    def step(self) -> Deltas:
        """One round: schedule, run the engine, absorb."""
        plan = self.schedule()
        if plan is not None:
            try:
                result = self._engine.step(plan)
            except BrimError as error:
                self.fail(error)
            else:
                self.absorb(result)
        return self.take()

    def schedule(self) -> StepPlan | None:
        """The next step, or None where there is nothing to feed."""
        started_s = self._clock()
        if self._waiting:
            self._admit(started_s)
        if self._prefilling or self._reuse.has_exports:
            self._move_kv(started_s)
        if self._num_shifting:
            self._make_window()
        self._upkeep.settle(self._pace.row_s)

        now_s = self._clock()
        self._prefilling.sort(key=lambda prefill: self._urgency(prefill, now_s))
        reading = [prefill for prefill in self._prefilling if not prefill.segments]
        has_person = not all(map(self._is_background, reading))
        is_paused = self._courtesy.pauses(has_person)

        # Decode: every choice feeds the token that it drew last, unless it gives way.
        self._fed = [c for c in self._decoding if not (is_paused and is_background(c.job))]
        feeds = [Feed(choice.held.seq_id, (choice.pending,)) for choice in self._fed]
        self._sampling = self._fed.copy()
        self._chunks = []

        if is_paused:
            reading = [prefill for prefill in reading if not self._is_background(prefill)]
        if reading:
            num_decode_cells = sum(len(choice.held.tokens) for choice in self._fed)
            num_rows = self._pace.prefill_rows(
                len(feeds),
                now_s - started_s,
                is_background=not has_person,
                depths=Depths(num_decode_cells, reading[0].num_done),
            )
            self._add_chunks(feeds, reading, num_rows)

        self._step_started_s = now_s
        return StepPlan(feeds) if feeds else None

    def absorb(self, result: StepResult) -> None:
        """Make deltas of what the scheduled step drew.  Choices cancelled meanwhile are skipped."""
        now_s = self._clock()
        num_rows = sum(num_rows for _, num_rows in self._chunks)
        self._pace.observe(len(self._fed), num_rows, now_s - self._step_started_s)
        self._pool.num_rows += len(self._fed) + num_rows
        for choice in self._fed:
            self._pool.feed_one(choice.held, choice.pending)
        for prefill, num_rows in self._chunks:
            self._note_read(prefill, num_rows)
        sampling = self._sampling
        self._end_step()
        for choice, sampled in zip(sampling, result.sampled, strict=True):
            if choice.is_open:
                self._accept(choice, sampled, now_s)

    def fail(self, error: BrimError) -> None:
        """End what was in the scheduled step, because the engine refused or broke it.

        Without KV room the engine has changed nothing, so only the newest request pays for it.
        """
        jobs = {choice.job.number: choice.job for choice in self._sampling}
        jobs.update({prefill.job.number: prefill.job for prefill, _ in self._chunks})
        running = [jobs[number] for number in sorted(jobs) if jobs[number].choices]
        for choice in self._leaving:
            # How much of the step its sequence has taken is not known.
            self._pool.close(choice.held)
        self._leaving = []
        self._end_step()
        if isinstance(error, Busy) and running:
            # Admission promised room for every job, so this is a defect, not a full machine.
            _log.error("step without KV room, ending the newest of %d: %s", len(running), error)
            running = running[-1:]
        for job in running:
            self._end_job(job, error)

    def take(self) -> Deltas:
        """(ticket, delta) pairs since the last call, in order; the caller keeps the list."""
        deltas = self._deltas
        if deltas:
            self._deltas = []
        return deltas

    # --- admission -------------------------------------------------------------------------------

    def _admit(self, now_s: float) -> None:
        """Open sequences for waiting jobs while they fit, the most urgent first.

        A job that does not fit holds up those behind it: passing it would starve it.  One whose
        prefix is being read by another waits for that, and holds up nobody; nor does one that is
        held.  A background job that gives way holds up its own kind, and nobody else.
        """
        if not self._gate.has_place(1):
            return
        row_s = self._pace.row_s
        self._waiting.sort(
            key=lambda job: urgency(job, len(job.prompt) - job.num_likely_cached, now_s, row_s)
        )
        gives_way = False
        for job in self._waiting.copy():
            if self._gate.holds(job):
                continue
            if is_background(job) and (
                gives_way or self._courtesy.holds(job, self._running_jobs())
            ):
                # Smaller ones that passed a large one would keep it from ever being alone.
                gives_way = True
                continue
            if job.awaited is not None and self._is_reading(*job.awaited):
                continue
            if job.blocked_at == self._pool.version or not self._gate.has_place(
                job.request.num_choices
            ):
                return
            placement = self._reuse.place(job)
            num_held = placement.match.num_tokens if placement.match else 0
            if placement.lookup is not None:
                num_held = placement.lookup.num_tokens
            job.num_likely_cached = num_held
            job.awaited = self._reuse.leader(job, self._prefilling, num_held)
            if job.awaited is not None:
                continue
            # What may be shifted needs cells of its own then, whoever holds the others.
            shared = None if job.request.shift_keep_tokens is not None else placement.match
            if not self._pool.has_room(job.request.num_choices, job.kv_tokens, shared):
                job.blocked_at = self._pool.version
                return
            self._waiting.remove(job)
            job.admitted_s = now_s
            try:
                self._open(job, placement)
            except BrimError as error:
                self._refuse(job, error)

    def _running_jobs(self) -> list[Job]:
        """Those that hold sequences."""
        return [job for job in self._jobs.values() if job.choices]

    def _is_reading(self, prefill: Prefill, num_tokens: int) -> bool:
        """Whether a prompt is still on its way to so many tokens."""
        return prefill in self._prefilling and prefill.num_done < num_tokens

    def _rank(self, job: Job, prefill: Prefill, now_s: float) -> tuple[float, int]:
        return urgency(job, prefill.num_remaining, now_s, self._pace.row_s)

    def _open(self, job: Job, placement: Placement) -> None:
        """Give each choice its sequence and queue the prompt to be read."""
        request = job.request
        # The last token that is drawn is never fed.
        bound = min(len(job.prompt) + job.max_tokens, self._plan.context_tokens) - 1
        num_awaited = len(job.prompt) - 1
        for index in range(request.num_choices):
            sampling = msgspec.structs.replace(request.sampling, seed=job.seed + index)
            held = self._pool.open(
                sampling,
                bound,
                job.namespace,
                None if index else placement.match,
                num_awaited=num_awaited if index else 0,
                may_shift=request.shift_keep_tokens is not None,
            )
            stream = TextStream(self._tokenizer, request.stop)
            job.choices.append(Choice(job, index, held, stream))
        prefill = Prefill(job.choices[0], job.choices[1:])
        self._reuse.begin(prefill, placement)
        self._prefilling.append(prefill)
        if prefill.num_remaining == 0:
            self._finish_prefill(prefill)

    # --- rounds ----------------------------------------------------------------------------------

    def _add_chunks(self, feeds: list[Feed], reading: list[Prefill], num_rows_left: int) -> None:
        """Give a step's prompt rows to the most urgent prompts."""
        for prefill in reading:
            end = min(prefill.num_done + num_rows_left, prefill.next_stop())
            num_rows = end - prefill.num_done
            if num_rows == 0:
                break
            num_rows_left -= num_rows
            tokens = prefill.job.prompt[prefill.num_done : end].tolist()
            is_last = end == len(prefill.job.prompt)
            feeds.append(Feed(prefill.choice.held.seq_id, tokens, is_last))
            self._chunks.append((prefill, num_rows))
            if is_last:
                self._sampling.append(prefill.choice)

    def _move_kv(self, started_s: float) -> None:
        """Restore and keep KV between two steps: one piece of each where someone decodes.

        Where nobody does, prompts are restored whole: nothing is held up by it.
        """
        most_s = self._pace.stall_target_s / 2
        for prefill in [prefill for prefill in self._prefilling if prefill.segments]:
            try:
                while prefill.segments:
                    self._reuse.restore_one(prefill)
                    if self._decoding and self._clock() - started_s > most_s:
                        break
            except BrimError as error:
                self._end_job(prefill.job, error)
                continue
            if not prefill.segments and prefill.num_remaining == 0:
                self._finish_prefill(prefill)
            if self._decoding and self._clock() - started_s > most_s:
                return
        if self._reuse.has_exports and self._clock() - started_s <= most_s:
            self._reuse.export_one()

    def _urgency(self, prefill: Prefill, now_s: float) -> tuple[float, int]:
        """As of the most urgent of those who want it read."""
        return min(self._rank(job, prefill, now_s) for job in self._readers(prefill))

    def _is_background(self, prefill: Prefill) -> bool:
        """Whether nobody waits for a prompt to be read."""
        return all(map(is_background, self._readers(prefill)))

    def _readers(self, prefill: Prefill) -> list[Job]:
        """Whose prompt it is, and those who wait for a part of it."""
        followers = [
            job
            for job in self._waiting
            if job.awaited and job.awaited[0] is prefill and prefill.num_done < job.awaited[1]
        ]
        return [prefill.job, *followers]

    def _make_window(self) -> None:
        """Shift sequences that fill the window and whose requests allow it."""
        for choice in self._decoding.copy():
            num_kept = choice.job.request.shift_keep_tokens
            num_tokens = len(choice.held.tokens)
            if num_kept is None or num_tokens < choice.held.bound or not choice.is_open:
                continue
            num_kept = min(num_kept, num_tokens - 2)
            num_dropped = max(1, (num_tokens - num_kept) // 2)
            try:
                self._pool.shift(choice.held, num_kept, num_dropped)
            except BrimError as error:
                self._end_job(choice.job, error)
            else:
                choice.num_shifted_tokens += num_dropped

    def _note_read(self, prefill: Prefill, num_rows: int) -> None:
        """A chunk is in its sequence; the prompt may be complete with it."""
        held, start = prefill.choice.held, prefill.num_done
        if not held.is_open:
            return  # its job was ended for another's sake
        self._pool.feed(held, prefill.job.prompt[start : start + num_rows])
        if not prefill.choice.is_open:
            return
        try:
            self._reuse.paused(prefill)
        except BrimError as error:
            self._end_job(prefill.job, error)
            return
        if prefill.num_remaining == 0:
            self._finish_prefill(prefill)

    def _finish_prefill(self, prefill: Prefill) -> None:
        """The prompt is read: its choice decodes, and so do those that fork it."""
        first, prompt = prefill.choice, prefill.job.prompt
        self._prefilling.remove(prefill)
        self._decoding.append(first)
        self._reuse.finished(prefill)
        if not prefill.followers:
            return
        try:
            for choice in prefill.followers:
                if prefill.num_target:
                    self._pool.fork(first.held, choice.held, prefill.num_target)
                choice.num_cached_tokens = prefill.num_target
        except BrimError as error:
            self._end_job(first.job, error)
            return
        self._decoding += prefill.followers
        for choice in first.job.choices:
            choice.pending = int(prompt[-1])

    def _accept(self, choice: Choice, sampled: Sampled, now_s: float) -> None:
        """Turn one drawn token into text, or into the end of its choice."""
        delta = advance(choice, sampled, self._tokenizer, now_s)
        if delta is None:
            return
        self._deltas.append((choice.job.request.ticket, delta))
        if delta.finish_reason is not None:
            self._leave(choice)
            if not choice.job.choices:
                self._forget(choice.job)

    # --- endings ---------------------------------------------------------------------------------

    def _end_step(self) -> None:
        """Nothing is under way any more: let go of what was cancelled meanwhile."""
        self._sampling, self._fed, self._chunks = [], [], []
        leaving, self._leaving = self._leaving, []
        for choice in leaving:
            self._pool.retire(choice.held)

    def _end_job(self, job: Job, error: BrimError) -> None:
        """End every open choice with the error; what its sequences hold is not to be trusted."""
        now_s, info = self._clock(), ErrorInfo.of(error)
        for choice in tuple(job.choices):
            delta = ending(choice, now_s, FinishReason.ERROR, error=info)
            self._deltas.append((job.request.ticket, delta))
            self._take_out(choice)
            self._pool.close(choice.held)
        self._forget(job)

    def _refuse(self, job: Job, error: BrimError) -> None:
        """End a job whose sequences could not all be opened."""
        for choice in tuple(job.choices):
            self._take_out(choice)
            self._pool.close(choice.held)
        self._forget(job)
        self._deltas += error_deltas(job.request.ticket, job.request.num_choices, error)

    def _leave(self, choice: Choice) -> None:
        """Let a choice's sequence go idle: now, or when the step that feeds it is over."""
        self._take_out(choice)
        if choice in self._fed or any(prefill.choice is choice for prefill, _ in self._chunks):
            self._leaving.append(choice)
        else:
            self._pool.retire(choice.held)

    def _take_out(self, choice: Choice) -> None:
        """Take a choice out of whatever list it stands in."""
        choice.is_open = False
        choice.job.choices.remove(choice)
        if choice in self._decoding:
            self._decoding.remove(choice)
        else:
            self._prefilling = [p for p in self._prefilling if p.choice is not choice]

    def _forget(self, job: Job) -> None:
        """Nothing of a job remains."""
        del self._jobs[job.request.ticket]
        self._num_shifting -= job.request.shift_keep_tokens is not None
        if job.admitted_s is None:
            self._waiting.remove(job)
