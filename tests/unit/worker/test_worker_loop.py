"""The worker's main thread: commands, steps and aborts, over a socket pair and the toy engine."""

import socket
import threading
from collections.abc import Callable, Iterator

import pytest
from support.models import plan_for

from brim.core.answer import Delta, FinishReason
from brim.core.sampling import SamplingParams
from brim.core.step import StepPlan, StepResult
from brim.engine.toy import ToyEngine
from brim.errors import EngineError
from brim.scheduler.sequence import ScheduledRequest
from brim.worker import protocol
from brim.worker.loop import WorkerLoop
from brim.worker.outbox import Outbox

LIMIT_S = 10.0
"""Nothing here takes longer than milliseconds unless it hangs."""


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

    def __init__(self, engine: ToyEngine, sock: socket.socket, gateway: socket.socket) -> None:
        plan = plan_for("toy")
        engine.load(plan)
        self.loop = WorkerLoop(engine, plan, Outbox(sock), protocol.WorkerOptions())
        self._gateway = gateway
        self._frames = protocol.worker_frames()
        self._received: list[protocol.WorkerFrame] = []
        self.thread = threading.Thread(target=self.loop.run)
        self.thread.start()

    def add(self, ticket: int, max_tokens: int = 5, num_prompt_tokens: int = 10) -> None:
        self.loop.put(
            ScheduledRequest(
                ticket=ticket,
                prompt_tokens=[ticket] * num_prompt_tokens,
                max_tokens=max_tokens,
                sampling=SamplingParams(temperature=0.0, ignore_eos=True),
            )
        )

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
def start() -> Iterator[Callable[[ToyEngine], Running]]:
    ours, theirs = socket.socketpair()
    theirs.settimeout(LIMIT_S)
    started: list[Running] = []

    def start(engine: ToyEngine) -> Running:
        started.append(Running(engine, ours, theirs))
        return started[-1]

    with ours, theirs:
        yield start
        for running in started:
            running.loop.put(protocol.Shutdown())
            running.thread.join(LIMIT_S)
            assert not running.thread.is_alive()


Start = Callable[[ToyEngine], Running]


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
    running.loop.put(protocol.Cancel(1))
    running.loop.put(protocol.Cancel(2))
    running.add(3, max_tokens=1)
    engine.is_stepping.acquire(timeout=LIMIT_S)
    engine.go_on.release()
    assert running.deltas_to_end(3)[-1].finish_reason is FinishReason.LENGTH
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
