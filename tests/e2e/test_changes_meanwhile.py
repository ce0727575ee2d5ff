"""What changes while a model is granted, leaves, grows or is waited for.

Workers are real; only the machine's size and what the models are said to need are made up.
"""

import asyncio
import os
import signal
from collections.abc import Callable

import msgspec
import pytest
from support.heavy import GB, Readings, heavy, heavy_serving, patience, roomy, without_cache
from support.meters import RecordingMeter
from support.serving import ENDLESS, ask, collect, request, until

from brim.config.tree import WorkerSettings
from brim.core.event import EventKind
from brim.core.machine import MachineSpec, Pressure
from brim.core.request import Priority
from brim.core.stance import Stance, WorkLimits
from brim.errors import Busy, CapacityError, DoesNotFit
from brim.runtime import gateway as gateway_module
from brim.runtime import worker_process
from brim.runtime.api import ModelState
from brim.runtime.gateway import Gateway
from brim.runtime.model_host import ModelHost
from brim.runtime.worker_process import WorkerProcess
from brim.worker.protocol import Resized

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_blocking")]

CRITICAL = Stance(memory=Pressure.CRITICAL, admits=False, loads=False, reason="memory is short")
BACKGROUND_WAITS = Stance(work=WorkLimits(runs_background=False))


class NewsWithTheReading(Readings):
    """Calls back on the event loop before whoever wanted the next reading gets it."""

    def __init__(self) -> None:
        super().__init__()
        self.on_read: Callable[[], None] | None = None
        self._loop = asyncio.get_running_loop()

    def __call__(self) -> MachineSpec:
        if self.on_read is not None:
            self._loop.call_soon_threadsafe(self.on_read)
            self.on_read = None
        return super().__call__()


def loads(gateway: Gateway) -> list[str]:
    events = gateway.event_log.events()
    return [event.cause for event in events if event.kind is EventKind.MODEL_LOADING]


async def test_a_model_that_was_granted_as_pressure_came_is_not_loaded() -> None:
    """Nobody waits for it any more, and its grant goes back."""
    readings = NewsWithTheReading()
    async with heavy_serving(heavy("a"), read_machine=readings) as (gateway, account):
        assert await gateway.actuator.unload("a", "a test")
        readings.on_read = lambda: gateway.set_stance(CRITICAL)
        with pytest.raises(Busy, match="memory is short"):
            await gateway.submit(request(model="a"))
        await until(lambda: account.num_grants["a"] == 2 and "a" not in account)
        gateway.set_stance(Stance())
        assert await ask(gateway, request(model="a"))
        assert loads(gateway) == ["the server starts", "1 request waits for it"]


async def test_who_does_not_wait_at_all_finds_its_model_later() -> None:
    """It is told the truth, that the model is being loaded, and the load goes on without it."""
    settings = patience(0.0)
    async with heavy_serving(heavy("a"), settings=settings) as (gateway, _):
        assert await gateway.actuator.unload("a", "a test")
        with pytest.raises(Busy, match="model 'a' is being loaded; try again in 5 s"):
            await gateway.submit(request(model="a"))
        await until(lambda: gateway.models()[0].leaves_in_s is not None)  # it takes requests
        assert await ask(gateway, request(model="a"))
        assert loads(gateway) == ["the server starts", "it was asked for"]


async def test_background_requests_that_were_held_do_not_keep_half_a_pair_that_leaves() -> None:
    """They are told to come again, though they might run by the time that their model's turn is."""
    plans = [heavy("large", 2 * GB), heavy("small", 1 * GB)]
    settings = without_cache(pairs=("large+small",))
    async with heavy_serving(*plans, settings=settings) as (gateway, account):
        gateway.set_stance(BACKGROUND_WAITS)
        held = await gateway.submit(request(model="small", priority=Priority.BACKGROUND))
        unloading = asyncio.ensure_future(gateway.actuator.unload("large", "a test"))
        await until(lambda: gateway.models()[0].reason.startswith("a test"))
        gateway.set_stance(Stance())
        assert await unloading
        error = (await collect(held))[0][-1].error
        assert error is not None
        assert "leaves memory" in error.message
        assert account.entries() == []
        assert await ask(gateway, request(model="small"))


async def test_a_queue_full_of_the_background_is_full_for_the_background_alone() -> None:
    """While it is held, who waits for an answer gets it; one more of its kind is refused."""
    settings = without_cache(max_queued_requests=2)
    plan = heavy("a", max_sequences=1)
    async with heavy_serving(plan, settings=settings) as (gateway, _):
        gateway.set_stance(BACKGROUND_WAITS)
        background = request(model="a", priority=Priority.BACKGROUND)
        held = [await gateway.submit(background) for _ in range(3)]
        with pytest.raises(Busy, match="3 requests run or wait for model 'a'"):
            await gateway.submit(background)
        assert await ask(gateway, request(model="a"))
        gateway.set_stance(Stance())
        for answer in held:
            assert (await collect(answer))[0][-1].error is None


async def test_a_pool_that_its_engine_does_not_let_grow_costs_no_other_model_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There was room: the request is refused, and whoever is idle stays."""
    plans = [heavy(name, 2 * GB, GB, kv_tokens=4096, context_tokens=4096) for name in "ab"]
    async with heavy_serving(*plans) as (gateway, account):
        await gateway.actuator.drop_idle_kv("a")
        stats = await gateway.worker_stats("a")
        footprint = (gateway.models()[0].footprint) or pytest.fail()
        refusal = Resized(stats.kv_tokens, footprint)

        async def refused(host: ModelHost, kv_tokens: int) -> Resized:
            return refusal

        monkeypatch.setattr(ModelHost, "resize", refused)
        with pytest.raises(CapacityError, match="try again in"):
            await gateway.submit(request(model="a", max_tokens=3000))
        assert {entry.name for entry in account.entries()} == {"a", "b"}
        assert await ask(gateway, request(model="a"))


async def test_a_pinned_model_in_quarantine_gives_its_memory_to_others() -> None:
    """It has no process that could be kept, and its bytes are somebody else's now."""
    settings = msgspec.structs.replace(
        without_cache(keep_loaded=("a", "b")),
        worker=WorkerSettings(deaths_before_quarantine=1),
    )
    async with heavy_serving(*map(heavy, "abc"), settings=settings) as (gateway, account):
        with pytest.raises(DoesNotFit, match="what is to stay in memory"):
            await gateway.submit(request(model="c"))
        os.kill(gateway.models()[0].pid or pytest.fail(), signal.SIGKILL)
        await until(lambda: gateway.models()[0].state is ModelState.QUARANTINED)
        assert await ask(gateway, request(model="c"))
        assert {entry.name for entry in account.entries()} == {"b", "c"}


async def test_a_process_that_does_not_end_is_waited_for_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Then it is killed: whoever needs its memory does not wait for a second limit."""
    monkeypatch.setattr(worker_process, "SHUTDOWN_LIMIT_S", 0.1)
    asked: list[int] = []
    ask_to_end = WorkerProcess.ask_to_end

    async def counted(worker: WorkerProcess) -> bool:
        asked.append(worker.pid)
        return await ask_to_end(worker)

    monkeypatch.setattr(WorkerProcess, "ask_to_end", counted)
    async with heavy_serving(heavy("a")) as (gateway, _):
        pid = gateway.models()[0].pid or pytest.fail()
        os.kill(pid, signal.SIGSTOP)
        assert await gateway.actuator.unload("a", "a test")
        assert asked == [pid]


async def test_readings_that_fail_are_not_the_last_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the machine, its energy and its workers; whatever the failure was."""
    for name in ("MEASURE_PERIOD_S", "READ_PERIOD_S", "ENERGY_PERIOD_S"):
        monkeypatch.setattr(gateway_module, name, 0.01)
    num_read = dict.fromkeys(("machine", "joules", "worker"), 0)

    def fails_first(kind: str) -> None:
        num_read[kind] += 1
        if num_read[kind] < 3:
            raise ValueError(f"{kind}: what was read made no sense")

    class Failing(Readings):
        is_started = False

        def __call__(self) -> MachineSpec:
            if self.is_started:
                fails_first("machine")
            return super().__call__()

    def joules() -> float:
        fails_first("joules")
        return 5.0 * num_read["joules"]

    measure = ModelHost.measure

    async def measured(host: ModelHost) -> None:
        fails_first("worker")
        await measure(host)

    monkeypatch.setattr(ModelHost, "measure", measured)
    readings, meter = Failing(), RecordingMeter()
    async with heavy_serving(
        roomy("a"), read_machine=readings, read_joules=joules, meter=meter
    ) as (
        gateway,
        account,
    ):
        readings.is_started = True
        asked = msgspec.structs.replace(request(model="a", max_tokens=ENDLESS), app="mail")
        answer = await gateway.submit(asked)
        await until(lambda: min(num_read.values()) > 3 and meter.joules.get("mail", 0.0) > 0)
        await until(lambda: account.entry("a").measured_bytes is not None)
        answer.cancel()
