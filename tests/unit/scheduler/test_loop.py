"""The scheduling loop over the teaching engine: what is fed, and how every choice ends."""

import math
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from brim.core.answer import FinishReason
from brim.core.request import Priority
from brim.core.sampling import SamplingParams
from brim.core.step import StepPlan
from brim.engine.byte_tokenizer import ByteTokenizer
from brim.engine.toy import ToyEngine
from brim.errors import Busy, ConfigError, ContextOverflow, EngineError, InvalidRequest

ENDLESS = SamplingParams(temperature=0.0, ignore_eos=True)

Bench = Any
MakeBench = Callable[..., Any]


class FailingEngine(ToyEngine):
    """Refuses steps with the error that it is given."""

    failure: Exception | None = None

    def submit(self, plan: StepPlan) -> None:
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        super().submit(plan)


class CopyingEngine(ToyEngine):
    """As a model with recurrent state: a fork is a copy, and of the whole sequence."""

    capabilities = msgspec.structs.replace(
        ToyEngine.capabilities, can_fork_prefix=False, forks_share_kv=False
    )

    def fork(self, source: int, target: int, num_tokens: int) -> None:
        if num_tokens != self.num_tokens(source):
            raise EngineError("this state cannot be cut")
        self._append(self._sequences[target], self._sequences[source].tokens)


def test_a_request_becomes_the_text_that_the_engine_makes_alone(bench: Bench) -> None:
    """Nothing is lost or added between prompt, engine and text."""
    prompt = bench.add(1, 150, max_tokens=60)
    bench.run()
    assert bench.text(1) == bench.alone(prompt, 60, ENDLESS)
    assert bench.last(1).finish_reason is FinishReason.LENGTH


def test_requests_together_get_what_each_gets_alone(bench: Bench) -> None:
    """Batching, chunking and queueing (12 requests, 9 sequences) change no text."""
    prompts = {ticket: bench.add(ticket, 11 * ticket, max_tokens=30) for ticket in range(1, 13)}
    bench.run()
    for ticket, prompt in prompts.items():
        assert bench.text(ticket) == bench.alone(prompt, 30, ENDLESS)


def test_an_end_token_stops_and_is_not_text(bench: Bench) -> None:
    """The end token counts as produced, has no text, and frees the sequence."""
    sampling = SamplingParams(temperature=0.0, logit_bias=((ByteTokenizer.EOS, 4.0),))
    prompt = bench.add(1, max_tokens=400, sampling=sampling)
    bench.run()
    expected = bench.alone(prompt, 400, sampling)
    assert 0 < len(expected) < 400, "the toy model ends too early or never; change the bias"
    assert bench.text(1) == expected
    assert bench.last(1).finish_reason is FinishReason.STOP
    assert bench.last(1).timings.num_completion_tokens == len(expected) + 1
    assert bench.last(1).stop_string is None


def test_a_stop_string_ends_before_itself(bench: Bench) -> None:
    """The text ends where the stop string begins, and the delta names it."""
    prompt = bench.add(1, max_tokens=60)
    bench.run()
    whole = bench.text(1)
    stop = whole[20:24]
    bench.scheduler.add(request(2, prompt, max_tokens=60, stop=(stop,)))
    bench.run()
    assert bench.text(2) == whole[: whole.index(stop)]
    assert bench.last(2).finish_reason is FinishReason.STOP
    assert bench.last(2).stop_string == stop


def test_held_back_text_comes_with_the_end(bench: Bench) -> None:
    """The beginning of a stop string that never completes is text after all."""
    prompt = bench.add(1, max_tokens=30)
    bench.run()
    whole = bench.text(1)
    bench.scheduler.add(request(2, prompt, max_tokens=30, stop=(whole[-5:] + "!",)))
    bench.run()
    assert bench.text(2) == whole
    assert bench.last(2).text == whole[-5:]
    assert bench.last(2).num_tokens == 5


def test_token_counts_of_deltas_add_up(bench: Bench) -> None:
    """The sum over a choice's deltas is what its timings say."""
    bench.add(1, max_tokens=40, stop=("zzzzzz",))
    bench.run()
    total = sum(delta.num_tokens for delta in bench.deltas[1, 0])
    assert total == bench.last(1).timings.num_completion_tokens == 40


def test_one_token_of_a_full_window_is_still_answered(bench: Bench) -> None:
    """A prompt one token short of the window gets one token, and ends by length."""
    bench.add(1, bench.plan.context_tokens - 1, max_tokens=1)
    bench.run()
    assert bench.last(1).finish_reason is FinishReason.LENGTH
    assert bench.last(1).timings.num_completion_tokens == 1


def test_an_idle_machine_reads_a_prompt_in_large_chunks(make_bench: MakeBench) -> None:
    """Where nothing decodes a step takes 512 prompt rows, or what the plan allows."""
    bench = make_bench(max_batch_tokens=600, context_tokens=2048)
    bench.add(1, 1100)
    assert [bench.rows() for _ in range(3)] == [[512], [512], [76]]
    small = make_bench(max_batch_tokens=256)
    small.add(1, 300)
    assert [small.rows() for _ in range(2)] == [[256], [44]]


def test_a_decoding_choice_never_waits_for_a_whole_prompt(bench: Bench) -> None:
    """While something decodes, a step takes the tiles that come nearest to the stall target.

    Here 48 rows take 0.28 s, 64 would take 0.37, and the target is 0.3.
    """
    bench.add(1, 20, max_tokens=50)
    for _ in range(3):
        bench.step()
    bench.add(2, 150)
    assert [bench.rows() for _ in range(4)] == [[1, 47], [1, 47], [1, 47], [1, 9]]


def test_many_decoding_choices_leave_a_prompt_at_least_a_tile(make_bench: MakeBench) -> None:
    """With 60 rows taken by decoding, whole tiles are still left for the prompt."""
    bench = make_bench(max_sequences=64)
    bench.add(1, 2, max_tokens=20, num_choices=60)
    bench.step()
    bench.add(2, 100)
    assert bench.rows() == [1] * 60 + [20]


def test_short_prompts_share_a_step(bench: Bench) -> None:
    """Rows that one prompt leaves are filled with the next."""
    for ticket in (1, 2, 3):
        bench.add(ticket, 30)
    assert bench.rows() == [30, 30, 30]


def test_the_shortest_remaining_prompt_is_read_first(bench: Bench) -> None:
    """A question overtakes a document that is being read."""
    bench.add(1, 10, max_tokens=100)
    bench.step()
    bench.add(2, 400)
    bench.step()
    bench.add(3, 30)
    feeds = bench.scheduler.schedule().feeds
    assert [len(feed.tokens) for feed in feeds] == [1, 30, 17]
    assert list(feeds[1].tokens)[:2] == [21, 24], "the short prompt stands first"


def test_a_long_prompt_is_not_starved_by_short_ones(bench: Bench) -> None:
    """Ageing lets a document through however many questions follow it."""
    bench.add(1, 10, max_tokens=400)
    bench.step()
    bench.add(2, 300, max_tokens=1)
    for ticket in range(3, 43):
        bench.add(ticket, 63, max_tokens=1)
        bench.step()
        if (2, 0) in bench.deltas:
            break
    assert ticket < 20


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_a_background_prompt_is_as_urgent_as_who_waits_for_it(
    make_bench: MakeBench, is_cancelled: bool
) -> None:
    """It is read before another while an interactive request waits for it, and no longer."""
    bench = make_bench(max_batch_tokens=64, context_tokens=1024, kv_tokens=4096)
    shared = bench.add(1, 600, priority=Priority.BACKGROUND)
    bench.step()
    bench.scheduler.add(request(2, [*shared[:-1], 1, 2], max_tokens=5))
    bench.add(3, 700)
    bench.step()
    if is_cancelled:
        bench.scheduler.cancel(2)
    plan = bench.scheduler.schedule()
    first = 3 if is_cancelled else 1
    assert bench.scheduler._chunks[0][0].job.request.ticket == first
    bench.run_step(plan)
    bench.run()


def test_a_job_that_does_not_fit_yet_is_not_overtaken(make_bench: MakeBench) -> None:
    """Whoever is next waits for its room, and those behind it wait with it."""
    bench = make_bench(kv_tokens=200)
    bench.add(1, 100, max_tokens=50)
    bench.add(2, 100, max_tokens=50)
    bench.add(3, 10, max_tokens=5, priority=Priority.BACKGROUND)
    bench.step()
    while (1, 0) not in bench.deltas or bench.last(1).finish_reason is None:
        assert bench.scheduler.num_sequences == 1
        bench.step()
    bench.run()
    assert set(bench.deltas) == {(1, 0), (2, 0), (3, 0)}


def test_choices_read_the_prompt_once(bench: Bench) -> None:
    """With three choices all but the last prompt token are read once and then forked."""
    bench.add(1, 100, num_choices=3)
    assert bench.rows() == [99]
    assert bench.rows() == [1, 1, 1]
    bench.run()
    assert [bench.last(1, i).timings.num_cached_tokens for i in range(3)] == [0, 99, 99]


@pytest.mark.parametrize("engine_type", [ToyEngine, CopyingEngine])
def test_choice_i_is_what_seed_plus_i_gives_alone(
    make_bench: MakeBench, engine_type: type[ToyEngine]
) -> None:
    """Each choice draws its own first token, forked or not, and reports its seed."""
    bench = make_bench(engine_type())
    sampling = SamplingParams(seed=7, ignore_eos=True)
    prompt = bench.add(1, 40, max_tokens=25, num_choices=4, sampling=sampling)
    bench.run()
    for index in range(4):
        seeded = msgspec.structs.replace(sampling, seed=7 + index)
        assert bench.text(1, index) == bench.alone(prompt, 25, seeded)
        assert bench.last(1, index).timings.seed == 7 + index
    assert len({bench.text(1, index) for index in range(4)}) == 4


def test_choices_of_a_prompt_of_one_token_need_no_fork(bench: Bench) -> None:
    """There is nothing to share before the last prompt token."""
    bench.add(1, 1, num_choices=2)
    assert bench.rows() == [1, 1]
    bench.run()
    assert bench.last(1, 1).timings.num_cached_tokens == 0


def test_a_fresh_seed_is_reported_and_repeats_the_answer(bench: Bench) -> None:
    """A request without a seed can be repeated with the one that its timings name."""
    prompt = bench.add(1, max_tokens=30, sampling=SamplingParams(ignore_eos=True))
    bench.run()
    assert bench.last(1).timings.seed == 1234
    seeded = SamplingParams(ignore_eos=True, seed=1234)
    assert bench.text(1) == bench.alone(prompt, 30, seeded)


def test_logprobs_come_with_their_tokens(bench: Bench) -> None:
    """Each produced token has a logprob and the alternatives that were asked for."""
    sampling = msgspec.structs.replace(ENDLESS, num_logprobs=3)
    bench.add(1, max_tokens=10, sampling=sampling)
    bench.run()
    logprobs = [entry for delta in bench.deltas[1, 0] for entry in delta.logprobs]
    assert b"".join(entry.piece for entry in logprobs).decode() == bench.text(1)
    assert all(len(entry.top) == 3 and entry.logprob <= 0 for entry in logprobs)
    assert all(entry.top[0][0] == entry.token_id for entry in logprobs), "greedy takes the first"


def test_times_are_taken_from_the_clock(bench: Bench) -> None:
    """Queue, prefill and decode times are the clock's, in this order."""
    bench.now_s = 10.0
    bench.add(1, max_tokens=2, arrived_s=4.0)
    plan = bench.scheduler.schedule()
    bench.now_s = 13.0
    bench.scheduler.absorb(bench.engine.step(plan))
    bench.now_s = 20.0
    bench.run()
    timings = bench.last(1).timings
    assert (timings.queue_s, timings.prefill_s) == (6.0, 3.0)
    assert timings.decode_s == pytest.approx(7.0 + bench.decode_s)
    assert timings.num_prompt_tokens == 20


@pytest.mark.parametrize("num_steps", [0, 1, 3, 8])
def test_a_cancelled_request_says_nothing_more_and_frees_its_place(
    make_bench: MakeBench, num_steps: int
) -> None:
    """Waiting, half read or decoding: afterwards another request has the whole machine."""
    bench = make_bench(kv_tokens=300, max_sequences=2, max_batch_tokens=64)
    bench.add(1, 200, max_tokens=40, num_choices=2)
    for _ in range(num_steps):
        bench.step()
    before = sum(map(len, bench.deltas.values()))
    bench.scheduler.cancel(1)
    assert bench.scheduler.num_sequences == 0
    assert not bench.scheduler.has_work
    bench.add(2, 250, max_tokens=50)
    bench.run()
    assert sum(len(d) for (ticket, _), d in bench.deltas.items() if ticket == 1) == before
    assert bench.last(2).finish_reason is FinishReason.LENGTH


def test_a_cancellation_between_schedule_and_absorb_is_kept(bench: Bench) -> None:
    """What the engine drew for a request that was cancelled meanwhile is dropped."""
    bench.add(1)
    bench.add(2)
    bench.step()
    plan = bench.scheduler.schedule()
    result = bench.engine.step(plan)
    bench.scheduler.cancel(1)
    bench.scheduler.absorb(result)
    assert [ticket for ticket, _ in bench.scheduler.take()] == [2]


def test_cancelling_an_unknown_ticket_does_nothing(bench: Bench) -> None:
    """A cancellation may come after the end."""
    bench.add(1)
    bench.scheduler.cancel(99)
    bench.run()
    assert bench.last(1).finish_reason is FinishReason.LENGTH


def test_a_failed_step_ends_what_was_in_it_and_nothing_else(make_bench: MakeBench) -> None:
    """The requests of the step end with the engine's error; a waiting one is served."""
    engine = FailingEngine()
    bench = make_bench(engine, max_sequences=2)
    bench.add(1)
    bench.add(2, 200)
    bench.add(3)
    engine.failure = EngineError("toy: the device is gone")
    bench.run()
    for ticket in (1, 3):
        last = bench.last(ticket)
        assert last.finish_reason is FinishReason.ERROR
        assert last.error.kind == "EngineError"
        assert last.error.message == "toy: the device is gone"
    assert bench.last(2).finish_reason is FinishReason.LENGTH
    assert bench.scheduler.num_sequences == 0


def test_a_step_without_kv_room_costs_only_the_newest(
    make_bench: MakeBench, caplog: pytest.LogCaptureFixture
) -> None:
    """The engine has changed nothing, so the others go on where they were."""
    engine = FailingEngine()
    bench = make_bench(engine)
    prompts = {ticket: bench.add(ticket, max_tokens=20) for ticket in (1, 2, 3)}
    bench.step()
    engine.failure = Busy("the KV pool is full", retry_after_s=1.0)
    bench.run()
    assert bench.last(3).error.kind == "Busy"
    for ticket in (1, 2):
        assert bench.text(ticket) == bench.alone(prompts[ticket], 20, ENDLESS)
    assert "without KV room" in caplog.text


def test_a_shift_that_fails_ends_each_choice_once(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both choices fill the window in one step: the first to fail ends the second as well."""
    bench = make_bench(context_tokens=100, kv_tokens=400)

    def fail(seq_id: int, num_kept: int, num_dropped: int) -> None:
        raise EngineError("toy: no")

    monkeypatch.setattr(bench.engine, "shift", fail)
    bench.add(1, 80, max_tokens=60, num_choices=2, shift_keep_tokens=8)
    bench.run()
    for index in (0, 1):
        assert bench.last(1, index).error.message == "toy: no"
    assert bench.scheduler.num_sequences == 0


def test_a_sampling_value_that_the_engine_refuses_ends_every_choice(bench: Bench) -> None:
    """The error comes back as it is, once a choice, and no sequence stays open."""
    bench.add(1, num_choices=3, sampling=SamplingParams(top_p=math.nan))
    bench.run()
    assert [bench.last(1, i).error.kind for i in range(3)] == ["InvalidRequest"] * 3
    assert bench.scheduler.num_sequences == 0


def test_a_sequence_that_cannot_be_opened_takes_the_others_with_it(make_bench: MakeBench) -> None:
    """Of three sequences the engine opens two: they are closed, and all three choices end."""

    class Short(ToyEngine):
        def open(self, sampling: SamplingParams, max_tokens: int | None = None) -> int:
            seq_id = super().open(sampling)
            if seq_id == 2:
                super().close(seq_id)
                raise Busy("all sequences are in use", retry_after_s=1.0)
            return seq_id

    bench = make_bench(Short())
    bench.add(1, num_choices=3)
    bench.run()
    assert [bench.last(1, i).error.kind for i in range(3)] == ["Busy"] * 3
    assert bench.scheduler.num_sequences == 0
    bench.add(2, num_choices=2)
    bench.run()
    assert bench.last(2, 1).finish_reason is FinishReason.LENGTH


def test_what_can_never_run_is_refused_at_once(bench: Bench) -> None:
    """Bad requests raise and leave no trace."""
    with pytest.raises(InvalidRequest, match="no tokens"):
        bench.add(1, 0)
    with pytest.raises(InvalidRequest, match="n is 0"):
        bench.add(1, num_choices=0)
    with pytest.raises(InvalidRequest, match="at most 9 choices"):
        bench.add(1, num_choices=10)
    with pytest.raises(ContextOverflow):
        bench.add(1, 500, max_tokens=13)
    with pytest.raises(InvalidRequest):
        bench.add(1, 300, max_tokens=212, num_choices=9)
    assert not bench.scheduler.has_work
    bench.add(1)
    with pytest.raises(InvalidRequest, match="ticket 1 is in use"):
        bench.add(1)


def test_a_plan_with_fewer_rows_than_sequences_is_refused(make_bench: MakeBench) -> None:
    """Every decoding sequence needs a row in each step."""
    with pytest.raises(ConfigError, match="needs a row"):
        make_bench(max_sequences=9, max_batch_tokens=8)


def request(ticket: int, prompt: list[int], **fields: Any) -> Any:
    from brim.scheduler.sequence import ScheduledRequest

    return ScheduledRequest(ticket=ticket, prompt_tokens=prompt, sampling=ENDLESS, **fields)
