"""Every started request ends once, gives back what it reserved, and is told to the meter once."""

import asyncio
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.meters import RecordingMeter
from support.serving import request, toy_plan

from brim.core.answer import Delta, FinishReason, Timings
from brim.core.cache import PrefixStats, StoreStats
from brim.errors import Busy, EngineError, WorkerDied
from brim.ledger.kv import KvAccount
from brim.runtime.answer import StreamedAnswer
from brim.runtime.metering import Metering, WrittenBytes
from brim.runtime.owed import Owed, Running
from brim.runtime.request_counts import RequestCounter
from brim.runtime.worker_process import WorkerProcess
from brim.worker.protocol import Stats

KV_TOKENS = 10
DIED = WorkerDied("it died", retry_after_s=1.0)


class Cancels:
    """As much of a worker as endings need."""

    def cancel(self, ticket: int) -> None:
        pass


class Ledger:
    """An `Owed` with a pool and a meter, and the requests that were given to it."""

    def __init__(self, num_requests: int, *, restarts: bool) -> None:
        self.meter = RecordingMeter()
        self.pool = KvAccount(KV_TOKENS * num_requests)
        self.num_ends = 0
        self.restarts = restarts
        self.counter = RequestCounter()
        self.owed = Owed(
            "toy",
            self.pool,
            self.counter,
            restart=self._restart,
            on_answered=lambda answer, last: None,
            on_end=self._note_end,
        )
        self.answers = [self._start(ticket) for ticket in range(num_requests)]

    def _start(self, ticket: int) -> StreamedAnswer:
        asked = request(num_choices=1 + ticket % 2)
        metered = Metering(self.meter).of(asked)
        metered.enter()
        metered.begin("toy", num_prompt_tokens=3, max_completion_tokens=100, kv_tokens=KV_TOKENS)
        answer = StreamedAnswer(
            ticket,
            num_prompt_tokens=3,
            max_tokens=50,
            num_choices=asked.num_choices,
            plan=toy_plan(),
            on_cancel=self.owed.cancel,
        )
        worker = cast("WorkerProcess", Cancels())
        running = Running(asked, answer, worker, metered, has_begun=False, may_repeat=True)
        self.owed.add(ticket, running, KV_TOKENS)
        return answer

    async def _restart(self, ticket: int, running: Running) -> None:
        if not self.restarts:
            raise EngineError("it is quarantined")

    def _note_end(self) -> None:
        self.num_ends += 1


def last(index: int = 0, num_tokens: int = 2) -> Delta:
    timings = Timings(
        queue_s=0.0,
        prefill_s=0.0,
        decode_s=0.0,
        num_prompt_tokens=3,
        num_cached_tokens=0,
        num_completion_tokens=num_tokens,
    )
    return Delta(index=index, num_tokens=1, finish_reason=FinishReason.STOP, timings=timings)


NUM_REQUESTS = 4

STEPS = st.one_of(
    st.tuples(st.just("delta"), st.integers(0, NUM_REQUESTS - 1), st.integers(0, 1)),
    st.tuples(st.just("last"), st.integers(0, NUM_REQUESTS - 1), st.integers(0, 1)),
    st.tuples(st.just("cancel"), st.integers(0, NUM_REQUESTS - 1), st.just(0)),
    st.tuples(st.just("death"), st.just(0), st.just(0)),
    st.tuples(st.just("short"), st.just(0), st.just(0)),
    st.tuples(st.just("turn"), st.just(0), st.just(0)),
)


def refuse(_: Any) -> None:
    raise Busy("memory is short", retry_after_s=1.0)


async def play(steps: list[tuple[str, int, int]], *, restarts: bool) -> None:
    ledger = Ledger(NUM_REQUESTS, restarts=restarts)
    for kind, number, index in steps:
        if kind == "delta":
            ledger.owed.on_deltas(((number, Delta(index=index, num_tokens=1)),))
        elif kind == "last":
            ledger.owed.on_deltas(((number, last(index)),))
        elif kind == "cancel":
            ledger.answers[number].cancel()
        elif kind == "death":
            ledger.owed.on_death(DIED)
        elif kind == "short":
            ledger.owed.end_waiting(refuse)
        else:
            await asyncio.sleep(0)
    await ledger.owed.drain(0.0, Busy("the server is shutting down", retry_after_s=1.0))
    await ledger.owed.stop()
    assert len(ledger.owed) == 0
    assert ledger.num_ends == len(ledger.meter.ended) == NUM_REQUESTS
    assert ledger.meter.is_settled
    assert ledger.pool.reserved_tokens == 0
    assert sum(ledger.counter.counts().outcomes.values()) == NUM_REQUESTS
    for answer in ledger.answers:
        deltas = [delta async for batch in answer for delta in batch]
        ends = [delta.index for delta in deltas if delta.finish_reason is not None]
        assert sorted(ends) == sorted({*ends})


@settings(max_examples=40, deadline=None)
@given(st.lists(STEPS, max_size=25), st.booleans())
def test_however_requests_end_each_is_told_once(
    steps: list[tuple[str, int, int]], restarts: bool
) -> None:
    """Finished, cancelled, failed, short of memory, its worker dead once or often, drained."""
    asyncio.run(play(steps, restarts=restarts))


@pytest.mark.anyio
async def test_tokens_that_were_held_back_are_charged_and_cancelled_ones_as_far_as_they_came() -> (
    None
):
    """The timings of an ending count; without one, what came does."""
    ledger = Ledger(2, restarts=True)
    ledger.owed.on_deltas(((0, Delta(num_tokens=3)), (0, last(num_tokens=7))))
    ledger.owed.on_deltas(((1, Delta(index=0, num_tokens=4)), (1, Delta(index=1, num_tokens=1))))
    ledger.answers[1].cancel()
    assert sorted(ledger.meter.ended.values()) == [5, 7]


def stats(written: dict[str, int]) -> Stats:
    """Counters of a worker that has written so much for whom."""
    fields = dict.fromkeys(
        ("num_steps", "num_tokens", "num_prompt_tokens", "num_sequences", "num_prepared",
         "num_frames", "engine_cpu_s", "engine_s", "loop_cpu_s", "reader_cpu_s"),
        0,
    )  # fmt: skip
    return Stats(**fields, prefix=PrefixStats(store=StoreStats(written_by_owner=written)))


def test_only_what_is_new_of_running_totals_is_told() -> None:
    """A new worker begins at 0; what is nobody's app is left out."""
    meter, written = RecordingMeter(), WrittenBytes()
    for pid, totals in [
        (1, {"app:mail": 5}),
        (1, {"app:mail": 5, "": 9}),
        (1, {"app:mail": 12}),
        (2, {"app:mail": 40}),
    ]:
        written.note(pid, stats(totals), meter)
    assert meter.written == {"mail": 52}
