"""Workers die here, in every way that a process can; the gateway must not."""

import asyncio
import errno
import functools
import operator
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import msgspec
import psutil
import pytest
from conftest import require_engine
from support.models import DEMO, plan_for
from support.serving import (
    ENDLESS,
    ask,
    collect,
    endless_plan,
    request,
    serving,
    settings_with,
    toy_plan,
    until,
)

from brim.core.answer import FinishReason
from brim.core.event import EventKind
from brim.core.plan import Plan
from brim.errors import Busy, EngineError, WorkerDied
from brim.runtime import gateway as gateway_module
from brim.runtime import quarantine, supervisor, worker_process
from brim.runtime.api import ModelState
from brim.runtime.gateway import Gateway
from brim.worker import protocol


def worker_pid(gateway: Gateway) -> int:
    pid = gateway.models()[0].pid
    assert pid is not None
    return pid


def is_gone(pid: int) -> bool:
    """Whether a process is dead, reaped or not (a container may have nobody who reaps)."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
def defective_plan(request: pytest.FixtureRequest, tmp_path: Path) -> Plan:
    """A plan whose worker runs the given lines first: a real process with a real defect."""
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(request.param))
    plan = toy_plan()
    plan.environment["PYTHONPATH"] = str(tmp_path)
    return plan


def with_defect(lines: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("defective_plan", [lines], indirect=True, ids=["defect"])


@pytest.fixture(params=["toy", "llamacpp"])
def plan(request: pytest.FixtureRequest) -> Plan:
    """Room for nine long answers, on the teaching engine and on the demo model."""
    require_engine(request.param)
    if request.param == "toy":
        return toy_plan(context_tokens=ENDLESS, kv_tokens=9 * ENDLESS)
    return plan_for("llamacpp", path=DEMO, context_tokens=2048, kv_tokens=9 * 2048)


@pytest.mark.parametrize(
    "anyio_backend", ["asyncio", pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop")]
)
@pytest.mark.anyio
@pytest.mark.usefixtures("no_blocking")
async def test_a_killed_worker_ends_eight_streams_and_the_next_request_is_served(
    plan: Plan,
) -> None:
    """Each stream has its error within a second; a request sent at once gets a whole answer."""
    name, max_tokens = plan.model.name, plan.context_tokens - 20
    asked = request(prompt="def f(x):", model=name, max_tokens=max_tokens)
    async with serving(plan) as gateway:
        answers = [await gateway.submit(asked) for _ in range(8)]
        streams = [aiter(answer) for answer in answers]
        for stream in streams:
            await anext(stream)
        os.kill(worker_pid(gateway), signal.SIGKILL)
        short = request(prompt="def f(x):", model=name, max_tokens=20)
        following = asyncio.ensure_future(ask(gateway, short))
        for stream in streams:
            last = [delta async for deltas in stream for delta in deltas][-1]
            assert last.finish_reason is FinishReason.ERROR
            assert last.error is not None
            assert last.error.kind == "WorkerDied"
            assert "killed by signal 9 (SIGKILL)" in last.error.message
            assert "it is being restarted" in last.error.message
            assert last.error.retry_after_s is not None
        assert await following
        status = gateway.models()[0]
        assert (status.state, status.num_deaths) == (ModelState.READY, 1)


@pytest.mark.anyio
@pytest.mark.usefixtures("no_blocking")
async def test_a_request_that_waits_in_the_worker_survives_a_death() -> None:
    """Nothing of it has happened yet, so it is prepared again for the new worker."""
    async with serving(endless_plan(kv_tokens=ENDLESS + 2000)) as gateway:
        running = await gateway.submit(request(max_tokens=ENDLESS))
        waiting = asyncio.ensure_future(ask(gateway, request(max_tokens=2500)))
        await until(lambda: gateway.models()[0].num_waiting == 1)
        os.kill(worker_pid(gateway), signal.SIGKILL)
        assert (await collect(running))[0][-1].finish_reason is FinishReason.ERROR
        assert len(await waiting) == 2500


@pytest.mark.anyio
@pytest.mark.usefixtures("no_blocking")
async def test_a_request_is_not_given_to_a_third_worker() -> None:
    """One that takes every worker with it must end after two of them."""
    settings = settings_with(restart_backoff_s=0.01)
    async with serving(endless_plan(), settings=settings) as gateway:
        first, _, third = [await gateway.submit(request(max_tokens=ENDLESS)) for _ in range(3)]
        os.kill(worker_pid(gateway), signal.SIGKILL)
        await collect(first)
        # The second is worked on by the second worker, and the third waits there.
        await until(lambda: gateway.models()[0].num_running == 1)
        assert gateway.models()[0].num_waiting == 1
        os.kill(worker_pid(gateway), signal.SIGKILL)
        last = (await collect(third))[0][-1]
        assert last.error is not None
        assert last.error.kind == "WorkerDied"


@pytest.mark.anyio
@pytest.mark.usefixtures("no_blocking")
async def test_a_client_that_leaves_while_its_request_is_repeated_leaves_nothing() -> None:
    """The new worker neither holds the prompt nor answers it."""
    settings = settings_with(restart_backoff_s=0.01)
    async with serving(endless_plan(), settings=settings) as gateway:
        running = await gateway.submit(request(max_tokens=ENDLESS))
        waiting = await gateway.submit(request(max_tokens=ENDLESS))
        os.kill(worker_pid(gateway), signal.SIGKILL)
        await collect(running)
        waiting.cancel()
        assert (await collect(waiting))[0][-1].finish_reason is FinishReason.CANCELLED
        assert await ask(gateway, request())
        stats = await gateway.worker_stats("toy")
        assert (stats.num_prepared, stats.num_sequences, stats.num_waiting) == (0, 0, 0)


@pytest.mark.anyio
@pytest.mark.usefixtures("no_blocking")
async def test_three_deaths_without_an_answer_quarantine_the_model() -> None:
    """The model stays down, and says why and what to do; the gateway stays up."""
    settings = settings_with(restart_backoff_s=0.01)
    async with serving(settings=settings) as gateway:
        pids = []
        for num_deaths in (1, 2, 3):
            pids.append(worker_pid(gateway))
            os.kill(pids[-1], signal.SIGKILL)
            await until(lambda n=num_deaths: gateway.models()[0].num_deaths == n)  # type: ignore[misc]
            if num_deaths < 3:
                await until(lambda: gateway.models()[0].state is ModelState.READY)
        status = gateway.models()[0]
        assert status.state is ModelState.QUARANTINED
        await asyncio.sleep(0.3)  # longer than a restart takes
        status = gateway.models()[0]
        assert status.state is ModelState.QUARANTINED
        assert (status.pid, status.resident_bytes, status.leaves_in_s) == (None, None, None)
        assert "died 3 times without an answer" in status.reason
        with pytest.raises(EngineError, match=r"quarantined: .*SIGKILL.* start brim again") as told:
            await gateway.submit(request())
        assert told.value.message.endswith(
            "; the first request in 5 min or later tries it once more"
        )
        assert status.reason in told.value.message
        assert [await asyncio.to_thread(is_gone, pid) for pid in pids] == [True] * 3


@pytest.mark.anyio
@pytest.mark.usefixtures("no_blocking")
async def test_a_model_comes_back_from_quarantine_with_a_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once the wait is over the next request is answered by a new worker; one death is the end.

    After an answer deaths count from the beginning again.
    """
    monkeypatch.setattr(quarantine, "FIRST_WAIT_S", 0.0)
    async with serving(endless_plan(), settings=settings_with(restart_backoff_s=0.01)) as gateway:

        async def die(state: ModelState) -> None:
            num_deaths = gateway.models()[0].num_deaths
            os.kill(worker_pid(gateway), signal.SIGKILL)
            await until(lambda: gateway.models()[0].num_deaths > num_deaths)
            await until(lambda: gateway.models()[0].state is state)

        for state in (ModelState.READY, ModelState.READY, ModelState.QUARANTINED):
            await die(state)
        assert gateway.models()[0].reason.endswith("its next request tries it once more")
        running = await gateway.submit(request(max_tokens=ENDLESS))
        await die(ModelState.QUARANTINED)
        last = (await collect(running))[0][-1]
        assert last.error is not None
        assert "it has died too often" in last.error.message
        assert await ask(gateway, request())
        await die(ModelState.READY)
        assert await ask(gateway, request())


@pytest.mark.anyio
@pytest.mark.usefixtures("no_blocking")
async def test_answers_between_deaths_keep_the_model_in_service() -> None:
    """Only deaths in a row count."""
    async with serving(settings=settings_with(restart_backoff_s=0.01)) as gateway:
        for _ in range(4):
            os.kill(worker_pid(gateway), signal.SIGKILL)
            assert await ask(gateway, request())
        assert gateway.models()[0].num_deaths == 4


@pytest.mark.anyio
@pytest.mark.usefixtures("no_blocking")
async def test_whoever_was_told_of_a_death_is_told_that_the_model_is_back() -> None:
    """A death and the end of its repair are two events."""
    async with serving(settings=settings_with(restart_backoff_s=0.01)) as gateway:
        os.kill(worker_pid(gateway), signal.SIGKILL)
        assert await ask(gateway, request())
        died, loaded = gateway.event_log.events()[-2:]
        assert (died.kind, loaded.kind) == (EventKind.WORKER_DIED, EventKind.MODEL_LOADED)
        assert loaded.cause == "its worker died and was started again"
        assert loaded.model == gateway.models()[0].name


@pytest.mark.anyio
@pytest.mark.usefixtures("no_blocking")
async def test_during_a_long_back_off_clients_are_told_when_to_come_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After the second death in a row nobody is kept waiting."""
    async with serving(settings=settings_with(restart_backoff_s=0.2)) as gateway:
        for num_deaths in (1, 2):
            await until(lambda: gateway.models()[0].state is ModelState.READY)
            os.kill(worker_pid(gateway), signal.SIGKILL)
            await until(lambda n=num_deaths: gateway.models()[0].num_deaths == n)  # type: ignore[misc]
        # Were it kept waiting, it would wait for longer than this test may run.
        monkeypatch.setattr(supervisor, "RESTART_WAIT_S", 10_000.0)
        with pytest.raises(Busy, match="being started again") as caught:
            await gateway.submit(request())
        assert caught.value.retry_after_s is not None
        assert caught.value.retry_after_s >= 1


@with_defect(
    """
    import brim.worker.protocol as protocol
    encode = protocol.encode
    protocol.encode = lambda frame: (
        b"\\xff" * 64 if isinstance(frame, protocol.Counted) else encode(frame)
    )
    """
)
@pytest.mark.anyio
@pytest.mark.usefixtures("no_blocking")
async def test_a_worker_that_breaks_the_protocol_is_killed(defective_plan: Plan) -> None:
    """After bytes that are no frame nothing it says can be trusted."""
    async with serving(defective_plan, settings=settings_with(restart_backoff_s=0.01)) as gateway:
        pid = worker_pid(gateway)
        with pytest.raises(WorkerDied, match="broke the protocol: a frame announces"):
            await gateway.submit(request())
        assert await asyncio.to_thread(is_gone, pid)


@pytest.fixture
def aborting_plan(tmp_path: Path) -> Plan:
    """A plan whose worker makes llama.cpp abort at the first step."""
    require_engine("llamacpp")
    # A bound that the engine's guards keep: more rows in one call than the context was made for.
    defect = """
        from brim.engine.llamacpp.engine import LlamaCppEngine, lib
        def submit(self, plan):
            num_rows = lib.llama_n_batch(self._context) + 1
            rows = (lib.llama_token * num_rows)(*[1] * num_rows)
            lib.llama_decode(self._context, lib.llama_batch_get_one(rows, num_rows))
        LlamaCppEngine.submit = submit
    """
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(defect))
    plan = plan_for("llamacpp", path=DEMO, max_batch_tokens=64)
    return msgspec.structs.replace(
        plan, environment=plan.environment | {"PYTHONPATH": str(tmp_path)}
    )


@pytest.mark.anyio
@pytest.mark.usefixtures("no_blocking")
async def test_a_backend_that_aborts_is_quoted(aborting_plan: Plan) -> None:
    """llama.cpp's own abort reaches the client: the signal, and the assertion that failed."""
    async with serving(aborting_plan) as gateway:
        asked = request(prompt="def f(x):", model=aborting_plan.model.name)
        last = (await collect(await gateway.submit(asked)))[0][-1]
    assert last.error is not None
    assert "signal 6 (SIGABRT)" in last.error.message
    assert "GGML_ASSERT(" in last.error.message.partition("its last words: ")[2]


@with_defect(
    """
    from brim.engine.toy import ToyEngine
    def submit(self, plan):
        raise ZeroDivisionError("one over nothing")
    ToyEngine.submit = submit
    """
)
@pytest.mark.anyio
@pytest.mark.usefixtures("no_blocking")
async def test_a_defect_in_the_worker_is_named(defective_plan: Plan) -> None:
    """An exception that nobody expected ends the worker, and its name reaches the client."""
    async with serving(defective_plan) as gateway:
        last = (await collect(await gateway.submit(request())))[0][-1]
    assert last.error is not None
    assert "exited with code 1" in last.error.message
    assert "ZeroDivisionError: one over nothing" in last.error.message


@with_defect(
    """
    import os
    from brim.engine.toy import ToyEngine
    ToyEngine.load = lambda self, *given: os._exit(7)
    """
)
@pytest.mark.anyio
@pytest.mark.usefixtures("no_blocking")
async def test_a_worker_that_dies_while_loading_fails_the_start(defective_plan: Plan) -> None:
    """Nothing is restarted that has never run."""
    with pytest.raises(WorkerDied, match="exited with code 7"):
        async with serving(defective_plan):
            pytest.fail("it was started")


@with_defect(
    """
    import os
    from brim.engine.toy import ToyEngine
    from brim.errors import ModelFileError
    load = ToyEngine.load
    def load_or_fail(self, *given):
        if os.path.exists(os.path.dirname(__file__) + "/is-broken"):
            raise ModelFileError("the file has been cut short")
        load(self, *given)
    ToyEngine.load = load_or_fail
    """
)
@pytest.mark.anyio
@pytest.mark.usefixtures("no_blocking")
async def test_a_failed_reload_counts_as_a_death(defective_plan: Plan) -> None:
    """A model whose file went bad while it ran ends in quarantine, with the file's error."""
    async with serving(defective_plan, settings=settings_with(restart_backoff_s=0.01)) as gateway:
        flag = Path(defective_plan.environment["PYTHONPATH"]) / "is-broken"
        await asyncio.to_thread(flag.touch)
        os.kill(worker_pid(gateway), signal.SIGKILL)
        await until(lambda: gateway.models()[0].state is ModelState.QUARANTINED)
        assert "the file has been cut short" in gateway.models()[0].reason


@pytest.mark.parametrize(
    ("failing", "error"),
    [
        ("socket.socketpair", OSError(errno.EMFILE, "too many open files")),
        ("asyncio.create_subprocess_exec", OSError(errno.EAGAIN, "no process to spare")),
        ("start_process", ValueError("a defect of ours")),
    ],
)
@pytest.mark.anyio
@pytest.mark.usefixtures("no_blocking")
async def test_a_restart_that_fails_in_any_way_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, failing: str, error: Exception
) -> None:
    """It counts as a death, and the model comes back when the trouble is over."""
    *modules, name = failing.split(".")
    owner = operator.attrgetter(*modules)(worker_process) if modules else worker_process
    working = getattr(owner, name)

    def fail_once(*args: object, **kwargs: object) -> object:
        monkeypatch.setattr(owner, name, working)
        raise error

    async with serving(settings=settings_with(restart_backoff_s=0.01)) as gateway:
        monkeypatch.setattr(owner, name, fail_once)
        os.kill(worker_pid(gateway), signal.SIGKILL)
        await until(lambda: gateway.models()[0].num_deaths == 2)
        await until(lambda: gateway.models()[0].state is ModelState.READY)
        assert await ask(gateway, request())


@pytest.mark.anyio
async def test_a_worker_that_cannot_be_connected_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The start fails in words; neither a process nor a socket is left."""

    async def fail(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(asyncio.get_running_loop(), "create_unix_connection", fail)
    with pytest.raises(EngineError, match=r"no worker process could be started .*open files"):
        async with serving():
            pytest.fail("it was started")
    assert not psutil.Process().children()


def has_drawn(gateway: Gateway, model: str, num_tokens: int) -> bool:
    """Whether the last measurement of a model saw so many tokens."""
    stats = next(status for status in gateway.models() if status.name == model).worker_stats
    return stats is not None and stats.num_tokens == num_tokens


@pytest.mark.anyio
@pytest.mark.usefixtures("no_blocking")
async def test_a_worker_that_hangs_is_killed_and_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its stream ends with the reason, and meanwhile other models are measured as ever."""
    monkeypatch.setattr(gateway_module, "MEASURE_PERIOD_S", 0.01)
    async with serving(endless_plan(), toy_plan("other")) as gateway:
        answer = await gateway.submit(request(max_tokens=ENDLESS))
        pid = worker_pid(gateway)
        os.kill(pid, signal.SIGSTOP)
        for num_tokens in (20, 40):
            await ask(gateway, request(model="other"))
            await until(functools.partial(has_drawn, gateway, "other", num_tokens))
        monkeypatch.setattr(worker_process, "hang_limit_s", lambda plan: 0.6)
        with pytest.raises(WorkerDied):
            await gateway.worker_stats("toy")
        last = (await collect(answer))[0][-1]
        assert last.error is not None
        assert "said nothing for 1 s, so it hung and was killed; it is being" in last.error.message
        assert await asyncio.to_thread(is_gone, pid)
        assert await ask(gateway, request())


@pytest.mark.anyio
@pytest.mark.usefixtures("no_blocking")
async def test_a_worker_leaves_signals_to_the_gateway() -> None:
    """Ctrl-C goes to the whole group, and must not cost an answer."""
    async with serving() as gateway:
        pid = worker_pid(gateway)
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(pid, number)
        assert await ask(gateway, request())
        assert worker_pid(gateway) == pid


@pytest.mark.anyio
@pytest.mark.usefixtures("no_blocking")
async def test_a_worker_that_does_not_stop_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopping ends within its limit, and no process is left."""
    monkeypatch.setattr(worker_process, "SHUTDOWN_LIMIT_S", 0.2)
    async with serving() as gateway:
        pid = worker_pid(gateway)
        os.kill(pid, signal.SIGSTOP)
        await gateway.stop()
        assert await asyncio.to_thread(is_gone, pid)


@pytest.fixture
def littered_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A current directory with a file that is named like a module of ours."""
    (tmp_path / "msgspec.py").write_text("raise SystemExit('not msgspec')")
    monkeypatch.chdir(tmp_path)


@pytest.mark.anyio
@pytest.mark.usefixtures("no_blocking", "littered_directory")
async def test_files_in_the_current_directory_are_no_modules() -> None:
    """A worker imports what is installed, wherever brim is started."""
    async with serving() as gateway:
        assert await ask(gateway, request())


def test_a_worker_does_not_outlive_a_killed_gateway() -> None:
    """SIGKILL gives the gateway no chance to say goodbye."""
    script = """
        import asyncio, sys
        from support.serving import serving, request
        async def main():
            async with serving() as gateway:
                await gateway.submit(request(max_tokens=480))
                print(gateway.models()[0].pid, flush=True)
                await asyncio.sleep(60)
        asyncio.run(main())
    """
    tests = str(Path(__file__).parent.parent)
    gateway = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": tests},
    )
    with gateway:
        assert gateway.stdout is not None
        pid = int(gateway.stdout.readline())
        gateway.kill()
    deadline_s = time.monotonic() + 60.0
    while not is_gone(pid):
        assert time.monotonic() < deadline_s, "the worker lives on"
        time.sleep(0.01)


@pytest.mark.parametrize("is_loaded", [False, True])
def test_the_end_of_the_socket_ends_the_worker(is_loaded: bool) -> None:
    """Also where the system sends no signal at a parent's death."""
    ours, theirs = socket.socketpair()
    with theirs:
        worker = subprocess.Popen(
            [
                sys.executable, "-m", "brim.worker", f"--fd={theirs.fileno()}",
                f"--parent={os.getpid()}",
            ],
            pass_fds=(theirs.fileno(),),
        )  # fmt: skip
    with ours, worker:
        frames = protocol.worker_frames()
        assert isinstance(next(frames.feed(ours.recv(65536))), protocol.Hello)
        if is_loaded:
            ours.sendall(protocol.encode(protocol.Load(toy_plan())))
            assert isinstance(next(frames.feed(ours.recv(65536))), protocol.Loaded)
        ours.close()
        assert worker.wait(60.0) == 0
