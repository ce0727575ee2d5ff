"""One model's worker over its lives, with workers that are described."""

import asyncio
from typing import Any, cast

import pytest
from support.serving import toy_plan

from brim.config.tree import WorkerSettings
from brim.core.memory import Footprint
from brim.core.stance import WorkLimits
from brim.errors import WorkerDied
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
