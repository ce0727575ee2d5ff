"""The worker's main thread: commands, steps and aborts, over a socket pair and the toy engine."""

import queue
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.models import plan_for

from brim.core.answer import Delta, FinishReason
from brim.core.request import Priority
from brim.core.sampling import SamplingParams
from brim.core.stance import WorkLimits
from brim.core.step import StepPlan, StepResult
from brim.engine.toy import ToyEngine
from brim.errors import DoesNotFit, EngineError
from brim.machine.qos import QosClass
from brim.scheduler.sequence import ScheduledRequest
from brim.worker import protocol
from brim.worker.loop import WorkerLoop
from brim.worker.outbox import Outbox
from brim.worker.pacing import Pacing

LIMIT_S = 60.0
"""Nothing here takes longer than milliseconds unless it hangs, or the machine does."""


class SlowEngine(ToyEngine):
    """Its steps run until they are let go or aborted, as a long one on a real backend."""

    def __init__(self) -> None:
        self.is_stepping = threading.Semaphore(0)
        self.go_on = threading.Semaphore(0)
        self.is_aborted = False
        self.num_aborts = 0

    def submit(self, plan: StepPlan) -> None:
        self.is_aborted = False
        super().submit(plan)

    def collect(self) -> StepResult:
        self.is_stepping.release()
        assert self.go_on.acquire(timeout=LIMIT_S)
        if self.is_aborted:
            super().collect()
            raise EngineError("toy: aborted")
        return super().collect()

    def request_abort(self) -> None:
        self.is_aborted = True
        self.num_aborts += 1
        self.go_on.release()


class Running:
    """A loop in its own thread, and the gateway's end of its socket."""

    def __init__(
        self,
        engine: ToyEngine,
        sock: socket.socket,
        gateway: socket.socket,
        limits: WorkLimits,
    ) -> None:
        plan = plan_for("toy")
        engine.load(plan)
        options = protocol.WorkerOptions(limits=limits)
        self.loop = WorkerLoop(engine, plan, Outbox(sock), options)
        self._gateway = gateway
        self._frames = protocol.worker_frames()
        self._received: list[protocol.WorkerFrame] = []
        self.failure: BaseException | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.loop.run()
        except EngineError as error:
            self.failure = error

    def add(
        self,
        ticket: int,
        max_tokens: int = 5,
        num_prompt_tokens: int = 10,
        priority: Priority = Priority.INTERACTIVE,
    ) -> None:
        self.loop.put(
            ScheduledRequest(
                ticket=ticket,
                prompt_tokens=[ticket] * num_prompt_tokens,
                max_tokens=max_tokens,
                sampling=SamplingParams(temperature=0.0, ignore_eos=True),
                priority=priority,
            )
        )

    def stats(self) -> protocol.Stats:
        """What the loop says when it is asked and nothing else is said."""
        self.loop.put(protocol.GetStats())
        frame = self.frame()
        assert isinstance(frame, protocol.Stats)
        return frame

    def resized(self, kv_tokens: int) -> protocol.Resized:
        """What comes back to a resize when nothing else is said."""
        self.loop.put(protocol.Resize(kv_tokens))
        frame = self.frame()
        assert isinstance(frame, protocol.Resized)
        return frame

    def frame(self) -> protocol.WorkerFrame:
        while not self._received:
            self._received += self._frames.feed(self._gateway.recv(65536))
        return self._received.pop(0)

    def deltas_to_end(self, ticket: int) -> list[Delta]:
        """What comes for the ticket, and nothing may come for any other."""
        found: list[Delta] = []
        while not found or found[-1].finish_reason is None:
            frame = self.frame()
            assert isinstance(frame, protocol.Steps)
            assert {owner for owner, _ in frame.deltas} == {ticket}
            found += [delta for _, delta in frame.deltas]
        return found


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    ours, theirs = socket.socketpair()
    theirs.settimeout(LIMIT_S)
    started: list[Running] = []

    def start(engine: ToyEngine, limits: WorkLimits | None = None) -> Running:
        started.append(Running(engine, ours, theirs, limits or WorkLimits()))
        return started[-1]

    with ours, theirs:
        yield start
        for running in started:
            running.loop.put(protocol.Shutdown())
            running.thread.join(LIMIT_S)
            assert not running.thread.is_alive()


Start = Callable[..., Running]


def test_requests_are_answered_one_frame_a_step(start: Start) -> None:
    """Two requests at once share their frames."""
    running = start(ToyEngine())
    running.add(1)
    assert len(running.deltas_to_end(1)) == 5
    running.loop.put(protocol.GetStats())
    stats = running.frame()
    assert isinstance(stats, protocol.Stats)
    assert (stats.num_steps, stats.num_tokens, stats.num_prompt_tokens) == (5, 5, 10)
    assert stats.num_frames == 5, "the five before this one"
    assert 0 < stats.engine_cpu_s < stats.loop_cpu_s


def test_a_request_that_never_fits_is_answered_with_its_error(start: Start) -> None:
    """The gateway's own check comes first; this one still owes an ending."""
    running = start(ToyEngine())
    running.add(1, max_tokens=5000)
    [delta] = running.deltas_to_end(1)
    assert delta.finish_reason is FinishReason.ERROR
    assert delta.error is not None
    assert delta.error.kind == "ContextOverflow"


def test_a_step_that_nobody_wants_is_aborted(start: Start) -> None:
    """Cancelling everything in the running step stops it, and no error is reported for it."""
    engine = SlowEngine()
    running = start(engine)
    running.add(1)
    running.add(2)
    engine.is_stepping.acquire(timeout=LIMIT_S)
    engine.go_on.release()  # whoever came before the first step began, both are in the second
    engine.is_stepping.acquire(timeout=LIMIT_S)
    running.loop.put(protocol.Cancel(1))
    running.loop.put(protocol.Cancel(2))
    running.add(3, max_tokens=1)
    engine.is_stepping.acquire(timeout=LIMIT_S)
    engine.go_on.release()
    found: list[tuple[int, Delta]] = []
    while not any(ticket == 3 for ticket, _ in found):
        frame = running.frame()
        assert isinstance(frame, protocol.Steps)
        found += frame.deltas
    assert all(delta.error is None for _, delta in found)
    assert found[-1][1].finish_reason is FinishReason.LENGTH
    assert engine.num_aborts == 1


def test_a_step_that_somebody_wants_runs_to_its_end(start: Start) -> None:
    """One cancellation of two aborts nothing; the other request is answered."""
    engine = SlowEngine()
    running = start(engine)
    running.add(1, max_tokens=1)
    running.loop.put(protocol.GetStats())  # a frame that says when request 1 has been taken
    engine.is_stepping.acquire(timeout=LIMIT_S)
    running.loop.put(protocol.Cancel(77))
    running.loop.put(protocol.Cancel(78))
    engine.go_on.release()
    found: list[Delta] = []
    while not found:
        frame = running.frame()
        if isinstance(frame, protocol.Steps):
            found = [delta for ticket, delta in frame.deltas if ticket == 1]
    assert found[-1].finish_reason is FinishReason.LENGTH
    assert engine.num_aborts == 0


def test_shutdown_does_not_wait_for_a_long_step(start: Start) -> None:
    """Whatever runs is dropped."""
    engine = SlowEngine()
    running = start(engine)
    running.add(1)
    engine.is_stepping.acquire(timeout=LIMIT_S)
    running.loop.put(protocol.Shutdown())
    running.thread.join(LIMIT_S)
    assert not running.thread.is_alive()
    assert engine.num_aborts == 1


class EagerLock:
    """A lock before which the main thread always gets to drain its commands once."""

    def __init__(self, loop: WorkerLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._is_first = True

    def __enter__(self) -> None:
        if self._is_first:
            self._is_first = False
            self._loop._drain_commands()
        self._lock.acquire()

    def __exit__(self, *exc_info: object) -> None:
        self._lock.release()


def test_a_cancellation_is_forgotten_once_it_is_applied() -> None:
    """However the threads interleave: a ticket that stayed noted would be kept for ever."""
    engine, plan = ToyEngine(), plan_for("toy")
    engine.load(plan)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        loop = WorkerLoop(engine, plan, Outbox(ours), protocol.WorkerOptions())
        loop._step_lock = EagerLock(loop)  # type: ignore[assignment]
        loop.put(protocol.Cancel(1))
        loop._drain_commands()
        assert not loop._cancelled


def test_nothing_begins_behind_a_shutdown() -> None:
    """What was queued before it would take seconds, and whoever wanted it is gone."""
    engine, plan = ToyEngine(), plan_for("toy")
    engine.load(plan)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        loop = WorkerLoop(engine, plan, Outbox(ours), protocol.WorkerOptions())
        loop.put(ScheduledRequest(ticket=1, prompt_tokens=[1] * 10, max_tokens=5))
        loop.put(protocol.Resize(256))
        loop.put(protocol.Shutdown())
        loop.run()
        ours.shutdown(socket.SHUT_WR)
        assert theirs.recv(65536) == b""
    assert loop._num_steps == 0


def test_a_pool_is_resized_between_requests(start: Start) -> None:
    """The answer says what the pool is, what the engine takes for it, and what went."""
    running = start(ToyEngine())
    running.add(1, num_prompt_tokens=100)
    running.deltas_to_end(1)
    before = running.stats()
    assert (before.kv_tokens, before.num_needed_tokens, before.kv_bytes) == (2048, 0, 8 * 2048)
    small = running.resized(0)
    assert (small.kv_tokens, small.num_dropped_tokens, small.error) == (256, 0, None)
    assert small.footprint.kv_bytes == 8 * 256
    running.add(2, num_prompt_tokens=200, max_tokens=20)
    running.deltas_to_end(2)
    assert running.resized(1000).num_dropped_tokens == 0
    stats = running.stats()
    assert (stats.kv_tokens, stats.prefix.num_idle_tokens) == (1024, 219)


def test_a_resize_waits_for_the_end_of_the_step(start: Start) -> None:
    """Tokens that the engine has and the scheduler has not yet are in nobody's account."""
    engine = SlowEngine()
    resized_at: list[int] = []
    running = start(engine)
    real = running.loop._scheduler.resize

    def resize(kv_tokens: int) -> int:
        resized_at.append(sum(len(sequence.cells) for sequence in engine._sequences.values()))
        [held] = running.loop._scheduler._pool._open.values()
        assert len(held.tokens) == resized_at[-1]
        return real(kv_tokens)

    running.loop._scheduler.resize = resize  # type: ignore[method-assign]
    running.add(1, max_tokens=2)
    engine.is_stepping.acquire(timeout=LIMIT_S)
    running.loop.put(protocol.Resize(0))
    engine.go_on.release()
    engine.is_stepping.acquire(timeout=LIMIT_S)
    engine.go_on.release()
    frames = [running.frame() for _ in range(3)]
    assert [type(frame) for frame in frames] == [protocol.Steps, protocol.Resized, protocol.Steps]
    assert resized_at == [10]


class NoPool(ToyEngine):
    """It cannot make another pool."""

    error: EngineError | DoesNotFit = DoesNotFit("toy: no memory")

    def resize_kv(self, num_tokens: int) -> None:
        raise self.error


def test_a_pool_that_stays_is_told_with_the_reason(start: Start) -> None:
    """And the worker goes on with it."""
    running = start(NoPool())
    running.add(1, num_prompt_tokens=30, max_tokens=1)
    running.deltas_to_end(1)
    resized = running.resized(512)
    assert resized.kv_tokens == 2048
    assert resized.error is not None
    assert (resized.error.kind, resized.error.message) == ("DoesNotFit", "toy: no memory")
    running.add(2)
    assert running.deltas_to_end(2)[-1].finish_reason is FinishReason.LENGTH


def test_a_worker_whose_engine_lost_its_sequences_ends(start: Start) -> None:
    """It says so first; what it owed is then answered by whoever started it."""
    engine = NoPool()
    engine.error = EngineError("toy: gone")
    running = start(engine)
    resized = running.resized(512)
    assert resized.error is not None and resized.error.message == "toy: gone"
    running.thread.join(LIMIT_S)
    assert str(running.failure) == "toy: gone"


def test_limits_hold_from_the_first_step_and_until_others_come(start: Start) -> None:
    """A background request waits in the worker until it may run, and the loop sleeps."""
    running = start(ToyEngine(), WorkLimits(runs_background=False))
    running.add(1, priority=Priority.BACKGROUND)
    running.add(2)
    running.deltas_to_end(2)
    assert running.stats().num_waiting == 1
    running.loop.put(protocol.SetLimits(WorkLimits()))
    assert running.deltas_to_end(1)[-1].finish_reason is FinishReason.LENGTH


class PacedTime:
    """A clock that a step moves by a second, and the queue of a loop that never really waits.

    Args:
        first: Commands that are there when the loop begins.
        during_rests: Commands that come a quarter of a second after somebody begins to wait.
    """

    def __init__(self, first: list[Any], during_rests: list[Any]) -> None:
        self.now_s = 0.0
        self.waits: list[float] = []
        self._first, self._during_rests = first, during_rests

    def __call__(self) -> float:
        return self.now_s

    def empty(self) -> bool:
        return not self._first

    def get(self, timeout: float | None = None) -> Any:
        if timeout is None:
            return self._first.pop(0) if self._first else protocol.Shutdown()
        self.waits.append(timeout)
        if self._during_rests:
            self.now_s += 0.25
            return self._during_rests.pop(0)
        self.now_s += timeout
        raise queue.Empty


class PacedEngine(ToyEngine):
    """Its steps take a second of a clock that a test holds."""

    time: PacedTime

    resized_at_s: float | None = None

    def collect(self) -> StepResult:
        self.time.now_s += 1.0
        return super().collect()

    def resize_kv(self, num_tokens: int) -> None:
        self.resized_at_s = self.time.now_s
        super().resize_kv(num_tokens)


def run_paced(
    limits: WorkLimits, *during_rests: Any, max_tokens: int = 3
) -> tuple[PacedEngine, list[protocol.WorkerFrame], WorkerLoop]:
    """One request and what comes while the loop rests, to the end; all frames that were sent."""
    engine, plan = PacedEngine(), plan_for("toy")
    engine.load(plan)
    request = ScheduledRequest(
        ticket=1,
        prompt_tokens=[1] * 10,
        max_tokens=max_tokens,
        sampling=SamplingParams(temperature=0.0, ignore_eos=True),
    )
    engine.time = PacedTime([request], [*during_rests])
    ours, theirs = socket.socketpair()
    with ours, theirs:
        options = protocol.WorkerOptions(limits=limits)
        loop = WorkerLoop(engine, plan, Outbox(ours), options, pacing=Pacing(engine.time))
        loop._commands = engine.time  # type: ignore[assignment]
        loop._scheduler._clock = engine.time
        loop.run()
        frames = [*protocol.worker_frames().feed(theirs.recv(65536))]
    return engine, frames, loop


def test_a_loop_rests_between_its_steps() -> None:
    """At a quarter of the time, three steps of a second each are each followed by three of rest."""
    engine, _, _ = run_paced(WorkLimits(pace_fraction=0.25))
    assert engine.time.waits == pytest.approx([3.0, 3.0, 3.0])
    assert engine.time.now_s == pytest.approx(12.0)


def test_a_loop_at_full_pace_never_rests() -> None:
    """Nothing is waited for."""
    engine, _, _ = run_paced(WorkLimits())
    assert engine.time.waits == []


def test_commands_are_taken_while_a_loop_rests() -> None:
    """Counters and another pool are answered at once, and then the rest goes on."""
    engine, frames, _ = run_paced(
        WorkLimits(pace_fraction=0.5), protocol.GetStats(), protocol.Resize(256)
    )
    assert [type(frame).__name__ for frame in frames] == [
        "Steps",
        "Stats",
        "Resized",
        "Steps",
        "Steps",
    ]
    assert engine.time.waits == pytest.approx([1.0, 0.75, 0.5, 1.0, 1.0])
    assert engine.resized_at_s == pytest.approx(1.5), "half a second into the first rest"


def test_a_rest_ends_with_the_limit_that_ordered_it() -> None:
    """Full pace means now."""
    engine, _, _ = run_paced(WorkLimits(pace_fraction=0.1), protocol.SetLimits(WorkLimits()))
    assert engine.time.waits == pytest.approx([9.0])
    assert engine.time.now_s == pytest.approx(3.25)


def test_rests_are_no_part_of_what_steps_cost() -> None:
    """Else the next chunk of a prompt would be made smaller for them."""
    engine, _, loop = run_paced(WorkLimits(pace_fraction=0.05), max_tokens=6)
    assert engine.time.waits == pytest.approx([19.0] * 6)
    assert loop._scheduler._pace.row_s == pytest.approx(0.1), "ten rows, one second"
    assert loop._scheduler._pace._decode_s == {1: pytest.approx(1.0)}


def test_how_urgent_the_engine_is_follows_the_limits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The engine's own thread changes its class, once for each change."""
    seen: list[tuple[QosClass, int]] = []
    monkeypatch.setattr(
        "brim.worker.loop.set_qos_class", lambda qos: seen.append((qos, threading.get_ident()))
    )
    calm = WorkLimits(is_urgent=False)
    run_paced(
        WorkLimits(is_urgent=False, pace_fraction=0.5),
        protocol.SetLimits(WorkLimits(is_urgent=False, pace_fraction=0.4)),
        protocol.SetLimits(WorkLimits(pace_fraction=0.4)),
        protocol.SetLimits(calm),
    )
    own = threading.get_ident()
    assert seen == [
        (QosClass.UTILITY, own),
        (QosClass.USER_INITIATED, own),
        (QosClass.UTILITY, own),
    ]
