"""The gateway over real worker processes: admission, streaming, cancelling, draining."""

import asyncio
import math

import msgspec
import pytest
from conftest import require_engine
from support.meters import RecordingMeter
from support.models import DEMO, plan_for
from support.serving import (
    ENDLESS,
    ask,
    collect,
    endless_plan,
    request,
    serving,
    text_of,
    toy_plan,
    until,
)

from brim.config.tree import ModelSettings, Settings
from brim.core.answer import FinishReason
from brim.core.memory import MemoryTerms
from brim.core.plan import Plan
from brim.core.sampling import SamplingParams
from brim.errors import (
    Busy,
    ConfigError,
    ContextOverflow,
    DoesNotFit,
    InvalidRequest,
    ModelFileError,
    NotFound,
)
from brim.ledger.account import Account
from brim.runtime.api import ModelState

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_blocking")]


@pytest.fixture(params=["toy", "llamacpp"])
def plan(request: pytest.FixtureRequest) -> Plan:
    """Sixteen sequences of a small window, on the teaching engine and on the demo model."""
    require_engine(request.param)
    if request.param == "toy":
        return toy_plan(kv_tokens=8192, max_sequences=16)
    return plan_for("llamacpp", path=DEMO, kv_tokens=4096, max_sequences=16)


@pytest.fixture
def broken_plan() -> Plan:
    """A plan whose file is no model."""
    require_engine("llamacpp")
    plan = plan_for("llamacpp", path=DEMO)
    model = msgspec.structs.replace(plan.model, name="broken", paths=(__file__,))
    return msgspec.structs.replace(plan, model=model)


async def test_sixty_four_requests_at_once_get_what_each_gets_alone(plan: Plan) -> None:
    """Each ends once, with the text that it has when nothing else runs."""
    name, prompts = plan.model.name, [f"def function_{i}(items):" for i in range(8)]
    async with serving(plan) as gateway:

        async def answer(prompt: str) -> str:
            return await ask(gateway, request(prompt=prompt, model=name, max_tokens=24))

        alone = {prompt: await answer(prompt) for prompt in prompts}
        asked = prompts * 8
        texts = await asyncio.gather(*map(answer, asked))
        assert gateway.models()[0].num_running == 0
    assert [alone[prompt] for prompt in asked] == texts


async def test_a_chat_request_is_answered_to_its_bound() -> None:
    """Template, tokens, steps, text and timings of one request."""
    async with serving() as gateway:
        answer = await gateway.submit(request("hello", max_tokens=30))
        choices = await collect(answer)
        assert answer.plan is gateway.models()[0].plan
    last = choices[0][-1]
    assert answer.max_tokens == 30
    assert last.finish_reason is FinishReason.LENGTH
    assert len(text_of(choices[0])) == 30
    assert last.timings is not None
    assert last.timings.num_completion_tokens == 30
    assert last.timings.num_prompt_tokens == answer.num_prompt_tokens == 24


async def test_choices_of_one_request_differ_and_repeat_alone() -> None:
    """Three choices have three endings; choice 2 is what its seed gives alone."""
    sampling = SamplingParams(seed=5, ignore_eos=True)
    async with serving() as gateway:
        choices = await collect(await gateway.submit(request(num_choices=3, sampling=sampling)))
        seeded = msgspec.structs.replace(sampling, seed=7)
        again = await ask(gateway, request(sampling=seeded))
    assert len({text_of(deltas) for deltas in choices.values()}) == 3
    assert text_of(choices[2]) == again


async def test_what_cannot_be_answered_is_refused_with_the_numbers() -> None:
    """Unknown model, too long, too much, no template: each its own error, and nothing stays."""
    async with serving(toy_plan(context_tokens=256, kv_tokens=512, max_sequences=4)) as gateway:
        for bad, error, message in [
            (request(model="other"), NotFound, "no model 'other' is served; served: 'toy'"),
            (request("x" * 300), ContextOverflow, "prompt is 319 tokens, context is 256"),
            (request(max_tokens=250), ContextOverflow, "ask for at most 232"),
            (request(max_tokens=200, num_choices=4), InvalidRequest, "the whole pool has 512"),
            (request(num_choices=5), InvalidRequest, "at most 4 choices"),
            (request(prompt_tokens=(999,)), InvalidRequest, "outside 0 to 259"),
        ]:
            with pytest.raises(error, match=message):
                await gateway.submit(bad)
        assert await ask(gateway, request(max_tokens=232)), "the whole window is free again"


async def test_a_sampling_value_out_of_range_ends_every_choice() -> None:
    """What only the engine can judge comes as the answer's end."""
    async with serving() as gateway:
        bad = request(num_choices=2, sampling=SamplingParams(top_p=math.nan))
        choices = await collect(await gateway.submit(bad))
    assert [choices[i][-1].error.kind for i in (0, 1)] == ["InvalidRequest"] * 2  # type: ignore[union-attr]


async def test_a_missing_max_tokens_is_bounded_by_the_setting_and_the_window() -> None:
    """The bound is told with the answer."""
    settings = Settings(models=ModelSettings(answer_tokens=100))
    async with serving(toy_plan(context_tokens=256), settings=settings) as gateway:
        short = await gateway.submit(request("x", max_tokens=None))
        long = await gateway.submit(request("x" * 180, max_tokens=None))
        assert (short.max_tokens, long.max_tokens) == (100, 256 - long.num_prompt_tokens)
        assert len((await collect(long))[0][-1].text) > 0
        short.cancel()


async def test_requests_wait_for_kv_and_are_served_in_order() -> None:
    """A pool for one request at a time serves five, first come, first served."""
    meter, asked = RecordingMeter(), [request(max_tokens=40) for _ in range(5)]
    async with serving(toy_plan(kv_tokens=64), meter=meter) as gateway:
        await asyncio.gather(*(ask(gateway, each) for each in asked))
    assert list(meter.ended) == [each.request_id for each in asked]


async def test_a_full_queue_says_when_to_come_again() -> None:
    """Beyond the sequences and the queue a request is refused at once."""
    settings = Settings(models=ModelSettings(max_queued_requests=2))
    async with serving(endless_plan(max_sequences=1), settings=settings) as gateway:
        answers = [await gateway.submit(request(max_tokens=ENDLESS)) for _ in range(3)]
        with pytest.raises(Busy, match="3 requests run or wait") as caught:
            await gateway.submit(request())
        assert caught.value.retry_after_s is not None
        for answer in answers:
            answer.cancel()
        assert await ask(gateway, request())


async def test_cancelling_frees_the_place_and_ends_the_iteration() -> None:
    """A cancelled answer ends once, as cancelled, and its KV is another's at once."""
    async with serving(endless_plan()) as gateway:
        answer = await gateway.submit(request(max_tokens=ENDLESS))
        batches = []
        async for deltas in answer:
            batches += deltas
            answer.cancel()
            answer.cancel()
        assert batches[-1].finish_reason is FinishReason.CANCELLED
        assert sum(delta.finish_reason is not None for delta in batches) == 1
        assert gateway.models()[0].num_running == 0
        # The pool has room for one of them.
        again = await gateway.submit(request(max_tokens=ENDLESS))
        async for _ in again:
            again.cancel()
        # The step that was under way is over in a moment.
        while (await gateway.worker_stats("toy")).num_sequences:
            pass


async def test_leaving_the_loop_cancels() -> None:
    """A consumer that stops reading leaves nothing behind."""
    async with serving(toy_plan(kv_tokens=512)) as gateway:
        stream = aiter(await gateway.submit(request(max_tokens=480)))
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]
        assert gateway.models()[0].num_running == 0
        assert await ask(gateway, request(max_tokens=480))


@pytest.mark.parametrize("num_yields", [0, 1, 2, 5, 50])
async def test_a_client_that_vanishes_while_it_is_admitted_leaves_nothing(num_yields: int) -> None:
    """Cancelled while it is prepared, while it waits for KV, or just started."""
    async with serving(toy_plan(kv_tokens=512, max_sequences=2)) as gateway:
        blocker = await gateway.submit(request(max_tokens=450))
        vanishing = asyncio.ensure_future(gateway.submit(request(max_tokens=450)))
        for _ in range(num_yields):
            await asyncio.sleep(0)
        if num_yields == 50:
            blocker.cancel()
            await vanishing
            vanishing.result().cancel()
        vanishing.cancel()
        await asyncio.wait([vanishing])
        blocker.cancel()
        assert await ask(gateway, request(max_tokens=480))
        assert gateway.models()[0].num_running == 0
        stats = await gateway.worker_stats("toy")
        assert (stats.num_prepared, stats.num_sequences) == (0, 0)


async def test_a_slow_consumer_gets_everything_in_one_batch() -> None:
    """What arrives unread is merged: one delta a choice, and the whole text."""
    async with serving() as gateway:
        expected = await ask(gateway, request(max_tokens=400))
        answer = await gateway.submit(request(max_tokens=400))
        await until(lambda: gateway.models()[0].num_running == 0)
        batches = [deltas async for deltas in answer]
    assert len(batches) == 1
    [delta] = batches[0]
    assert delta.text == expected
    assert delta.num_tokens == 400


async def test_draining_lets_answers_finish_and_refuses_new_ones() -> None:
    """A running answer is whole; a new or waiting request is told to come again."""
    async with serving(toy_plan(context_tokens=16_384, kv_tokens=16_384)) as gateway:
        running = await gateway.submit(request(max_tokens=8000))
        waiting = await gateway.submit(request(max_tokens=9000))
        assert (running.queue_place, waiting.queue_place) == (0, 1)
        reading = asyncio.ensure_future(collect(running))
        await gateway.drain(100.0)
        assert gateway.is_draining()
        with pytest.raises(Busy, match="shutting down") as caught:
            await gateway.submit(request())
        error = (await collect(waiting))[0][-1].error
        assert error is not None
        assert error.message == caught.value.message
        assert error.retry_after_s == caught.value.retry_after_s is not None
        assert len(text_of((await reading)[0])) == 8000


async def test_a_request_that_is_being_prepared_is_not_started_by_a_draining_gateway() -> None:
    """Draining comes between its two phases."""
    async with serving() as gateway:
        preparing = asyncio.ensure_future(gateway.submit(request()))
        await asyncio.sleep(0)
        await gateway.drain(5.0)
        with pytest.raises(Busy, match="shutting down"):
            await preparing


async def test_the_drain_limit_ends_what_still_runs() -> None:
    """The answer ends with an error that says why, and the worker is free of it."""
    async with serving(endless_plan()) as gateway:
        answer = await gateway.submit(request(max_tokens=ENDLESS))
        await gateway.drain(0.05)
        last = (await collect(answer))[0][-1]
    assert last.finish_reason is FinishReason.ERROR
    assert last.error is not None
    assert "shutting down" in last.error.message


async def test_models_tell_where_they_stand() -> None:
    """State, process, footprint and the worker's counters are the worker's own."""
    async with serving(toy_plan("a"), toy_plan("b")) as gateway:
        await ask(gateway, request(model="b", max_tokens=10))
        stats = await gateway.worker_stats("b")
        a, b = gateway.models()
        assert (a.name, b.name) == ("a", "b")
        assert a.state is b.state is ModelState.READY
        assert a.pid != b.pid
        assert b.footprint is not None
        assert b.worker_stats == stats
        assert stats.num_tokens == 10
    assert [model.state for model in gateway.models()] == [ModelState.STOPPED] * 2
    assert [model.pid for model in gateway.models()] == [None] * 2


async def test_what_the_ledger_refuses_is_not_started() -> None:
    """The ledger's own words come back, and no grant stays behind."""
    memory = MemoryTerms(
        weights_bytes=50_000_000_000, kv_bytes=0, compute_bytes=0, overhead_bytes=0
    )
    large = msgspec.structs.replace(toy_plan("large"), memory=memory)
    account = Account()
    with pytest.raises(DoesNotFit, match="large needs"):
        async with serving(toy_plan("small"), large, account=account):
            pytest.fail("it was started")
    assert account.entries() == []


async def test_a_model_that_cannot_be_loaded_stops_the_others(broken_plan: Plan) -> None:
    """The engine's error comes back as itself; nothing is left running or granted."""
    account = Account()
    with pytest.raises(ModelFileError):
        async with serving(toy_plan(), broken_plan, account=account):
            pytest.fail("it was started")
    assert account.entries() == []


async def test_two_models_of_one_name_are_refused() -> None:
    """Clients could not tell them apart."""
    with pytest.raises(ConfigError, match="two models are named 'toy'"):
        async with serving(toy_plan(), toy_plan()):
            pytest.fail("it was started")
