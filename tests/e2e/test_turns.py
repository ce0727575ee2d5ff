"""More models than have room: who gets a turn, what gives way, what stays, and what is told.

Workers are real; only the machine's size and what the models are said to need are made up.
"""

import asyncio
import itertools
import os
import signal
import time
from collections import Counter

import msgspec
import pytest
from conftest import require_engine
from support.heavy import (
    GB,
    LONG,
    heavy,
    heavy_serving,
    patience,
    roomy,
    without_cache,
)
from support.models import DEMO, plan_for
from support.serving import ENDLESS, ask, collect, request, text_of, until

from brim.core.event import Event, EventKind
from brim.core.machine import Pressure
from brim.core.memory import MemoryTerms
from brim.core.plan import Plan
from brim.core.request import Priority
from brim.core.stance import Stance, WorkLimits
from brim.errors import Busy, DoesNotFit, EngineError
from brim.runtime import residency, worker_process
from brim.runtime.api import ModelState, ModelStatus
from brim.runtime.gateway import Gateway
from brim.runtime.groups import Group
from brim.runtime.moves import Moves

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_blocking")]


def status(gateway: Gateway, name: str) -> ModelStatus:
    return next(each for each in gateway.models() if each.name == name)


def ready(gateway: Gateway) -> set[str]:
    return {each.name for each in gateway.models() if each.state is ModelState.READY}


def happened(gateway: Gateway, kind: EventKind) -> list[Event]:
    return [event for event in gateway.event_log.events() if event.kind is kind]


async def test_a_hundred_requests_for_four_models_of_which_two_fit_are_all_answered() -> None:
    """Each gets what its model says alone; models change places once for each that was out."""
    plans = [heavy(name, max_sequences=4) for name in "abcd"]
    async with heavy_serving(*plans) as (gateway, account):
        began_s = time.monotonic()
        asked = [(name, f"question {number}") for number in range(25) for name in "abcd"]
        texts = await asyncio.gather(
            *(ask(gateway, request(content, model=name, max_tokens=40)) for name, content in asked)
        )
        took_s = time.monotonic() - began_s
        assert len(texts) == 100
        assert account.num_grants == dict.fromkeys("abcd", 1), "each was loaded once for its batch"
        for name in "abcd":
            assert status(gateway, name).requests.outcomes == {"length": 25}
        evictions = happened(gateway, EventKind.MODEL_UNLOADED)
        assert len(evictions) <= 1 + took_s / residency.MIN_TURN_S
        again = {each: await ask(gateway, request(each[1], model=each[0], max_tokens=40))
                 for each in asked[:2]}  # fmt: skip
        assert [again[each] for each in asked[:2]] == texts[:2]


@pytest.fixture
def real() -> list[Plan]:
    """Three copies of the demo model that claim to be large; made here, because files block."""
    require_engine("llamacpp")
    plan = plan_for("llamacpp", path=DEMO, kv_tokens=4096)
    models = [msgspec.structs.replace(plan.model, name=name) for name in "abc"]
    memory = MemoryTerms(weights_bytes=5 * GB, kv_bytes=0, compute_bytes=0, overhead_bytes=0)
    return [msgspec.structs.replace(plan, model=model, memory=memory) for model in models]


async def test_models_of_a_real_engine_take_turns_and_say_what_they_say_alone(
    real: list[Plan],
) -> None:
    """Thirty requests at once for three models of which two fit: equal texts, one load each."""
    async with heavy_serving(*real) as (gateway, account):
        asked = [(f"def function_{number}(x):", name) for number in range(10) for name in "abc"]
        texts = await asyncio.gather(
            *(ask(gateway, request(prompt=prompt, model=name)) for prompt, name in asked)
        )
        alone = {
            prompt: await ask(gateway, request(prompt=prompt, model="c"))
            for prompt, _ in asked[::3]
        }
        assert texts == [alone[prompt] for prompt, _ in asked]
        assert account.num_grants == {"a": 1, "b": 1, "c": 1}


async def test_a_model_that_is_never_left_alone_gives_way_all_the_same() -> None:
    """Two models have always something to do; a third is served meanwhile, and they go on."""
    async with heavy_serving(*map(heavy, "abc")) as (gateway, _):
        is_over = False
        answered = Counter[str]()

        async def flood(name: str) -> None:
            while not is_over:
                await ask(gateway, request(model=name, max_tokens=30))
                answered[name] += 1

        floods = [asyncio.ensure_future(flood(name)) for name in "aabb"]
        assert await ask(gateway, request(model="c"))
        before = answered.copy()
        await until(lambda: all(answered[name] > before[name] for name in "ab"))
        is_over = True
        await asyncio.gather(*floods)
        assert happened(gateway, EventKind.MODEL_UNLOADED)[0].cause == "it gave way to c"


async def test_models_change_places_at_most_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients of three models in turn: between two evictions there is a whole turn."""
    times: list[float] = []
    evict = Moves.evict

    async def timed(moves: Moves, group: Group, cause: str) -> None:
        times.append(time.monotonic())
        await evict(moves, group, cause)

    monkeypatch.setattr(Moves, "evict", timed)
    async with heavy_serving(*map(heavy, "abc")) as (gateway, _):

        async def client(name: str) -> None:
            for _ in range(2):
                await ask(gateway, request(model=name, max_tokens=5))

        await asyncio.gather(*map(client, "abc"))
        await asyncio.gather(*map(client, "cba"))
    assert len(times) >= 2
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    # The turn is counted from just before the call.
    assert min(pauses) > 0.9 * residency.MIN_TURN_S


async def test_a_chain_of_models_that_do_not_fit_together_runs_one_after_the_other() -> None:
    """Each takes all of the memory: the next begins when the one before has answered."""
    chain = [heavy(name, 9 * GB) for name in ("embed", "chat", "speech")]
    async with heavy_serving(*chain) as (gateway, account):
        for name in ("embed", "chat", "speech"):
            assert await ask(gateway, request(model=name))
            assert ready(gateway) == {name}
        assert account.num_grants == {"embed": 1, "chat": 1, "speech": 1}


async def test_who_came_first_is_served_first() -> None:
    """Of two models that wait for the memory of a third, the one that was asked for first."""
    async with heavy_serving(*(roomy(name, 9 * GB) for name in "abc")) as (gateway, _):
        working = await gateway.submit(request(model="a", max_tokens=ENDLESS))
        order: list[str] = []

        async def one(name: str) -> None:
            await ask(gateway, request(model=name))
            order.append(name)

        waiting = [asyncio.ensure_future(one("c"))]
        await until(lambda: status(gateway, "c").num_waiting_load == 1)
        waiting.append(asyncio.ensure_future(one("b")))
        await until(lambda: status(gateway, "b").num_waiting_load == 1)
        assert gateway.load_progress("b") == 0.0
        assert gateway.load_progress("a") is None
        working.cancel()
        await asyncio.gather(*waiting)
        assert order == ["c", "b"]


async def test_a_client_that_no_longer_waits_lets_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A model that was to give way takes requests again as soon as nobody wants its memory."""
    monkeypatch.setattr(residency, "MIN_TURN_S", 0.0)
    async with heavy_serving(*map(roomy, "abc"), settings=patience(100.0)) as (gateway, account):
        working = [await gateway.submit(request(model=name, max_tokens=ENDLESS)) for name in "ab"]
        waiting = asyncio.ensure_future(gateway.submit(request(model="c")))
        await until(lambda: bool(happened(gateway, EventKind.MODEL_LEAVING)))
        [leaving] = happened(gateway, EventKind.MODEL_LEAVING)
        assert leaving.cause == "it has had its turn, and 1 request waits for c"
        held = asyncio.ensure_future(ask(gateway, request(model=leaving.model)))
        await until(lambda: status(gateway, leaving.model).num_waiting_load == 1)
        waiting.cancel()
        assert await held
        assert account.num_grants == {"a": 1, "b": 1}
        for answer in working:
            answer.cancel()


async def test_a_pinned_model_gives_way_to_nobody() -> None:
    """Another one does; where none is left, the client is told who stays, and why."""
    plans = [heavy("a"), heavy("b"), heavy("c"), heavy("large", 9 * GB)]
    async with heavy_serving(*plans, settings=without_cache(keep_loaded=("a",))) as (gateway, _):
        assert status(gateway, "a").stays == "pinned by models.keep_loaded"
        await ask(gateway, request(model="b"))
        assert await ask(gateway, request(model="c"))
        assert ready(gateway) == {"a", "c"}
        with pytest.raises(DoesNotFit, match=r"beside what .*: a \(by models\.keep_loaded\)"):
            await gateway.submit(request(model="large"))
        assert ready(gateway) == {"a", "c"}
        [reading] = [each for each in gateway.actuator.models() if each.name == "a"]
        assert (reading.is_pinned, reading.idle_unload_s) == (True, None)


async def test_what_an_app_wants_kept_is_pinned_as_long_as_it_does() -> None:
    """The apps are asked each time."""
    kept = {"a"}
    async with heavy_serving(*map(heavy, "abc"), pinned_by_apps=lambda: kept) as (gateway, _):
        assert status(gateway, "a").stays == "pinned by an app"
        await ask(gateway, request(model="c"))
        assert ready(gateway) == {"a", "c"}
        kept.clear()
        await ask(gateway, request(model="c"))
        await ask(gateway, request(model="b"))
        assert ready(gateway) == {"b", "c"}


PAIRED = without_cache(pairs=("big+tiny",))


async def test_a_pair_comes_and_goes_as_one() -> None:
    """Both are granted and loaded for a request of either, and give way together."""
    plans = [heavy("other", 6 * GB), heavy("big", 6 * GB), heavy("tiny", 2 * GB)]
    async with heavy_serving(*plans, settings=PAIRED) as (gateway, _):
        assert ready(gateway) == {"other"}
        assert await ask(gateway, request(model="tiny"))
        assert ready(gateway) == {"big", "tiny"}
        assert status(gateway, "big").pair == status(gateway, "tiny").pair == ("big", "tiny")
        assert await ask(gateway, request(model="other"))
        assert ready(gateway) == {"other"}
        loaded = Counter(event.model for event in happened(gateway, EventKind.MODEL_LOADED))
        assert loaded == {"other": 2, "big": 1, "tiny": 1}
        unloaded = [event.model for event in happened(gateway, EventKind.MODEL_UNLOADED)]
        assert unloaded == ["other", "big", "tiny"]


async def test_of_a_pair_neither_is_loaded_where_one_cannot_be() -> None:
    """What the first took is free again, and both say why they are out."""
    broken = heavy("tiny", 2 * GB)
    broken.environment["PYTHONHOME"] = "/nonexistent"
    plans = [heavy("other", 6 * GB), heavy("big", 6 * GB), broken]
    async with heavy_serving(*plans, settings=PAIRED) as (gateway, account):
        with pytest.raises(EngineError):
            await gateway.submit(request(model="big"))
        assert "big" not in account
        assert "tiny" not in account
        assert status(gateway, "big").state is ModelState.UNLOADED
        assert await ask(gateway, request(model="other"))


CRITICAL = Stance(
    memory=Pressure.CRITICAL,
    reason="memory is short: the system reports critical pressure",
    admits=False,
    loads=False,
    retry_after_s=7.0,
)

WARNING = Stance(memory=Pressure.WARNING, reason="memory is short", loads=False, retry_after_s=7.0)


async def test_at_critical_pressure_nothing_new_is_admitted_and_answers_go_on() -> None:
    """New requests, and those that wait for a load, get the reason; the running one is whole."""
    async with heavy_serving(*map(roomy, "abc")) as (gateway, _):
        running = [await gateway.submit(request(model=name, max_tokens=LONG)) for name in "ab"]
        waiting = asyncio.ensure_future(gateway.submit(request(model="c")))
        await until(lambda: status(gateway, "c").num_waiting_load == 1)
        gateway.set_stance(CRITICAL)
        for refused in (waiting, asyncio.ensure_future(gateway.submit(request(model="a")))):
            with pytest.raises(Busy, match=r"critical pressure; .* again in 7 s") as caught:
                await refused
            assert caught.value.retry_after_s == 7.0
        for answer in running:
            assert len(text_of((await collect(answer))[0])) == LONG
        gateway.set_stance(Stance())
        assert await ask(gateway, request(model="c"))


async def test_a_load_that_pressure_interrupts_gives_back_what_it_took() -> None:
    """Its process ends, its grant is gone, and it is loaded when the pressure is over."""
    async with heavy_serving(*map(heavy, "abc")) as (gateway, account):
        waiting = asyncio.ensure_future(gateway.submit(request(model="c")))
        await until(lambda: status(gateway, "c").load_progress is not None)
        gateway.set_stance(CRITICAL)
        with pytest.raises(Busy, match="critical pressure"):
            await waiting
        await until(lambda: "c" not in account)
        gateway.set_stance(Stance())
        assert await ask(gateway, request(model="c"))


async def test_while_nothing_is_loaded_requests_for_other_models_wait() -> None:
    """Those of models in memory are served; the others are when loads are allowed again."""
    async with heavy_serving(*map(heavy, "abc")) as (gateway, account):
        gateway.set_stance(WARNING)
        waiting = asyncio.ensure_future(ask(gateway, request(model="c")))
        assert await ask(gateway, request(model="a"))
        assert account.num_grants == {"a": 1, "b": 1}
        gateway.set_stance(Stance())
        assert await waiting


async def test_a_wait_for_loads_to_be_allowed_ends_with_the_reason() -> None:
    """As every wait for a model, at the limit of the setting."""
    async with heavy_serving(*map(heavy, "abc"), settings=patience(0.05)) as (gateway, _):
        gateway.set_stance(WARNING)
        with pytest.raises(Busy, match="not loaded now: memory is short; try again in 7 s"):
            await gateway.submit(request(model="c"))


HELD = Stance(
    reason="the machine runs on battery",
    work=WorkLimits(runs_background=False),
    retry_after_s=30.0,
)


async def test_background_requests_that_are_held_wait_and_go_on_later() -> None:
    """Others pass them, and find no queue; when power is back they are answered."""
    async with heavy_serving(heavy("a", max_sequences=1)) as (gateway, _):
        gateway.set_stance(HELD)
        held = await gateway.submit(request(model="a", priority=Priority.BACKGROUND))
        assert held.queue_place == 1
        asked = await gateway.submit(request(model="a"))
        assert asked.queue_place == 0
        await collect(asked)
        assert status(gateway, "a").num_waiting == 1
        gateway.set_stance(Stance())
        assert len(text_of((await collect(held))[0])) == 20


async def test_held_background_requests_keep_no_model_in_memory() -> None:
    """One that somebody waits for takes its place; they are told why and when to come again."""
    async with heavy_serving(*map(heavy, "abc")) as (gateway, _):
        gateway.set_stance(HELD)
        held = await gateway.submit(request(model="a", priority=Priority.BACKGROUND))
        assert await ask(gateway, request(model="b"))
        assert await ask(gateway, request(model="c"))
        error = (await collect(held))[0][-1].error
        assert error is not None
        assert (error.kind, error.retry_after_s) == ("Busy", 30.0)
        assert error.message.startswith("the machine runs on battery: background requests wait")


async def test_the_smaller_of_a_pair_answers_where_power_is_short_and_the_app_agrees() -> None:
    """The answer says whose place it took; apps that did not agree get what they asked for."""
    plans = [heavy("big", 6 * GB), heavy("tiny", 2 * GB)]
    async with heavy_serving(*plans, settings=PAIRED) as (gateway, _):
        gateway.set_stance(Stance(prefers_draft=True))
        for accepts, name, instead_of in [(True, "tiny", "big"), (False, "big", None)]:
            answer = await gateway.submit(request(model="big", accepts_draft=accepts))
            assert (answer.plan.model.name, answer.instead_of) == (name, instead_of)
            await collect(answer)
        answer = await gateway.submit(request(model="tiny", accepts_draft=True))
        assert (answer.plan.model.name, answer.instead_of) == ("tiny", None)
        answer.cancel()


async def test_loads_and_unloads_are_recorded_with_bytes_and_seconds() -> None:
    """What a process held before, that nothing is left after, and who it was for."""
    async with heavy_serving(*map(heavy, "abc")) as (gateway, _):
        pid = status(gateway, "a").pid
        assert pid is not None
        await ask(gateway, request(model="c"))
        kinds = [(event.kind, event.model) for event in gateway.event_log.events()]
        assert kinds == [
            (EventKind.MODEL_LOADING, "a"),
            (EventKind.MODEL_LOADED, "a"),
            (EventKind.MODEL_LOADING, "b"),
            (EventKind.MODEL_LOADED, "b"),
            (EventKind.MODEL_UNLOADED, "a"),
            (EventKind.MODEL_LOADING, "c"),
            (EventKind.MODEL_LOADED, "c"),
        ]
        unloaded, loading, loaded = gateway.event_log.events()[-3:]
        assert unloaded.cause == "it gave way to c"
        assert (unloaded.before_bytes or 0) > 10**6
        assert unloaded.after_bytes == 0
        assert loading.cause == "1 request waits for it"
        assert (loaded.after_bytes or 0) > 10**6
        assert unloaded.took_s is not None
        assert loaded.took_s is not None
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_a_process_that_does_not_end_is_killed_and_that_is_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It held its memory at the limit, and nothing after; the model that waits has its place."""
    monkeypatch.setattr(worker_process, "SHUTDOWN_LIMIT_S", 0.2)
    async with heavy_serving(*map(heavy, "abc")) as (gateway, _):
        pid = status(gateway, "a").pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        assert await ask(gateway, request(model="c"))
        [failed] = happened(gateway, EventKind.UNLOAD_FAILED)
        assert failed.model == "a"
        assert (failed.after_bytes or 0) > 10**6
        [unloaded] = happened(gateway, EventKind.MODEL_UNLOADED)
        assert unloaded.after_bytes == 0
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_deaths_and_quarantine_are_recorded() -> None:
    """With what killed the worker and how often."""
    settings = without_cache()
    async with heavy_serving(heavy("a"), settings=settings) as (gateway, _):
        for num_deaths in range(1, settings.worker.deaths_before_quarantine + 1):
            await until(lambda: status(gateway, "a").state is ModelState.READY)
            os.kill(status(gateway, "a").pid or pytest.fail(), signal.SIGKILL)
            await until(lambda n=num_deaths: status(gateway, "a").num_deaths == n)  # type: ignore[misc]
        deaths = happened(gateway, EventKind.WORKER_DIED)
        assert [event.detail["deaths_in_a_row"] for event in deaths] == [1, 2, 3]
        assert "SIGKILL" in deaths[0].cause
        [quarantined] = happened(gateway, EventKind.MODEL_QUARANTINED)
        assert quarantined.model == "a"


async def test_an_idle_model_says_when_it_leaves_and_one_in_use_that_it_stays() -> None:
    """By the setting, counted from its last answer."""
    async with heavy_serving(roomy("a")) as (gateway, _):
        idle = status(gateway, "a")
        assert idle.leaves_in_s == pytest.approx(180.0, abs=30.0)
        assert idle.stays == ""
        running = await gateway.submit(request(model="a", max_tokens=ENDLESS))
        used = status(gateway, "a")
        assert (used.leaves_in_s, used.stays, used.idle_s) == (None, "in use", None)
        running.cancel()


@pytest.fixture
def elastic() -> list[Plan]:
    """A model whose KV is most of it, and one that has room beside a quarter of that."""
    large = heavy("large", 2 * GB, 8 * GB, context_tokens=1024, kv_tokens=8192, max_sequences=8)
    return [large, heavy("late", 5 * GB)]


async def test_idle_kv_gives_way_before_a_model_does(elastic: list[Plan]) -> None:
    """The pool of the one shrinks, with its charge, so that the other is loaded beside it."""
    async with heavy_serving(*elastic) as (gateway, account):
        assert ready(gateway) == {"large"}
        assert await ask(gateway, request(model="late"))
        assert ready(gateway) == {"large", "late"}
        assert status(gateway, "large").kv_pool_tokens == 2048
        assert account.entry("large").terms.kv_bytes == 2 * GB
        assert status(gateway, "large").entry is not None
        [shrunk] = happened(gateway, EventKind.KV_SHRUNK)
        assert (shrunk.detail["pool_tokens_before"], shrunk.detail["pool_tokens_after"]) == (
            8192,
            2048,
        )
        assert await ask(gateway, request(model="large", max_tokens=900))


async def test_a_request_that_needs_more_than_the_shrunk_pool_has_it_grow(
    elastic: list[Plan],
) -> None:
    """An idle model makes room for it; while that works, the client is told to come again."""
    elastic[1] = roomy("late")
    async with heavy_serving(*elastic) as (gateway, account):
        running = await gateway.submit(request(model="late", max_tokens=ENDLESS))
        with pytest.raises(Busy, match=r"the KV pool of model 'large' has 2048 tokens") as caught:
            await gateway.submit(request(model="large", num_choices=8, max_tokens=900))
        assert caught.value.retry_after_s is not None
        running.cancel()
        assert status(gateway, "large").kv_pool_tokens == 2048
        answer = await gateway.submit(request(model="large", num_choices=8, max_tokens=900))
        assert len(await collect(answer)) == 8
        pool_tokens = status(gateway, "large").kv_pool_tokens
        assert 8 * 900 < pool_tokens < 8192, "what it needs"
        assert account.entry("large").terms.kv_bytes == 8 * GB * pool_tokens // 8192
        assert ready(gateway) == {"large"}


async def test_a_restarted_worker_has_the_pool_that_the_last_one_had(elastic: list[Plan]) -> None:
    """Its plan's would be more than the account has granted it by then."""
    async with heavy_serving(*elastic) as (gateway, _):
        await ask(gateway, request(model="late"))
        os.kill(status(gateway, "large").pid or pytest.fail(), signal.SIGKILL)
        assert await ask(gateway, request(model="large"))
        assert (await gateway.worker_stats("large")).kv_tokens == 2048


async def test_the_governors_hands_shrink_grow_and_unload() -> None:
    """What it reads of the model follows, and what works is not unloaded."""
    plan = heavy("a", 2 * GB, 8 * GB, context_tokens=1024, kv_tokens=8192)
    async with heavy_serving(plan) as (gateway, account):
        hands = gateway.actuator
        answer = await gateway.submit(request(model="a", max_tokens=1000))
        assert await hands.unload("a", "a test") is False
        answer.cancel()
        await hands.drop_idle_kv("a")
        [reading] = hands.models()
        assert reading.kv_pool_tokens < reading.kv_plan_tokens == 8192
        assert reading.kv_excess_tokens == 0, "it would be shrunk again and again"
        assert account.charged_bytes < 10 * GB
        await hands.grow_kv("a")
        [reading] = hands.models()
        assert reading.kv_pool_tokens == 8192
        assert account.charged_bytes == 10 * GB
        assert await hands.measure("a") > 10**6
        assert await hands.unload("a", "a test") is True
        assert await hands.measure("a") == 0
        [reading] = hands.models()
        assert (reading.is_loaded, account.charged_bytes) == (False, 0)
        assert await hands.unload("a", "a test") is False
        assert not happened(gateway, EventKind.MODEL_UNLOADED), "whoever decided records that"
        assert await ask(gateway, request(model="a"))


async def test_a_worker_that_does_not_come_back_from_a_resize_is_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The next one serves, with the pool and the charge that held before."""
    monkeypatch.setattr(worker_process, "resize_limit_s", lambda plan: 0.5)
    plan = heavy("a", 2 * GB, 8 * GB, context_tokens=1024, kv_tokens=8192)
    async with heavy_serving(plan) as (gateway, account):
        os.kill(status(gateway, "a").pid or pytest.fail(), signal.SIGSTOP)
        assert await gateway.actuator.drop_idle_kv("a") == 0
        [died] = happened(gateway, EventKind.WORKER_DIED)
        assert "while its KV pool was resized, so it hung and was killed" in died.cause
        assert await ask(gateway, request(model="a"))
        assert status(gateway, "a").kv_pool_tokens == 8192
        assert account.charged_bytes == 10 * GB
