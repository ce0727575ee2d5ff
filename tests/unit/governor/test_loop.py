"""The governor at work: what is done, proven, recorded and survived."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest
from support.looks import loaded
from support.virtual_time import run_virtually

from brim.config.tree import GovernorSettings
from brim.core.event import Event, EventKind
from brim.core.machine import Conditions, Pressure, ThermalState
from brim.core.stance import Stance
from brim.governor import loop as governor_loop
from brim.governor.loop import Governor
from brim.governor.readings import ModelReading
from brim.telemetry.event_log import EventLog

NORMAL = Conditions(pressure=Pressure.NORMAL)
WARNING = Conditions(pressure=Pressure.WARNING)
CRITICAL = Conditions(pressure=Pressure.CRITICAL)

LIMIT_S = 60.0
"""For what takes milliseconds on an idle machine, and ends here only if it never comes."""

FULL_BYTES = 10_000_000
SHRUNK_BYTES = FULL_BYTES - (4096 - 256) * 1024
"""A model of `loaded`, whose cells have 1024 bytes, with 256 of them left."""


class Hands:
    """An actuator over models in a dictionary; `before` is awaited ahead of each action."""

    def __init__(self, *models: ModelReading) -> None:
        self.found = {model.name: model for model in models}
        self.footprints = dict.fromkeys(self.found, FULL_BYTES)
        self.calls: list[str] = []
        self.before: Callable[[str], Awaitable[None]] | None = None
        self.unload_leaves = [0]
        """Bytes that each unload in turn leaves behind."""

    def models(self) -> tuple[ModelReading, ...]:
        return tuple(self.found.values())

    async def set_stance(self, stance: Stance) -> None:
        await self._call(f"stance {stance.memory}")

    async def drop_idle_kv(self, model: str) -> int:
        await self._call(f"drop {model}")
        self._change(model, kv_pool_tokens=256)
        self.footprints[model] = SHRUNK_BYTES
        return 77

    async def grow_kv(self, model: str) -> None:
        await self._call(f"grow {model}")
        self._change(model, kv_pool_tokens=self.found[model].kv_plan_tokens)
        self.footprints[model] = FULL_BYTES

    async def unload(self, model: str, cause: str) -> bool:
        await self._call(f"unload {model}")
        if self.found[model].num_in_flight:
            return False
        self._change(model, is_loaded=False, kv_pool_tokens=0)
        self.footprints[model] = self.unload_leaves.pop(0)
        return True

    async def measure(self, model: str) -> int:
        return self.footprints[model]

    async def _call(self, what: str) -> None:
        self.calls.append(what)
        if self.before is not None:
            await self.before(what)

    def _change(self, model: str, **fields: Any) -> None:
        self.found[model] = msgspec.structs.replace(self.found[model], **fields)


class Desk:
    """A governor over hands, in the running loop's time."""

    def __init__(self, hands: Hands) -> None:
        self.hands = hands
        self.log = EventLog()
        clock = asyncio.get_running_loop().time
        self.governor = Governor(
            lambda: NORMAL,
            hands,
            self.log,
            GovernorSettings(),
            clock=clock,
            unix_clock=clock,
        )

    def recorded(self) -> list[tuple[EventKind, str]]:
        return [(event.kind, event.model) for event in self.log.events()]

    def one(self, kind: EventKind) -> Event:
        (event,) = [event for event in self.log.events() if event.kind is kind]
        return event


def virtually(test: Callable[[Desk], Awaitable[None]], *models: ModelReading) -> Desk:
    """Run a test's body in virtual time over these models."""

    async def body() -> Desk:
        desk = Desk(Hands(*models))
        await test(desk)
        return desk

    return run_virtually(body())


def test_a_shrunk_pool_is_measured_before_and_after() -> None:
    """Its event has the cause, bytes before and after, and the cells that went."""

    async def body(desk: Desk) -> None:
        await desk.governor.step(WARNING)
        await desk.governor.settle()

    desk = virtually(body, loaded())
    assert desk.hands.calls == ["stance warning", "drop chat"]
    event = desk.one(EventKind.KV_SHRUNK)
    assert event.cause == "the system reports warning pressure"
    assert (event.before_bytes, event.after_bytes) == (FULL_BYTES, SHRUNK_BYTES)
    assert event.detail == {
        "pool_tokens_before": 4096,
        "pool_tokens_after": 256,
        "dropped_tokens": 77,
    }


def test_an_unload_is_done_when_the_footprint_fell() -> None:
    """What is left behind is reported, and unloaded again until it is gone."""

    async def body(desk: Desk) -> None:
        desk.hands.unload_leaves = [FULL_BYTES, 0]
        await desk.governor.step(CRITICAL)
        await desk.governor.settle()

    desk = virtually(body, loaded())
    assert desk.hands.calls == ["stance critical", "unload chat", "unload chat"]
    assert desk.recorded()[1:] == [
        (EventKind.UNLOAD_FAILED, "chat"),
        (EventKind.MODEL_UNLOADED, "chat"),
    ]
    failed, unloaded = desk.log.events()[1:]
    assert (failed.before_bytes, failed.after_bytes) == (FULL_BYTES, FULL_BYTES)
    assert (unloaded.before_bytes, unloaded.after_bytes) == (FULL_BYTES, 0)
    assert unloaded.took_s is not None
    assert unloaded.took_s > 5.0


def test_an_unload_that_came_too_late_is_no_event() -> None:
    """A model that was asked for meanwhile stays, and nothing is recorded of it."""

    async def body(desk: Desk) -> None:
        async def ask(what: str) -> None:
            if what == "unload chat":
                desk.hands._change("chat", num_in_flight=1)

        desk.hands.before = ask
        await desk.governor.step(CRITICAL)
        await desk.governor.settle()

    assert virtually(body, loaded()).recorded() == [(EventKind.STANCE_CHANGED, "")]


def test_a_model_that_is_back_was_unloaded_all_the_same() -> None:
    """What is measured then is the next worker's, and no proof against the unload."""

    async def body(desk: Desk) -> None:
        async def reload_soon(what: str) -> None:
            if what == "unload chat":
                asyncio.get_running_loop().call_later(
                    0.25, lambda: desk.hands._change("chat", is_loaded=True)
                )

        desk.hands.before = reload_soon
        desk.hands.unload_leaves = [FULL_BYTES]
        await desk.governor.step(CRITICAL)
        await desk.governor.settle()

    desk = virtually(body, loaded())
    assert desk.hands.calls == ["stance critical", "unload chat"]
    event = desk.one(EventKind.MODEL_UNLOADED)
    assert event.after_bytes is None
    assert event.took_s is not None
    assert event.took_s < 1.0, "nothing is waited for any more"


class Paired(Hands):
    """Hands over a target and its draft, which leave together."""

    async def unload(self, model: str, cause: str) -> bool:
        await self._call(f"unload {model}")
        if not self.found[model].is_loaded:
            return False
        for name in ("target", "draft"):
            self._change(name, is_loaded=False, kv_pool_tokens=0)
            self.footprints[name] = 0
        return True


@pytest.mark.parametrize(("conditions", "idle_s"), [(CRITICAL, 5.0), (NORMAL, 200.0)])
def test_both_of_a_pair_are_recorded_when_they_leave_together(
    conditions: Conditions, idle_s: float
) -> None:
    """Each once, whether both were to be unloaded or one took the other with it."""
    models = [
        loaded(name, idle_s=idle_s, idle_unload_s=180.0, resident_bytes=FULL_BYTES)
        for name in ("target", "draft")
    ]

    async def body() -> EventLog:
        desk = Desk(Paired(*models))
        await desk.governor.step(conditions)
        await desk.governor.settle()
        return desk.log

    events = [e for e in run_virtually(body()).events() if e.kind is EventKind.MODEL_UNLOADED]
    assert sorted(event.model for event in events) == ["draft", "target"]
    assert all((e.before_bytes, e.after_bytes) == (FULL_BYTES, 0) for e in events)


def test_an_action_that_changed_nothing_is_no_event() -> None:
    """A pool that is as large as before, with nothing dropped or grown, has no news."""

    class Stuck(Hands):
        async def drop_idle_kv(self, model: str) -> int:
            return 0

        async def grow_kv(self, model: str) -> None:
            pass

    async def body() -> EventLog:
        desk = Desk(Stuck(loaded()))
        await desk.governor.step(WARNING)
        await desk.governor.settle()
        desk.hands.found["chat"] = loaded(kv_pool_tokens=300)
        for _ in range(50):
            await desk.governor.step(NORMAL)
            await desk.governor.settle()
            await asyncio.sleep(1.0)
        return desk.log

    kinds = {event.kind for event in run_virtually(body()).events()}
    assert kinds == {EventKind.STANCE_CHANGED}


def test_idle_kv_that_went_from_a_pool_that_stayed_is_its_own_event() -> None:
    """Dropped cells are told even where the engine could not give the memory back."""

    class Kept(Hands):
        async def drop_idle_kv(self, model: str) -> int:
            return 55

    async def body() -> EventLog:
        desk = Desk(Kept(loaded()))
        await desk.governor.step(WARNING)
        await desk.governor.settle()
        return desk.log

    event = run_virtually(body()).events()[-1]
    assert (event.kind, event.detail["dropped_tokens"]) == (EventKind.IDLE_KV_DROPPED, 55)


def test_an_action_that_fails_is_recorded_and_tried_again() -> None:
    """The governor goes on, and the next attempt comes after its back-off."""

    async def body(desk: Desk) -> None:
        async def fail(what: str) -> None:
            if desk.hands.calls == ["stance warning", "drop chat"]:
                raise OSError("no space left")

        desk.hands.before = fail
        for _ in range(30):
            await desk.governor.step(WARNING)
            await desk.governor.settle()
            await asyncio.sleep(1.0)

    desk = virtually(body, loaded())
    failed = desk.one(EventKind.ACTION_FAILED)
    assert failed.detail == {"action": "drop idle kv", "error": "OSError: no space left"}
    assert desk.hands.calls.count("drop chat") == 2
    assert desk.one(EventKind.KV_SHRUNK).at_unix_s == 10.0


def test_a_slow_action_does_not_hold_up_the_next_look() -> None:
    """While a pool still shrinks, critical pressure is seen and answered at once."""

    async def body(desk: Desk) -> None:
        async def dawdle(what: str) -> None:
            if what == "drop slow":
                await asyncio.sleep(30.0)

        desk.hands.before = dawdle
        desk.hands.unload_leaves = [0, 0]
        await desk.governor.step(WARNING)
        await asyncio.sleep(1.0)
        await desk.governor.step(CRITICAL)
        await asyncio.sleep(0.0)
        assert desk.hands.calls[-1] == "unload quick"
        assert "unload slow" not in desk.hands.calls, "never two actions on one model"
        await desk.governor.settle()
        await desk.governor.step(CRITICAL)
        await desk.governor.settle()
        assert desk.hands.calls[-1] == "unload slow"

    virtually(body, loaded("slow"), loaded("quick", can_resize_kv=False))


def test_a_stance_that_fails_is_applied_later_and_complained_of_once() -> None:
    """Every look tries again; the failure is one event."""

    async def body(desk: Desk) -> None:
        async def fail(what: str) -> None:
            if desk.hands.calls.count(what) < 4:
                raise OSError("the worker does not listen")

        desk.hands.before = fail
        for _ in range(6):
            await desk.governor.step(WARNING)
            await asyncio.sleep(1.0)

    desk = virtually(body)
    assert desk.hands.calls == ["stance warning"] * 4
    assert desk.recorded() == [(EventKind.STANCE_CHANGED, ""), (EventKind.ACTION_FAILED, "")]


def test_a_new_power_mode_is_measured_in_watts() -> None:
    """Ten seconds after it an event has the watts before and after."""

    async def body(desk: Desk) -> None:
        hot = Conditions(thermal=ThermalState.HEAVY)
        for second in range(15):
            await desk.governor.step(hot, watts=30.0 if second < 5 else 12.0)
            await asyncio.sleep(1.0)

    event = virtually(body).one(EventKind.STANCE_MEASURED)
    assert (event.before_watts, event.after_watts, event.at_unix_s) == (30.0, 12.0, 10.0)


def test_an_idle_model_is_announced() -> None:
    """Apps are told when it will leave."""

    async def body(desk: Desk) -> None:
        await desk.governor.step(NORMAL)

    event = virtually(body, loaded(idle_s=155.0, idle_unload_s=180.0)).one(EventKind.MODEL_LEAVING)
    assert event.detail == {"leaves_in_s": 25.0}


def test_grown_pools_are_recorded() -> None:
    """After a steady time a model in use has its pool back, with the bytes that took."""

    async def body(desk: Desk) -> None:
        for second in range(60):
            await desk.governor.step(WARNING if second == 0 else NORMAL)
            await desk.governor.settle()
            await asyncio.sleep(1.0)

    event = virtually(body, loaded()).one(EventKind.KV_GROWN)
    assert (event.before_bytes, event.after_bytes) == (SHRUNK_BYTES, FULL_BYTES)
    assert event.detail == {"pool_tokens_before": 256, "pool_tokens_after": 4096}


def test_swapping_is_seen_in_counters() -> None:
    """Bytes since boot become rates, and rates that last a level."""

    async def body(desk: Desk) -> None:
        for second in range(4):
            moved = second * 100_000_000
            await desk.governor.step(Conditions(swapped_in_bytes=moved, swapped_out_bytes=moved))
            await asyncio.sleep(1.0)

    assert virtually(body).governor.stance.memory is Pressure.CRITICAL


def test_events_of_a_simulated_machine_say_so() -> None:
    """Whatever follows from a scenario's reading is marked."""

    async def body(desk: Desk) -> None:
        await desk.governor.step(msgspec.structs.replace(WARNING, is_simulated=True))
        await desk.governor.settle()

    assert all(event.is_simulated for event in virtually(body, loaded()).log.events())


def governor_reading(read: Callable[[], Conditions], hands: Hands, **more: Any) -> Governor:
    return Governor(read, hands, EventLog(), GovernorSettings(), **more)


async def until(fact: Callable[[], bool]) -> None:
    """Let everything else run until a fact that nothing announces."""
    async with asyncio.timeout(LIMIT_S):
        while not fact():  # noqa: ASYNC110
            await asyncio.sleep(0)


@pytest.mark.anyio
async def test_a_notification_brings_the_next_look() -> None:
    """Woken, the governor does not wait for its period."""
    num_looks = 0

    def read() -> Conditions:
        nonlocal num_looks
        num_looks += 1
        return NORMAL

    governor = governor_reading(read, Hands(), period_s=3600.0)
    running = asyncio.create_task(governor.run())
    await until(lambda: num_looks == 1)
    governor.wake()
    await until(lambda: num_looks == 2)
    running.cancel()
    await asyncio.wait([running])


@pytest.mark.anyio
async def test_the_end_of_an_action_brings_the_next_look() -> None:
    """What came back may be enough, and what the action held up can go on."""
    num_looks, may_end = 0, asyncio.Event()

    def read() -> Conditions:
        nonlocal num_looks
        num_looks += 1
        return WARNING

    async def wait(what: str) -> None:
        if what == "drop chat":
            await may_end.wait()

    hands = Hands(loaded())
    hands.before = wait
    governor = governor_reading(read, hands, period_s=3600.0)
    running = asyncio.create_task(governor.run())
    await until(lambda: "drop chat" in hands.calls)
    assert num_looks == 1
    may_end.set()
    await until(lambda: num_looks == 2)
    running.cancel()
    await asyncio.wait([running])


@pytest.mark.anyio
async def test_a_reading_that_hangs_does_not_stop_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks go on without the machine, and with it once it answers; no second thread is begun."""
    monkeypatch.setattr(governor_loop, "READ_LIMIT_S", 0.001)
    answers, num_reads = threading.Event(), 0

    def read() -> Conditions:
        nonlocal num_reads
        num_reads += 1
        answers.wait(LIMIT_S)
        return WARNING

    governor = governor_reading(read, Hands())
    await governor.look()
    await governor.look()
    assert governor.stance == Stance()
    assert num_reads == 1
    monkeypatch.setattr(governor_loop, "READ_LIMIT_S", LIMIT_S)
    answers.set()
    await governor.look()
    assert governor.stance != Stance()
    assert num_reads == 1


@pytest.mark.anyio
async def test_it_survives_whatever_fails_around_it() -> None:
    """A reading, a runtime or a record of events that raises costs one look."""
    num_looks = 0

    def read() -> Conditions:
        nonlocal num_looks
        num_looks += 1
        if num_looks == 1:
            raise OSError("no such sensor")
        return WARNING

    class Failing(Hands):
        def models(self) -> tuple[ModelReading, ...]:
            if num_looks == 2:
                raise KeyError("chat")
            return super().models()

    def full_disk(event: Event) -> None:
        raise OSError("no space left")

    hands = Failing()
    governor = Governor(read, hands, EventLog(full_disk), GovernorSettings(), period_s=0.001)
    running = asyncio.create_task(governor.run())
    await until(lambda: hands.calls == ["stance warning"])
    running.cancel()
    await asyncio.wait([running])
    assert num_looks >= 4


@pytest.mark.anyio
async def test_ending_it_ends_what_it_began() -> None:
    """Actions under way are cancelled with it."""
    hands = Hands(loaded())

    async def hang(what: str) -> None:
        if what == "drop chat":
            await asyncio.Event().wait()

    hands.before = hang
    governor = governor_reading(lambda: WARNING, hands)
    running = asyncio.create_task(governor.run())
    await until(lambda: "drop chat" in hands.calls)
    running.cancel()
    await asyncio.wait([running])
    assert [task for task in asyncio.all_tasks() if task.get_name().startswith("governor")] == []
