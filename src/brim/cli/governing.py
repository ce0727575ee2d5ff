"""The governor beside a gateway: its senses, its hands, and what keeps the machine awake."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from brim.config.tree import GovernorSettings
from brim.core.machine import Conditions
from brim.governor.actuator import Actuator
from brim.governor.loop import PERIOD_S, Governor
from brim.machine.energy import EnergyMeter
from brim.machine.power_assertion import PowerAssertion
from brim.machine.pressure_watch import PressureWatch
from brim.telemetry.event_log import EventLog
from brim.telemetry.events import log_event

AWAKE_PERIOD_S = 1.0
"""Between two looks at whether anything runs; a machine falls asleep after minutes."""


@contextlib.asynccontextmanager
async def governed(
    read: Callable[[], Conditions],
    actuator: Actuator,
    events: EventLog,
    settings: GovernorSettings,
    *,
    ram_bytes: int,
    speed: float = 1.0,
    clock: Callable[[], float] = time.monotonic,
    is_simulated: bool = False,
) -> AsyncIterator[None]:
    """Have models governed meanwhile; where the settings want no governor, only kept awake.

    Args:
        read: What the machine feels; called outside the event loop.
        actuator: The hands.
        events: Where actions are recorded.
        settings: The settings.
        ram_bytes: All memory that there is for us.
        speed: How much faster than real the clock runs.
        clock: Seconds, monotonic.
        is_simulated: Whether this machine's own notifications of pressure, and its watts, would be
            another machine's.
    """
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(in_background(_keep_awake(actuator), "keeping awake"))
        if settings.enabled:
            watch = None if is_simulated else PressureWatch(lambda: _wake(loop, governor))
            loop = asyncio.get_running_loop()
            governor = Governor(
                read if watch is None else lambda: watch.completed(read()),
                actuator,
                events,
                settings,
                clock=clock,
                read_watts=None if is_simulated else EnergyMeter().read_watts,
                ram_bytes=ram_bytes,
                period_s=PERIOD_S / speed,
            )
            if watch is not None:
                watch.start()
                stack.callback(watch.close)
            await stack.enter_async_context(in_background(governor.run(), "governor"))
        yield


def _wake(loop: asyncio.AbstractEventLoop, governor: Governor) -> None:
    """From the watch's thread; a loop that has been closed needs no more looks."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(governor.wake)


@contextlib.asynccontextmanager
async def in_background(work: Coroutine[Any, Any, None], name: str) -> AsyncIterator[None]:
    """Have work done meanwhile; it is cancelled, and over, afterwards."""
    task = asyncio.create_task(work, name=name)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled() and (failure := task.exception()) is not None:
            log_event("background_task_failed", task=name, reason=repr(failure))


async def _keep_awake(actuator: Actuator) -> None:
    """Keep the machine from falling asleep while somebody waits for an answer or a load."""
    assertion = PowerAssertion()
    if not assertion.is_available:
        return
    try:
        while True:
            models = actuator.models()
            assertion.hold(any(model.num_in_flight or model.num_waiting for model in models))
            await asyncio.sleep(AWAKE_PERIOD_S)
    finally:
        assertion.close()
