"""One model's worker over its lives, with workers that are described."""

import asyncio
from typing import Any, cast

import pytest
from support.serving import toy_plan

from brim.config.tree import WorkerSettings
from brim.core.memory import Footprint
from brim.core.stance import WorkLimits
from brim.errors import EngineError, WorkerDied
from brim.runtime.api import ModelState
from brim.runtime.quarantine import FIRST_WAIT_S, Quarantine
from brim.runtime.recorder import Recorder
from brim.runtime.supervisor import Supervisor
from brim.runtime.worker_process import WorkerProcess
from brim.telemetry.event_log import EventLog
from brim.worker.protocol import Loaded, Resized, WorkerOptions

pytestmark = pytest.mark.anyio

FOOTPRINT = Footprint(weights_bytes=1, mapped_weights_bytes=0, kv_bytes=1, compute_bytes=1)
SLOW = WorkLimits(pace_fraction=0.5)


class Worker:
    """Does what it is told, and keeps the limits that it works within."""

    pid = 1

    def __init__(self) -> None:
        self.is_connected = True
        self.limits: WorkLimits | None = None
        self.kv_tokens = 0
        self.death: asyncio.Future[WorkerDied] = asyncio.get_running_loop().create_future()
        self.on_resize: Any = None

    async def load(self, plan: Any, options: WorkerOptions, *, on_progress: Any) -> Loaded:
        self.limits, self.kv_tokens = options.limits, plan.kv_tokens
        return Loaded(FOOTPRINT, load_s=0.0, exact_profile=True, forks_share_kv=True)

    async def resize(self, kv_tokens: int) -> Resized:
        if self.on_resize is not None:
            self.on_resize()
        self.kv_tokens = kv_tokens
        return Resized(kv_tokens, FOOTPRINT)

    def set_limits(self, limits: WorkLimits) -> None:
        if self.is_connected:
            self.limits = limits

    def die(self) -> None:
        self.is_connected = False
        self.death.set_result(WorkerDied("it died"))

    async def wait_dead(self) -> WorkerDied:
        return await asyncio.shield(self.death)

    async def wait_reaped(self) -> None:
        return

    async def ask_to_end(self) -> bool:
        return True

    async def kill(self) -> None:
        self.is_connected = False


async def test_limits_that_come_while_a_new_worker_gets_the_last_ones_pool_hold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A worker that follows one that died works within what was said last, whenever it was said."""
    first, second = Worker(), Worker()
    workers = iter([first, second])

    async def spawn(plan: Any, on_deltas: Any) -> Worker:
        return next(workers)

    monkeypatch.setattr(WorkerProcess, "spawn", spawn)
    supervisor = Supervisor(
        toy_plan(kv_tokens=4096),
        WorkerOptions(),
        WorkerSettings(restart_backoff_s=0.0),
        quarantine=Quarantine(),
        on_deltas=lambda deltas: None,
        on_death=lambda death: None,
        record=Recorder(EventLog()),
    )
    second.on_resize = lambda: supervisor.set_limits(SLOW)
    await supervisor.start()
    await supervisor.resize(1024)
    first.die()
    assert cast("Any", await supervisor.worker()) is second
    assert (second.kv_tokens, second.limits) == (1024, SLOW)
    await supervisor.stop()


class Clock:
    """Moved by hand."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def supervised(
    monkeypatch: pytest.MonkeyPatch,
    clock: Clock,
    workers: list[Worker],
    *,
    deaths_before_quarantine: int = 1,
    quarantine: Quarantine | None = None,
) -> Supervisor:
    """A supervisor whose workers are these; more cannot be started."""
    left = iter(workers)

    async def spawn(plan: Any, on_deltas: Any) -> Worker:
        worker = next(left, None)
        if worker is None:
            raise WorkerDied("it died at once")
        return worker

    monkeypatch.setattr(WorkerProcess, "spawn", spawn)
    return Supervisor(
        toy_plan(),
        WorkerOptions(),
        WorkerSettings(restart_backoff_s=0.0, deaths_before_quarantine=deaths_before_quarantine),
        quarantine=quarantine or Quarantine(clock),
        on_deltas=lambda deltas: None,
        on_death=lambda death: None,
        record=Recorder(EventLog()),
    )


async def quarantined(supervisor: Supervisor) -> None:
    async with asyncio.timeout(60.0):
        while supervisor.state is not ModelState.QUARANTINED:  # noqa: ASYNC110
            await asyncio.sleep(0)


async def test_only_a_request_that_comes_late_enough_ends_a_quarantine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before that nothing is started, and afterwards one worker; its answer makes it well."""
    first, second, clock = Worker(), Worker(), Clock()
    supervisor = supervised(monkeypatch, clock, [first, second])
    await supervisor.start()
    first.die()
    await quarantined(supervisor)
    supervisor.try_again()
    with pytest.raises(EngineError, match="in 5 min or later"):
        await supervisor.worker()
    clock.now_s = FIRST_WAIT_S
    with pytest.raises(EngineError, match="its next request tries it"):
        await supervisor.worker()
    supervisor.try_again()
    supervisor.try_again()
    assert cast("Any", await supervisor.worker()) is second
    assert supervisor.state is ModelState.READY
    await supervisor.stop()


async def test_a_trial_that_fails_is_the_last_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waited for it is told why, and the next one is twice as far away."""
    first, clock = Worker(), Clock()
    supervisor = supervised(monkeypatch, clock, [first])
    await supervisor.start()
    first.die()
    await quarantined(supervisor)
    clock.now_s = FIRST_WAIT_S
    supervisor.try_again()
    with pytest.raises(EngineError, match=r"it died at once.*in 10 min or later"):
        await supervisor.worker()
    await supervisor.stop()


async def test_a_model_on_trial_has_one_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it was loaded anew meanwhile, and its deaths are counted from the beginning."""
    first, clock = Worker(), Clock()
    quarantine = Quarantine(clock)
    quarantine.begin()
    quarantine.lift()
    workers = [first, Worker()]
    supervisor = supervised(
        monkeypatch, clock, workers, deaths_before_quarantine=3, quarantine=quarantine
    )
    await supervisor.start()
    first.die()
    await quarantined(supervisor)
    assert supervisor.num_deaths == 1
    await supervisor.stop()
