"""The scheduler as a state machine: requests come, leave and run in any order, and share prefixes.

Every answer is compared with what a fresh engine makes of its prompt alone: whatever was reused,
restored from disk, forked, waited for or evicted on the way, it must be the same.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.driver import generate
from support.models import plan_for
from support.toy_variants import VARIANTS, PassingToy

from brim.core.answer import Delta, FinishReason
from brim.core.cache import CacheOptions
from brim.core.request import Priority
from brim.core.sampling import SamplingParams
from brim.core.stance import WorkLimits
from brim.engine.byte_tokenizer import ByteTokenizer
from brim.errors import BrimError, DoesNotFit, EngineError
from brim.prefix_cache.store import Model, PrefixCache
from brim.scheduler import upkeep
from brim.scheduler.loop import Scheduler
from brim.scheduler.sequence import ScheduledRequest

MAX_SEQUENCES = 4
KV_TOKENS = 400
MAX_OPEN_REQUESTS = 12
# Every open request may have to be read and decoded before the one that is looked at, a token a
# step at worst; and a step in which one piece is exported feeds nothing.
MAX_STEPS_TO_AN_END = 2 * MAX_OPEN_REQUESTS * KV_TOKENS

DEVICE_GONE = "toy: the device is gone"

BREAKABLE = ["submit", "open", "fork", "truncate", "shift", "export_kv", "import_kv"]
"""Calls of the engine that may fail at any time."""

ENGINES = {**VARIANTS, "passing": PassingToy}

PIECES = [[(17 * number + i * i) % 251 for i in range(20 + 13 * number)] for number in range(4)]
"""Prompts are made of these, so that many begin alike."""


class SchedulerMachine(RuleBasedStateMachine):
    """Adds, cancels, breaks, restarts and steps; the invariants are checked after each."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.cache: PrefixCache | None = None
        self.owed: dict[int, set[int]] = {}
        self.requests: dict[int, ScheduledRequest] = {}
        self.texts: dict[tuple[int, int], str] = {}
        self.next_ticket = 0
        self.limits = WorkLimits()
        self.running_at_limit: set[int] = set()
        self.now_s = 0.0
        # Small enough for the pools here: idle sequences go for their cost all the time.
        self.patches = [
            patch.object(upkeep, "LEAST_CELLS", 8),
            patch.object(upkeep, "PERIOD_ROWS", 1),
        ]
        for each in self.patches:
            each.start()

    @initialize(
        batch_tokens=st.sampled_from([4, 17, 64, 256]),
        variant=st.sampled_from(sorted(ENGINES)),
        max_sequences=st.sampled_from([1, 2, MAX_SEQUENCES]),
        has_cache=st.booleans(),
    )
    def load(self, batch_tokens: int, variant: str, max_sequences: int, has_cache: bool) -> None:
        self.plan = plan_for(
            "toy",
            context_tokens=200,
            kv_tokens=KV_TOKENS,
            max_sequences=max_sequences,
            max_batch_tokens=batch_tokens,
        )
        self.variant, self.has_cache = variant, has_cache
        self.start()

    def start(self) -> None:
        """A new process, as it were: nothing but the directory is left."""
        if self.cache is not None:
            self.cache.close()
        self.engine = ENGINES[self.variant]()
        self.broken: str | None = None
        for name in BREAKABLE:
            setattr(self.engine, name, self.or_fail(name, getattr(self.engine, name)))
        self.can_resize = True
        resize_kv = self.engine.resize_kv

        def resize_or_refuse(num_tokens: int) -> None:
            if not self.can_resize:
                raise DoesNotFit("toy: no memory for another pool")
            resize_kv(num_tokens)

        self.engine.resize_kv = resize_or_refuse  # type: ignore[method-assign]
        self.engine.load(self.plan)
        self.cache = self.open_cache() if self.has_cache else None
        self.scheduler = Scheduler(
            self.engine, self.plan, cache=self.cache, min_kept_tokens=16, clock=self.tick
        )
        self.limits, self.running_at_limit = WorkLimits(), set()

    def or_fail(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The engine's method, which fails the next time when told to, as a backend's may."""

        def method(*arguments: Any, **keywords: Any) -> Any:
            if self.broken == name:
                self.broken = None
                raise EngineError(DEVICE_GONE)
            return call(*arguments, **keywords)

        return method

    def tick(self) -> float:
        self.now_s += 0.001
        return self.now_s

    def open_cache(self) -> PrefixCache:
        capabilities = self.engine.capabilities
        return PrefixCache(
            CacheOptions(
                directory=str(Path(self.directory.name) / "store"),
                budget_bytes=200_000,
                daily_write_bytes=2**40,
                free_disk_floor_bytes=0,
                max_inflight_bytes=2**30,
                min_tokens=16,
            ),
            Model(name="toy", paths=(), identity=self.engine.kv_identity),
            can_cut=capabilities.can_truncate,
            can_export_range=capabilities.can_export_range,
        )

    @precondition(lambda self: len(self.owed) < MAX_OPEN_REQUESTS)
    @rule(
        pieces=st.lists(st.integers(0, 3), min_size=1, max_size=4),
        num_more=st.integers(0, 30),
        max_tokens=st.integers(1, 60) | st.integers(100, 190),
        num_choices=st.integers(1, 3),
        stop=st.sampled_from([(), ("e",), ("ab", " "), ("never!",)]),
        seed=st.integers(0, 2**31),
        namespace=st.sampled_from(["", "", "other"]),
        use_cache=st.sampled_from([True, True, True, False]),
        priority=st.sampled_from(list(Priority)),
        has_boundaries=st.booleans(),
        shift_keep_tokens=st.sampled_from([None, 8]),
    )
    def add(
        self,
        pieces: list[int],
        num_more: int,
        has_boundaries: bool,
        shift_keep_tokens: int | None,
        seed: int,
        num_choices: int,
        **fields: Any,
    ) -> None:
        self.next_ticket += 1
        prompt = [token for piece in pieces for token in PIECES[piece]]
        ends = [sum(len(PIECES[piece]) for piece in pieces[: i + 1]) for i in range(len(pieces))]
        if not self.engine.capabilities.can_shift:
            shift_keep_tokens = None
        request = ScheduledRequest(
            ticket=self.next_ticket,
            prompt_tokens=prompt + [(seed + i) % 256 for i in range(num_more)],
            num_choices=num_choices,
            sampling=SamplingParams(seed=seed, logit_bias=((ByteTokenizer.EOS, 2.0),)),
            boundaries=tuple(ends) if has_boundaries else (),
            turn_starts=(0, *ends[:-1]),
            shift_keep_tokens=shift_keep_tokens,
            arrived_s=self.now_s,
            **fields,
        )
        try:
            self.scheduler.add(request)
        except BrimError:
            return  # refused: nothing is owed
        self.owed[self.next_ticket] = set(range(num_choices))
        self.requests[self.next_ticket] = request

    @precondition(lambda self: self.owed)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.owed)))
        self.scheduler.cancel(ticket)
        del self.owed[ticket]

    @rule(name=st.sampled_from(BREAKABLE))
    def break_engine(self, name: str) -> None:
        self.broken = name

    @rule(kv_tokens=st.integers(0, 2 * KV_TOKENS), can_resize=st.sampled_from([True, True, False]))
    def resize(self, kv_tokens: int, can_resize: bool) -> None:
        """Nothing that runs loses a cell, and a pool that cannot be made changes nothing."""
        scheduler = self.scheduler
        before, needed = scheduler.kv_tokens, scheduler.num_needed_tokens
        running = {held.seq_id for held in scheduler._pool._open.values() if not held.is_idle}
        self.can_resize = can_resize
        try:
            found = scheduler.resize(kv_tokens)
            assert min(max(kv_tokens, needed), KV_TOKENS) <= found <= KV_TOKENS
        except DoesNotFit:
            assert not can_resize
            found = before
        self.can_resize = True
        assert scheduler.kv_tokens == self.engine._num_cells == found
        assert scheduler.num_needed_tokens == needed
        assert running <= scheduler._pool._open.keys()

    @rule(
        stall_fraction=st.sampled_from([0.0, 0.25, 1.0]),
        max_running=st.sampled_from([None, 0, 1, 3]),
        runs_background=st.booleans(),
    )
    def limit(self, **limits: Any) -> None:
        """Whoever runs goes on; `limits_hold` sees who begins."""
        self.limits = WorkLimits(**limits)
        self.scheduler.set_limits(self.limits)
        self.running_at_limit = self.running()

    def running(self) -> set[int]:
        waiting = {job.request.ticket for job in self.scheduler._waiting}
        return self.scheduler._jobs.keys() - waiting

    def lift(self) -> None:
        """Everything may run again."""
        self.limit(stall_fraction=1.0, max_running=None, runs_background=True)
        self.resize(KV_TOKENS, True)

    @precondition(lambda self: self.has_cache)
    @rule()
    def restart(self) -> None:
        """The process is gone with what it owed; the store is not."""
        self.owed.clear()
        if self.cache is not None:
            self.cache.flush()
        self.start()

    @rule(num_steps=st.integers(1, 20))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.take(self.scheduler.step())

    @precondition(lambda self: self.owed)
    @rule(data=st.data())
    def cancel_while_the_engine_runs(self, data: st.DataObject) -> None:
        plan = self.scheduler.schedule()
        result = error = None
        if plan is not None:
            try:
                result = self.engine.step(plan)
            except BrimError as exc:
                error = exc
        self.take(self.scheduler.take())
        if self.owed:
            self.cancel(data)
        if error is not None:
            self.scheduler.fail(error)
        elif result is not None:
            self.scheduler.absorb(result)
        self.take(self.scheduler.take())

    @precondition(lambda self: self.owed)
    @rule(data=st.data())
    def wait_for_one(self, data: st.DataObject) -> None:
        """No starvation: whichever request is picked ends within a bounded number of steps.

        Unless it is held, and then as soon as limits are lifted and the pool has grown.
        """
        ticket = data.draw(st.sampled_from(sorted(self.owed)))
        job = self.scheduler._jobs[ticket]
        if job in self.scheduler._waiting and self.scheduler._gate.holds(job):
            self.take(self.scheduler.step())
            assert ticket in self.owed, "it was held"
            self.lift()
        for _ in range(MAX_STEPS_TO_AN_END):
            if ticket not in self.owed:
                return
            self.take(self.scheduler.step())
        raise AssertionError(f"request {ticket} starves")

    def take(self, deltas: list[tuple[int, Delta]]) -> None:
        for ticket, delta in deltas:
            assert ticket in self.owed, f"a delta for {ticket}, which has ended or was cancelled"
            assert delta.index in self.owed[ticket], f"choice {delta.index} of {ticket} goes on"
            key = (ticket, delta.index)
            self.texts[key] = self.texts.get(key, "") + delta.text
            if delta.finish_reason is not None:
                self.check_end(ticket, delta)
                self.owed[ticket].remove(delta.index)
                if not self.owed[ticket]:
                    del self.owed[ticket]

    def check_end(self, ticket: int, last: Delta) -> None:
        """An answer that came to its end is the one that the prompt alone would have got."""
        assert last.finish_reason is not FinishReason.CANCELLED
        assert (last.error is not None) == (last.finish_reason is FinishReason.ERROR)
        request = self.requests[ticket]
        if last.error is not None:
            assert last.error.message == DEVICE_GONE, "the scheduler promised what it has not"
        if last.error is not None or last.timings is None or last.timings.num_shifted_tokens:
            return
        engine = VARIANTS["sharing"]()
        engine.load(self.plan)
        seed = request.sampling.seed or 0
        sampling = SamplingParams(seed=seed + last.index, logit_bias=((ByteTokenizer.EOS, 2.0),))
        num_tokens = last.timings.num_completion_tokens
        chunk = self.plan.max_batch_tokens
        run = generate(engine, request.prompt_tokens, num_tokens, sampling, chunk=chunk)
        text = engine.tokenizer.decode([t for t in run.tokens if t != ByteTokenizer.EOS])
        told = self.texts[ticket, last.index]
        if last.stop_string is not None:
            text = text[: text.index(last.stop_string)]
        assert told == text, f"choice {last.index} of {ticket} is not what it is alone"

    @invariant()
    def limits_hold(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        pool = self.scheduler._pool
        assert len(pool._open) == len(self.engine._sequences) <= self.plan.max_sequences
        # A sequence that was shifted counts as if it shared nothing.
        assert self.engine._num_used <= pool._cells.num_used <= pool.kv_tokens
        assert pool.kv_tokens == self.engine._num_cells
        if not any(r.shift_keep_tokens is not None for r in self.requests.values()):
            assert self.engine._num_used == pool._cells.num_used
        assert pool._cells.num_used + pool._num_promised <= pool.kv_tokens
        begun = self.running() - self.running_at_limit
        self.running_at_limit |= begun
        for ticket in begun:
            request = self.requests[ticket]
            assert self.limits.runs_background or request.priority is not Priority.BACKGROUND
            most = self.limits.max_running
            others = pool.num_running - request.num_choices
            assert most is None or pool.num_running <= most or others <= 0 or len(begun) > 1
        for held in pool._open.values():
            assert held.tokens.view().tolist() == self.engine._sequences[held.seq_id].tokens
        if not self.owed:
            assert self.scheduler.num_sequences == 0
            assert pool._num_promised == 0

    def teardown(self) -> None:
        """Everything ends, and nothing but idle sequences is left behind."""
        for each in self.patches:
            each.stop()
        if hasattr(self, "scheduler"):
            self.lift()
            for _ in range(MAX_STEPS_TO_AN_END):
                if not self.scheduler.has_work:
                    break
                self.take(self.scheduler.step())
            assert not self.owed
            assert not self.scheduler.has_work
            self.limits_hold()
        if self.cache is not None:
            self.cache.close()
        self.directory.cleanup()


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
