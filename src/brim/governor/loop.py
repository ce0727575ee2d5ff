"""The governor at work: looks once a second, and when woken, decides, and has it done.

The policy decides (`policy`), an `Actuator` does, `steps` proves what was done and records it.
Actions on different models run at the same time and never two on one; a look does not wait for
them, so that a critical level is seen while a pool is still shrinking.
"""

import asyncio
import contextlib
import functools
import threading
import time
from collections.abc import Callable

import msgspec

from brim.config.tree import GovernorSettings
from brim.core.machine import Conditions
from brim.core.stance import PowerMode, Stance
from brim.governor.actions import Action, ActionKind
from brim.governor.actuator import Actuator as Actuator
from brim.governor.counter_rates import CounterRates
from brim.governor.policy import PolicyState, decide
from brim.governor.readings import ModelReading, Readings
from brim.governor.steps import Steps
from brim.telemetry.event_log import EventLog
from brim.telemetry.events import log_event

PERIOD_S = 1.0
"""macOS answers at most a few fresh readings a second, and a browser takes a gigabyte in one."""

MIN_PERIOD_S = 0.1
"""Between two looks however often it is woken: notifications come in flocks."""

READ_LIMIT_S = 2.0
"""A reading is milliseconds; a file system or a call that hangs must not hang the governor."""

STANCE_LIMIT_S = 1.0
"""A stance is a frame to each worker; one that does not take it must not hold up the others."""

WATTS_AFTER_S = 10.0
"""After a new power mode: running steps have ended and the meter's window of 5 s has passed."""


class Governor:
    """Gives memory and power back when they are short, and takes them again when they are not.

    Args:
        read: What the machine feels; called outside the event loop.
        actuator: Does what is decided.
        events: Where every action is recorded.
        settings: The settings.
        clock: Seconds, monotonic.
        read_watts: What the chip draws, where the machine can tell; called with `read`.
        ram_bytes: All memory there is for us; without it, available bytes say nothing.
        period_s: Between two looks.
        unix_clock: What events are stamped with.
    """

    def __init__(
        self,
        read: Callable[[], Conditions],
        actuator: Actuator,
        events: EventLog,
        settings: GovernorSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
        read_watts: Callable[[], float | None] | None = None,
        ram_bytes: int | None = None,
        period_s: float = PERIOD_S,
        unix_clock: Callable[[], float] = time.time,
    ) -> None:
        self._read = read
        self._actuator = actuator
        self._settings = settings
        self._clock = clock
        self._read_watts = read_watts
        self._ram_bytes = ram_bytes
        self._period_s = period_s
        self._state = PolicyState()
        self._rates = CounterRates()
        self._steps = Steps(actuator, events, unix_clock=unix_clock)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._owed_stance: Action | None = None
        self._watts_due: tuple[float, Action, float] | None = None
        self._reading: asyncio.Future[tuple[Conditions, float | None]] | None = None
        self._awake = asyncio.Event()

    @property
    def stance(self) -> Stance:
        """What was decided to hold now."""
        return self._state.stance

    async def run(self) -> None:
        """Look and act until cancelled; actions under way are dropped then."""
        try:
            while True:
                self._awake.clear()
                try:
                    await self.look()
                except Exception as exc:  # a governor that is gone gives nothing back any more
                    log_event("governor_look_failed", reason=repr(exc))
                await asyncio.sleep(min(MIN_PERIOD_S, self._period_s))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(max(0.0, self._period_s - MIN_PERIOD_S)):
                        await self._awake.wait()
        finally:
            await self.stop()

    def wake(self) -> None:
        """Look soon: something happened.  Call it on the event loop's thread."""
        self._awake.set()

    async def look(self) -> None:
        """Read the machine and do what follows."""
        await self.step(*await self._conditions())

    async def step(self, conditions: Conditions, watts: float | None = None) -> None:
        """Decide by these conditions and begin what was decided."""
        try:
            models = self._actuator.models()
        except Exception as exc:
            log_event("models_unread", reason=repr(exc))
            return
        at_s = self._clock()
        readings = Readings(
            at_s=at_s,
            conditions=conditions,
            ram_bytes=self._ram_bytes,
            **self._rates.after(conditions, at_s)._asdict(),
            watts=watts,
            models=tuple(self._with_change(model) for model in models),
        )
        self._steps.is_simulated = conditions.is_simulated
        power_before = self._state.stance.power
        self._state, actions = decide(self._state, readings, self._settings)
        self._note_watts(readings)
        for action in actions:
            if action.kind is ActionKind.SET_STANCE:
                self._owed_stance = action
                self._steps.record_stance(action, watts)
                self._await_watts(action, power_before, readings)
        await self._apply_stance()
        for action in actions:
            self._begin(action, readings)

    async def settle(self) -> None:
        """Return when no action is under way."""
        while self._tasks:
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def stop(self) -> None:
        """Drop actions that are under way."""
        tasks = tuple(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _with_change(self, model: ModelReading) -> ModelReading:
        if model.name not in self._tasks:
            return model
        return msgspec.structs.replace(model, is_changing=True)

    async def _apply_stance(self) -> None:
        """Have the newest stance applied; one that could not be is tried again at each look."""
        action = self._owed_stance
        if action is None or action.stance is None:
            return
        try:
            async with asyncio.timeout(STANCE_LIMIT_S):
                await self._actuator.set_stance(action.stance)
        except Exception as exc:
            self._steps.record_failure(action, exc)
        else:
            self._owed_stance = None

    def _begin(self, action: Action, readings: Readings) -> None:
        if action.kind is ActionKind.SET_STANCE:
            return
        if action.kind is ActionKind.ANNOUNCE_LEAVING:
            self._steps.record_leaving(action)
            return
        model = next(model for model in readings.models if model.name == action.model)
        task = asyncio.get_running_loop().create_task(
            self._steps.do(action, model), name=f"governor: {action.kind} {action.model}"
        )
        self._tasks[action.model] = task
        task.add_done_callback(functools.partial(self._ended, action.model))

    def _ended(self, model: str, task: "asyncio.Task[None]") -> None:
        del self._tasks[model]
        if not task.cancelled():
            task.exception()  # `Steps.do` has recorded whatever went wrong
        self.wake()  # the memory that came back may be enough, and what it held up can go on

    def _await_watts(self, action: Action, before: PowerMode, readings: Readings) -> None:
        if readings.watts is None or self._state.stance.power is before:
            return
        self._watts_due = (readings.at_s + WATTS_AFTER_S, action, readings.watts)

    def _note_watts(self, readings: Readings) -> None:
        """Record what a power mode did to the power drawn, once that can be seen."""
        if self._watts_due is None or readings.watts is None:
            return
        due_s, action, before_watts = self._watts_due
        if readings.at_s >= due_s:
            self._watts_due = None
            self._steps.record_watts(action, before_watts, readings.watts)

    async def _conditions(self) -> tuple[Conditions, float | None]:
        """A reading, or one that says nothing where it fails or takes too long."""
        if self._reading is None or self._reading.done():
            self._reading = _in_daemon(self._read_all)
        try:
            async with asyncio.timeout(READ_LIMIT_S):
                return await asyncio.shield(self._reading)
        except Exception as exc:
            log_event("conditions_unread", reason=repr(exc))
            return Conditions(), None

    def _read_all(self) -> tuple[Conditions, float | None]:
        return self._read(), None if self._read_watts is None else self._read_watts()


def _in_daemon(
    read: Callable[[], tuple[Conditions, float | None]],
) -> "asyncio.Future[tuple[Conditions, float | None]]":
    """A call in a thread that nobody has to wait for, lest one that hangs keep us from ending."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[tuple[Conditions, float | None]] = loop.create_future()
    # One that fails after we gave it up is nobody's any more.
    future.add_done_callback(lambda done: None if done.cancelled() else done.exception())

    def finish(result: tuple[Conditions, float | None] | None, error: Exception | None) -> None:
        if future.done():
            return
        if result is not None:
            future.set_result(result)
        elif error is not None:
            future.set_exception(error)

    def work() -> None:
        result, error = None, None
        try:
            result = read()
        except Exception as exc:
            error = exc
        with contextlib.suppress(RuntimeError):  # the loop has been closed meanwhile
            loop.call_soon_threadsafe(finish, result, error)

    threading.Thread(target=work, name="reading the machine", daemon=True).start()
    return future
