"""Real workers whose KV pool shrinks and grows while they answer, and who say how far they are."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from conftest import require_engine
from support.models import DEMO, plan_for
from support.serving import request, toy_plan

from brim.core.answer import FinishReason
from brim.core.plan import Plan
from brim.core.request import Priority
from brim.core.stance import WorkLimits
from brim.errors import WorkerDied
from brim.machine.process import process_memory
from brim.runtime.worker_process import Deltas, WorkerProcess
from brim.worker import protocol

pytestmark = pytest.mark.anyio

MIB = 1024 * 1024
LIMIT_S = 60.0


class Texts:
    """What a worker answers, by ticket."""

    def __init__(self) -> None:
        self.texts: dict[int, str] = {}
        self.ended: dict[int, asyncio.Event] = {}
        self._grew = asyncio.Event()

    def on_deltas(self, deltas: Deltas) -> None:
        for ticket, delta in deltas:
            self.texts[ticket] = self.texts.get(ticket, "") + delta.text
            if delta.finish_reason is not None:
                assert delta.finish_reason is FinishReason.LENGTH, delta.error
                self.ended[ticket].set()
        self._grew.set()

    async def until(self, fact: Callable[[], bool]) -> None:
        """Wait for a fact that comes with some delta."""
        async with asyncio.timeout(LIMIT_S):
            while not fact():
                self._grew.clear()
                await self._grew.wait()


@asynccontextmanager
async def worker(
    plan: Plan, texts: Texts, progress: list[float] | None = None, **options: Any
) -> AsyncIterator[WorkerProcess]:
    """A worker with its model loaded."""
    process = await WorkerProcess.spawn(plan, texts.on_deltas)
    try:
        said = [] if progress is None else progress
        await process.load(plan, protocol.WorkerOptions(**options), on_progress=said.append)
        yield process
    finally:
        await process.kill()


async def start(
    process: WorkerProcess, texts: Texts, ticket: int, *, max_tokens: int, **fields: Any
) -> None:
    prompt = f"number {ticket}: the sum of all values is " * 8
    await process.prepare(ticket, request(prompt=prompt, **fields))
    texts.ended[ticket] = asyncio.Event()
    process.start(ticket, max_tokens)


async def answers(plan: Plan, sizes: list[int]) -> tuple[dict[int, str], list[protocol.Resized]]:
    """Texts of idle and of running requests, the pool resized while the latter are written."""
    texts, found = Texts(), []
    async with worker(plan, texts) as process, asyncio.timeout(LIMIT_S):
        for ticket in range(5):
            await start(process, texts, ticket, max_tokens=2)
            await texts.ended[ticket].wait()
        for ticket in (10, 11, 12):
            await start(process, texts, ticket, max_tokens=120)
        for number, kv_tokens in enumerate(sizes):
            least = 10 * (number + 1)
            await texts.until(
                lambda least=least: all(  # type: ignore[misc]
                    len(texts.texts.get(ticket, "")) >= least for ticket in (10, 11, 12)
                )
            )
            found.append(await process.resize(kv_tokens))
        for event in texts.ended.values():
            await event.wait()
    return texts.texts, found


@pytest.mark.parametrize("engine", ["toy", "llamacpp", "mlx"])
async def test_answers_are_the_same_while_the_pool_changes(engine: str) -> None:
    """Down to what runs, up, down and up again, in the middle of three greedy answers."""
    require_engine(engine)
    plan = toy_plan(kv_tokens=16384) if engine == "toy" else plan_for(engine, kv_tokens=16384)
    still, _ = await answers(plan, [])
    moved, resized = await answers(plan, [0, 16384, 2048, 16384])
    assert moved == still
    assert [frame.error for frame in resized] == [None] * 4
    sizes = [frame.kv_tokens for frame in resized]
    assert sizes[0] <= 1536
    assert sizes[1:] == [16384, 2048, 16384]
    assert resized[0].num_dropped_tokens > 0
    assert resized[0].footprint.kv_bytes < resized[1].footprint.kv_bytes or engine == "mlx"


async def test_a_smaller_pool_gives_memory_back_to_the_system() -> None:
    """By the system's own account, while an answer is written."""
    require_engine("llamacpp")
    plan = plan_for("llamacpp", path=DEMO, kv_tokens=65536, kv_type="f16")
    texts = Texts()
    async with worker(plan, texts) as process:
        if (before := process_memory(process.pid)) is None:
            pytest.skip("the system does not say what a process holds")
        await start(process, texts, 1, max_tokens=60)
        await texts.until(lambda: bool(texts.texts.get(1)))
        kv_bytes = (await process.stats()).kv_bytes
        resized = await process.resize(0)
        after = process_memory(process.pid)
        assert after is not None
        saved = kv_bytes - resized.footprint.kv_bytes
        assert saved > 180 * MIB
        assert before.dirty_bytes - after.dirty_bytes > 0.9 * saved
        async with asyncio.timeout(LIMIT_S):
            await texts.ended[1].wait()


async def test_a_load_says_how_far_it_is() -> None:
    """Rising shares before the model is there, and none afterwards."""
    require_engine("llamacpp")
    progress: list[float] = []
    texts = Texts()
    async with worker(plan_for("llamacpp", path=DEMO), texts, progress) as process:
        heard = progress.copy()
        await process.stats()
        assert progress == heard
    assert heard == sorted(heard)
    assert heard
    assert all(0 < fraction <= 1 for fraction in heard)


async def test_weights_are_in_memory_when_a_model_is_loaded() -> None:
    """All file pages are resident before the first request, which brings no more of them."""
    require_engine("llamacpp")
    plan = plan_for("llamacpp", path=DEMO)
    texts = Texts()
    async with worker(plan, texts) as process:
        if (loaded := process_memory(process.pid)) is None or not loaded.file_bytes:
            pytest.skip("the system does not say which file pages a process holds")
        await start(process, texts, 1, max_tokens=4)
        async with asyncio.timeout(LIMIT_S):
            await texts.ended[1].wait()
        used = process_memory(process.pid)
        assert used is not None
        assert used.file_bytes - loaded.file_bytes < 0.1 * plan.model.weights_bytes


async def test_limits_reach_a_worker_with_the_load_and_later() -> None:
    """A background request waits for the limits to be lifted, however soon they were set."""
    texts = Texts()
    async with (
        worker(toy_plan(), texts, limits=WorkLimits(runs_background=False)) as process,
        asyncio.timeout(LIMIT_S),
    ):
        await start(process, texts, 1, max_tokens=5, priority=Priority.BACKGROUND)
        await start(process, texts, 2, max_tokens=5)
        await texts.ended[2].wait()
        stats = await process.stats()
        assert (stats.num_waiting, stats.num_sequences) == (1, 0)
        process.set_limits(WorkLimits())
        await texts.ended[1].wait()


async def test_limits_that_come_while_a_model_is_loaded_hold() -> None:
    """The newest of them, from the first request on."""
    texts = Texts()
    plan = toy_plan()
    process = await WorkerProcess.spawn(plan, texts.on_deltas)
    try:
        loading = asyncio.ensure_future(process.load(plan))
        await asyncio.sleep(0)
        process.set_limits(WorkLimits())
        process.set_limits(WorkLimits(runs_background=False))
        await loading
        await start(process, texts, 1, max_tokens=5, priority=Priority.BACKGROUND)
        await start(process, texts, 2, max_tokens=5)
        async with asyncio.timeout(LIMIT_S):
            await texts.ended[2].wait()
        assert (await process.stats()).num_waiting == 1
    finally:
        await process.kill()


async def test_a_worker_that_lost_its_pool_says_so_and_ends(tmp_path: Any) -> None:
    """Neither pool can be made: the gateway hears why, and the process leaves its memory."""
    require_engine("llamacpp")
    (tmp_path / "sitecustomize.py").write_text(
        "import brim.engine.llamacpp.loading as loading\n"
        "real, made = loading.new_context, []\n"
        "def once(*arguments):\n"
        "    if made:\n"
        "        raise loading.EngineError('llama.cpp: no memory for a context')\n"
        "    made.append(1)\n"
        "    return real(*arguments)\n"
        "loading.new_context = once\n"
    )
    plan = plan_for("llamacpp")
    environment = {**plan.environment, "PYTHONPATH": str(tmp_path)}
    texts = Texts()
    plan = msgspec.structs.replace(plan, environment=environment)
    async with worker(plan, texts) as process:
        resized = await process.resize(512)
        assert resized.error is not None
        assert "must be loaded again" in resized.error.message
        async with asyncio.timeout(LIMIT_S):
            death = await process.wait_dead()
        assert isinstance(death, WorkerDied)
        assert "no memory for a context" in str(death)
