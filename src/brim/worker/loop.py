"""The worker's main thread: commands between steps, one frame after each.

It alone calls the engine, but for the abort that the reader's thread may ask for.
"""

import contextlib
import queue
import threading
import time

from brim.core.answer import ErrorInfo
from brim.core.plan import Plan
from brim.core.stance import WorkLimits
from brim.core.step import StepPlan
from brim.engine.base import Engine
from brim.errors import BrimError, EngineError
from brim.machine.qos import QosClass, set_qos_class
from brim.prefix_cache.store import PrefixCache
from brim.scheduler.answers import error_deltas
from brim.scheduler.loop import MIN_KEPT_ON_DISK, Scheduler
from brim.scheduler.sequence import ScheduledRequest
from brim.worker.outbox import Outbox
from brim.worker.pacing import Pacing
from brim.worker.protocol import (
    Cancel,
    GetStats,
    Resize,
    Resized,
    SetLimits,
    Shutdown,
    Stats,
    WorkerOptions,
)

DISK_WAIT_S = 0.02
"""A disk takes 64 MiB in about so long; a command ends the wait."""

Command = ScheduledRequest | Cancel | GetStats | Shutdown | SetLimits | Resize
"""What the reader's thread hands over: frames, with Start already joined to its prompt."""


class WorkerLoop:
    """Steps the engine while there is work and sleeps on the queue while there is none.

    Args:
        engine: Loaded with `plan`; this object owns it and shuts it down.
        plan: The plan.
        outbox: Where deltas go.
        options: How to work.
        cache: Where prefixes are kept; this object closes it.
        pacing: Of steps.
    """

    def __init__(
        self,
        engine: Engine,
        plan: Plan,
        outbox: Outbox,
        options: WorkerOptions,
        cache: PrefixCache | None = None,
        pacing: Pacing | None = None,
    ) -> None:
        self._engine = engine
        self._outbox = outbox
        self._cache = cache
        self._scheduler = Scheduler(
            engine,
            plan,
            cache=cache,
            stall_target_s=options.stall_target_s,
            min_kept_tokens=options.cache.min_tokens if options.cache else MIN_KEPT_ON_DISK,
        )
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._is_stopping = False
        self._pacing = pacing or Pacing()
        # The process starts urgent; see __main__.
        self._limits = WorkLimits()
        self._first_limits = options.limits
        self._resizes: list[Resize] = []
        # Guards the three below; see `_put_and_abort`.
        self._step_lock = threading.Lock()
        self._is_stepping = False
        self._cancelled: set[int] = set()
        self._is_abandoned = False
        self._num_steps = 0
        self._num_tokens = 0
        self._num_prompt_tokens = 0
        self._engine_s = 0.0
        self._engine_cpu_s = 0.0
        self._loop_cpu_start_s = 0.0
        # Both are set by the reader's thread, which alone knows.
        self.reader_cpu_s = 0.0
        self.num_prepared = 0

    # --- the reader's thread ---------------------------------------------------------------------

    def put(self, command: Command) -> None:
        """Hand over a command; it takes effect before the next step."""
        if isinstance(command, (Cancel, Shutdown)):
            self._put_and_abort(command)
        else:
            self._commands.put(command)

    def _put_and_abort(self, command: Cancel | Shutdown) -> None:
        """Queue the command, and stop the running step when nobody wants anything of it.

        Under the lock, so that the abort can never reach a later step: the loop takes it before and
        after each step, and an engine forgets an old abort when a step is submitted.
        """
        with self._step_lock:
            if isinstance(command, Shutdown):
                self._is_abandoned = True
            else:
                self._cancelled.add(command.ticket)
            # After the ticket was noted, for the loop forgets it when it takes the command; before
            # any abort, for a step that fails must find the reason in the queue.
            self._commands.put(command)
            if self._is_stepping and (
                self._is_abandoned or self._scheduler.tickets_in_step() <= self._cancelled
            ):
                self._engine.request_abort()

    # --- the main thread -------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until Shutdown, then free the engine.

        Raises:
            EngineError: The engine lost its sequences, so the process had better end.
        """
        self._loop_cpu_start_s = time.thread_time()
        self._set_limits(self._first_limits)
        scheduler, outbox = self._scheduler, self._outbox
        while self._take_commands():
            self._resize_pool()
            plan = scheduler.schedule()
            if plan is not None:
                self._run_step(plan)
            deltas = scheduler.take()
            if deltas:
                outbox.post(deltas)
            elif plan is None and scheduler.has_work:
                self._wait_for_disk()
            if plan is not None and self._pacing.rest_s > 0:
                self._rest()
        if self._cache is not None:
            self._cache.close()
        self._engine.shutdown()

    def _take_commands(self) -> bool:
        """Sleep until there is work, and take what was asked; False once the loop is to stop."""
        if not self._is_stopping and not self._scheduler.has_work and self._commands.empty():
            self._outbox.flush()
            self._apply(self._commands.get())
        self._drain_commands()
        return not self._is_stopping

    def _wait_for_disk(self) -> None:
        """Nothing is left but prefixes that wait to be written: look again in a moment."""
        self._outbox.flush()
        with contextlib.suppress(queue.Empty):
            self._apply(self._commands.get(timeout=DISK_WAIT_S))

    def _rest(self) -> None:
        """Sleep what the last step is owed; commands are taken meanwhile."""
        self._outbox.flush()
        while not self._is_stopping and (rest_s := self._pacing.rest_s) > 0:
            try:
                self._apply(self._commands.get(timeout=rest_s))
            except queue.Empty:
                return
            self._resize_pool()

    def _run_step(self, plan: StepPlan) -> None:
        with self._step_lock:
            self._is_stepping = True
        self._pacing.begin()
        started_s, started_cpu_s = time.perf_counter(), time.thread_time()
        failure: BrimError | None = None
        try:
            result = self._engine.step(plan)
        except BrimError as error:
            failure = error
        self._engine_cpu_s += time.thread_time() - started_cpu_s
        self._engine_s += time.perf_counter() - started_s
        self._pacing.end()
        self._num_steps += 1
        with self._step_lock:
            self._is_stepping = False
        # Before the outcome is looked at: a cancelled request gets no further delta, and least of
        # all the error of the step that was aborted for it.
        self._drain_commands()
        if failure is not None:
            self._scheduler.fail(failure)
        else:
            self._num_tokens += len(result.sampled)
            self._scheduler.absorb(result)

    def _drain_commands(self) -> None:
        commands = self._commands
        while not commands.empty():
            self._apply(commands.get())

    def _apply(self, command: Command) -> None:
        if isinstance(command, ScheduledRequest):
            self._add(command)
        elif isinstance(command, Cancel):
            self._scheduler.cancel(command.ticket)
            with self._step_lock:
                self._cancelled.discard(command.ticket)
        elif isinstance(command, GetStats):
            self._outbox.send(self._stats())
        elif isinstance(command, SetLimits):
            self._set_limits(command.limits)
        elif isinstance(command, Resize):
            # Commands are also taken while the last step's tokens are not yet the scheduler's.
            self._resizes.append(command)
        else:
            self._is_stopping = True

    def _add(self, request: ScheduledRequest) -> None:
        try:
            self._scheduler.add(request)
        except BrimError as error:
            self._outbox.post(error_deltas(request.ticket, request.num_choices, error))
        else:
            self._num_prompt_tokens += len(request.prompt_tokens)

    def _set_limits(self, limits: WorkLimits) -> None:
        self._scheduler.set_limits(limits)
        self._pacing.limit(limits.pace_fraction)
        if limits.is_urgent != self._limits.is_urgent:
            set_qos_class(QosClass.USER_INITIATED if limits.is_urgent else QosClass.UTILITY)
        self._limits = limits

    def _resize_pool(self) -> None:
        """Answer every `Resize`; between two steps.

        Raises:
            EngineError: The engine lost its sequences.
        """
        while self._resizes:
            wanted = self._resizes.pop(0)
            num_idle_tokens = self._scheduler.num_idle_tokens
            failure: BrimError | None = None
            try:
                self._scheduler.resize(wanted.kv_tokens)
            except BrimError as error:
                failure = error
            self._outbox.send(
                Resized(
                    self._scheduler.kv_tokens,
                    self._engine.footprint(),
                    num_idle_tokens - self._scheduler.num_idle_tokens,
                    None if failure is None else ErrorInfo.of(failure),
                )
            )
            if isinstance(failure, EngineError):
                raise failure

    def _stats(self) -> Stats:
        return Stats(
            num_steps=self._num_steps,
            num_tokens=self._num_tokens,
            num_prompt_tokens=self._num_prompt_tokens,
            num_sequences=self._scheduler.num_sequences,
            num_prepared=self.num_prepared,
            num_frames=self._outbox.num_frames,
            engine_cpu_s=self._engine_cpu_s,
            engine_s=self._engine_s,
            loop_cpu_s=time.thread_time() - self._loop_cpu_start_s,
            reader_cpu_s=self.reader_cpu_s,
            num_waiting=self._scheduler.num_waiting,
            prefix=self._scheduler.stats(),
            kv_tokens=self._scheduler.kv_tokens,
            num_needed_tokens=self._scheduler.num_needed_tokens,
            kv_bytes=self._engine.footprint().kv_bytes,
        )
