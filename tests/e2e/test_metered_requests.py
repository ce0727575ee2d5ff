"""What apps are charged for: each request once, whatever ends it, and never beyond its bound."""

import asyncio
import itertools
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import require_engine
from support.heavy import heavy_serving, patience, roomy
from support.meters import RecordingMeter
from support.models import DEMO, plan_for
from support.serving import (
    CHATML,
    ENDLESS,
    MACHINE,
    ask,
    collect,
    endless_plan,
    request,
    settings_with,
    toy_plan,
    until,
)

from brim.config.tree import CacheSettings, Settings
from brim.core.answer import FinishReason
from brim.core.plan import Plan
from brim.core.request import Message, OverflowPolicy, Request
from brim.errors import Busy, ContextOverflow, OverBudget, RateLimited
from brim.ledger.account import Account
from brim.runtime import gateway as gateway_module
from brim.runtime.gateway import Gateway

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_blocking")]


@asynccontextmanager
async def metered(
    plan: Plan, meter: RecordingMeter, settings: Settings | None = None, **options: Any
) -> AsyncIterator[Gateway]:
    """A gateway whose meter has settled at its end."""
    gateway = Gateway(
        [plan],
        settings=settings or settings_with(restart_backoff_s=0.01),
        account=Account(),
        read_machine=lambda: MACHINE,
        meter=meter,
        **options,
    )
    async with gateway:
        yield gateway
    assert meter.is_settled


def of_mail(**fields: Any) -> Request:
    return request(app="mail", **fields)


async def test_an_answer_is_charged_with_what_was_drawn() -> None:
    """Of all choices together, and the prompt once."""
    meter = RecordingMeter()
    async with metered(toy_plan(), meter) as gateway:
        asked = of_mail(num_choices=3, max_tokens=7)
        answer = await gateway.submit(asked)
        assert meter.begun == {asked.request_id: 21}
        assert meter.num_in_flight == {"mail": 1}
        await collect(answer)
        assert meter.ended == {asked.request_id: 21}
        assert meter.num_prompt_tokens == {"mail": answer.num_prompt_tokens}
        assert meter.is_settled


@pytest.mark.parametrize("ending", ["cancelled", "died", "drained", "stopped"])
async def test_however_an_answer_breaks_off_it_is_charged_once(ending: str) -> None:
    """With what had come of it, and one that still waited for its turn with nothing."""
    meter = RecordingMeter()
    async with metered(endless_plan(max_sequences=1), meter) as gateway:
        asked, queued = of_mail(max_tokens=ENDLESS), of_mail(max_tokens=50)
        running = await gateway.submit(asked)
        stream = aiter(running)
        await anext(stream)
        waiting = await gateway.submit(queued)
        if ending == "cancelled":
            running.cancel()
            waiting.cancel()
        elif ending == "died":
            os.kill(gateway.models()[0].pid or pytest.fail(), signal.SIGKILL)
            assert (await collect(waiting))[0][-1].finish_reason is FinishReason.LENGTH
        elif ending == "drained":
            await gateway.drain(0.05)
        else:
            await gateway.stop()
        await until(lambda: meter.is_settled)
        assert 0 < meter.ended[asked.request_id] < ENDLESS
        assert meter.ended[queued.request_id] == (50 if ending == "died" else 0)
        assert meter.unread == (set() if ending == "died" else {queued.request_id})


async def test_refused_requests_cost_nothing_and_hold_no_place() -> None:
    """Whether the app, the window, the queue or the model refused them."""
    meter = RecordingMeter()
    async with metered(toy_plan(context_tokens=256), meter) as gateway:
        meter.refusal = RateLimited("too many", retry_after_s=1.0)
        with pytest.raises(RateLimited):
            await gateway.submit(of_mail())
        meter.refusal = None
        with pytest.raises(ContextOverflow):
            await gateway.submit(of_mail(max_tokens=5000))
        meter.left_tokens = 3
        with pytest.raises(OverBudget):
            await gateway.submit(of_mail())
        assert meter.is_settled
        assert meter.ended == {}
        assert gateway.models()[0].requests.refusals == {
            "RateLimited": 1, "ContextOverflow": 1, "OverBudget": 1,
        }  # fmt: skip


async def test_who_leaves_while_it_waits_for_its_model_holds_no_place() -> None:
    """Its client has gone, or its patience has ended."""
    meter = RecordingMeter()
    async with heavy_serving(*map(roomy, "abc"), meter=meter, settings=patience(0.3)) as (
        gateway,
        _,
    ):
        working = [await gateway.submit(of_mail(model=name, max_tokens=ENDLESS)) for name in "ab"]
        leaving = asyncio.ensure_future(gateway.submit(of_mail(model="c")))
        patient = asyncio.ensure_future(gateway.submit(of_mail(model="c")))
        await until(lambda: meter.num_in_flight["mail"] == 4)
        leaving.cancel()
        with pytest.raises(Busy):
            await patient
        assert meter.num_in_flight["mail"] == 2
        for answer in working:
            answer.cancel()
        assert meter.is_settled


async def test_an_answer_ends_at_what_the_budget_leaves() -> None:
    """The client is told the bound with the answer."""
    meter = RecordingMeter(left_tokens=60)
    async with metered(toy_plan(), meter) as gateway:
        answer = await gateway.submit(of_mail(num_choices=2, max_tokens=200))
        assert answer.max_tokens == (60 - answer.num_prompt_tokens) // 2
        choices = await collect(answer)
        assert choices[0][-1].finish_reason is FinishReason.LENGTH
        assert list(meter.ended.values()) == [2 * answer.max_tokens]


@pytest.fixture
def demo() -> Plan:
    """The demo model with a small window; made here, because files block the loop."""
    require_engine("llamacpp")
    plan = plan_for("llamacpp", path=DEMO, context_tokens=512, kv_tokens=2048)
    model = msgspec.structs.replace(plan.model, chat_template=CHATML)
    return msgspec.structs.replace(plan, model=model)


async def test_a_summary_is_charged_to_the_app_whose_conversation_it_is_of(demo: Plan) -> None:
    """As a request of its own, which takes no place among those that the app may have at once."""
    meter = RecordingMeter()
    turns = [
        Message(role="user" if number % 2 == 0 else "assistant", content="def function(x): " * 12)
        for number in range(9)
    ]
    async with metered(demo, meter) as gateway:
        asked = msgspec.structs.replace(
            of_mail(model=demo.model.name),
            messages=(*turns,),
            overflow=OverflowPolicy.SUMMARIZE,
        )
        answer = await gateway.submit(asked)
        assert meter.num_in_flight == {"mail": 1}
        await collect(answer)
    assert f"{asked.request_id}-summary-1" in meter.ended
    assert asked.request_id in meter.ended


@pytest.mark.parametrize("may_write", [True, False])
async def test_bytes_on_disk_are_charged_and_no_longer_written_once_they_are_used_up(
    may_write: bool, tmp_path: Path, demo: Plan
) -> None:
    """By the worker's counters, those of its last moment included."""
    meter, name = RecordingMeter(), demo.model.name
    meter.on_disk = may_write
    cache = CacheSettings(directory=str(tmp_path), min_tokens=16, free_disk_floor_bytes=0)
    async with metered(demo, meter, Settings(cache=cache)) as gateway:
        asked = of_mail(prompt="def f(x):\n" * 20, model=name)
        await ask(gateway, msgspec.structs.replace(asked, cache_namespace="app:mail"))
        await gateway.worker_stats(name)
        assert await gateway.actuator.unload(name, "a test")
    files = await asyncio.to_thread(lambda: list(tmp_path.rglob("*")))
    assert (meter.written["mail"] > 0) is may_write, files


async def test_energy_is_charged_to_whose_tokens_it_went_into(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a counter that has grown while one app's request ran."""
    meter, joules = RecordingMeter(), itertools.count(0, 5)
    monkeypatch.setattr(gateway_module, "ENERGY_PERIOD_S", 0.01)
    async with metered(endless_plan(), meter, read_joules=lambda: float(next(joules))) as gateway:
        answer = await gateway.submit(of_mail(max_tokens=ENDLESS))
        await until(lambda: meter.joules.get("mail", 0.0) >= 10.0)
        answer.cancel()
    assert set(meter.joules) == {"mail"}
