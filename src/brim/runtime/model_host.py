"""One served model: admission in two phases, and the answers that are owed.

A request is prepared in the worker (phase one: how long is it?), bounded and checked against the
machine here, and then started (phase two): the worker's scheduler, which knows what is shared, lets
it wait for its turn.  Whatever ends it, what it reserved is released exactly once.
"""

import asyncio
import contextlib
import itertools
import logging
import math
import time
from dataclasses import dataclass
from typing import Protocol

from brim.config.tree import Settings
from brim.core.answer import Delta, ErrorInfo, FinishReason
from brim.core.machine import MachineSpec
from brim.core.plan import Plan
from brim.core.request import Request
from brim.errors import BrimError, Busy, EngineError, WorkerDied
from brim.ledger.history import ForecastHistory
from brim.ledger.kv import KvAccount
from brim.ledger.ways import gib
from brim.machine.process import resident_bytes
from brim.runtime.answer import StreamedAnswer
from brim.runtime.api import ModelState, ModelStatus
from brim.runtime.forecast_errors import LoadRecord
from brim.runtime.request_counts import RequestCounter
from brim.runtime.summaries import Summaries
from brim.runtime.supervisor import Supervisor
from brim.runtime.worker_options import cache_options, worker_options
from brim.runtime.worker_process import Deltas, WorkerProcess
from brim.scheduler.admission import (
    answer_bound,
    answer_share,
    check_choices,
    check_fits,
    kv_bound,
)
from brim.worker.protocol import Counted, Stats

_log = logging.getLogger(__name__)

MAX_RETRY_AFTER_S = 60.0
"""Longer advice than a minute would be a guess about other clients."""

FILLED = 0.9
"""Of a window: so much of it used has touched about what a full one does."""

PRESSURE_RETRY_AFTER_S = 15.0
"""By then the machine has been read again."""


@dataclass(slots=True)
class Running:
    """A started request: its answer, and the worker that owes it."""

    request: Request
    answer: StreamedAnswer
    worker: WorkerProcess
    has_begun: bool
    """Whether it may have been worked on: it found no queue, or something of it has come."""
    may_repeat: bool
    """Whether another worker may be given it.  Once, lest a prompt that kills workers take three of
    them."""
    is_counted: bool = True
    """Whether a client sent it."""


class Seat(Protocol):
    """The model's place in memory, as the gateway looks after it."""

    async def ensure_loaded(self, host: "ModelHost", *, force: bool) -> None:
        """Return when the model is in memory.

        Args:
            host: The model.
            force: Load it even where it does not fit.

        Raises:
            BrimError: It cannot be now, or not at all.
        """
        ...

    def short_of_growth(self, name: str, num_kv_tokens: int) -> int:
        """Bytes that a request could still make the model take and that are not free any more."""
        ...


class ModelHost:
    """Admits requests for one model and hands out their answers.

    Args:
        wish: How the model is to be loaded where there is room.
        settings: Bounds of queue and answers, back-off.
        seat: Who brings it into memory.
        history: Keeps what its loads really take.
    """

    def __init__(
        self, wish: Plan, settings: Settings, *, seat: Seat, history: ForecastHistory
    ) -> None:
        self.name = wish.model.name
        self.wish = wish
        self.plan = wish
        """How it is loaded, or will be."""
        self.resident_bytes: int | None = None
        """As last measured, None while no worker is up."""
        self.last_used_s = 0.0
        """When a request last came or ended, by the monotonic clock."""
        self._settings = settings
        self._seat = seat
        self._history = history
        self._max_inflight_bytes = 0
        self._supervisor = self._new_supervisor()
        self._is_loaded = False
        self._absence = ""
        self._record: LoadRecord | None = None
        self._num_deaths_before = 0
        self._num_failed_loads = 0
        self._longest_tokens = 0
        self._kv = KvAccount(wish.kv_tokens)
        self._counter = RequestCounter()
        self._repeating: set[asyncio.Task[None]] = set()
        self._tickets = itertools.count(1)
        self._running: dict[int, Running] = {}
        self._num_submitting = 0
        self._summaries = Summaries(self._admit_own)
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_draining = False
        self._worker_stats: Stats | None = None
        self._mean_answer_s = 1.0

    @property
    def is_loaded(self) -> bool:
        """Whether a worker has the model, or is being restarted with it."""
        return self._is_loaded

    @property
    def wanted_inflight_bytes(self) -> int:
        """What its worker would use of memory for KV on its way to the disk."""
        cache = cache_options(self._settings.cache)
        return 0 if cache is None else cache.max_inflight_bytes

    @property
    def is_idle(self) -> bool:
        """Whether no request runs, waits or is on its way in."""
        return not self._running and not self._num_submitting

    def status(self) -> ModelStatus:
        """Where the model stands."""
        supervisor = self._supervisor
        loaded = supervisor.loaded
        return ModelStatus(
            name=self.name,
            state=self._state,
            reason=self._absence or supervisor.reason,
            created_unix_s=supervisor.started_unix_s,
            plan=self.plan,
            pid=supervisor.pid,
            footprint=None if loaded is None else loaded.footprint,
            resident_bytes=self.resident_bytes,
            load_s=None if loaded is None else loaded.load_s,
            num_running=len(self._running) - self._num_waiting,
            num_waiting=self._num_waiting,
            num_deaths=self._num_deaths_before + supervisor.num_deaths,
            worker_stats=self._worker_stats,
            requests=self._counter.counts(),
            overflow=self._settings.models.overflow,
            forecast_errors=() if self._record is None else self._record.errors(),
        )

    def check_loadable(self) -> None:
        """Refuse to load what failed each time that it was loaded: others gave way to it in vain.

        Raises:
            EngineError: The model is quarantined.
        """
        if self._state is ModelState.QUARANTINED:
            raise EngineError(
                f"model '{self.name}' is quarantined: {self._absence}, {self._num_failed_loads} "
                "times in a row; start brim again, with another file or a smaller --context"
            )

    def defer(self, reason: str) -> None:
        """Leave it out of memory until it is asked for."""
        self._absence = reason

    def take(self, plan: Plan, pool: KvAccount) -> None:
        """Be loaded by this plan from now on; while it is out of memory alone."""
        assert not self._is_loaded
        self.plan = plan
        self._kv = pool

    async def load(self, machine: MachineSpec, *, max_inflight_bytes: int = 0) -> None:
        """Load the model, granted by this reading of the machine.

        Args:
            machine: The reading.
            max_inflight_bytes: Set aside for KV on its way to the disk; 0 writes none.

        Raises:
            BrimError: It could not be loaded.
        """
        self._num_deaths_before += self._supervisor.num_deaths
        self._max_inflight_bytes = max_inflight_bytes
        self._supervisor = self._new_supervisor()
        self._absence = ""
        try:
            await self._supervisor.start()
        except BaseException as exc:
            self._absence = f"it could not be loaded: {exc}"
            self._num_failed_loads += isinstance(exc, BrimError)
            raise
        self._is_loaded, self._longest_tokens, self._num_failed_loads = True, 0, 0
        self._record = LoadRecord(self.plan, machine, self._history)
        if self._supervisor.loaded is not None:
            await self._record.loaded(self._supervisor.loaded.footprint)

    async def unload(self, reason: str) -> None:
        """Take an idle model out of memory; its process is gone when this returns.

        A model in quarantine has none, and stays there: its next request must not load it again.
        """
        assert self.is_idle
        if self._supervisor.state is ModelState.QUARANTINED:
            return
        self._is_loaded, self._absence = False, reason
        await self._supervisor.stop()
        self.resident_bytes = self._worker_stats = None

    async def submit(self, request: Request) -> StreamedAnswer:
        """Count, admit and start a request; see `runtime.api.Runtime.submit`."""
        try:
            return await self._submit(request)
        except BrimError as error:
            self._counter.note_refusal(error)
            raise

    async def _submit(self, request: Request) -> StreamedAnswer:
        self._check_open()
        check_choices(request.num_choices, self.plan)
        self._num_submitting += 1
        self.last_used_s = time.monotonic()
        try:
            if not self._is_loaded:
                await self._seat.ensure_loaded(self, force=request.force)
            worker = await self._worker()
            try:
                return await self._admit(worker, request)
            except WorkerDied:
                # It was not started: nothing of it has happened yet, so it is prepared once more.
                # Not more often, lest a prompt that kills workers take three of them.
                self._check_draining()
            return await self._admit(await self._worker(), request, may_repeat=False)
        finally:
            self._num_submitting -= 1

    async def worker_stats(self) -> Stats:
        """The worker's counters.

        Raises:
            Busy: It is being restarted.
            EngineError: The model is quarantined, stopped, or the worker died.
        """
        self._worker_stats = await (await self._supervisor.worker()).stats()
        return self._worker_stats

    async def measure(self) -> None:
        """Read what the worker holds and has done."""
        pid, record = self._supervisor.pid, self._record
        measured = None if pid is None else await asyncio.to_thread(resident_bytes, pid)
        if pid != self._supervisor.pid:
            return  # it was unloaded or has died meanwhile
        self.resident_bytes = measured
        if measured is not None and record is not None:
            has_filled = self._longest_tokens >= FILLED * self.plan.context_tokens
            await record.measured(measured, has_filled=has_filled)
        if pid is not None:
            with contextlib.suppress(BrimError):  # it died meanwhile: the supervisor knows
                await self.worker_stats()

    async def drain(self, limit_s: float) -> None:
        """Refuse what has not begun, let the rest finish, and end what is left at the limit."""
        self._is_draining = True
        for ticket, running in tuple(self._running.items()):
            if not running.has_begun:
                self._drop(ticket, FinishReason.ERROR, _shutting_down())
        try:
            async with asyncio.timeout(limit_s):
                await self._idle.wait()
        except TimeoutError:
            for ticket in tuple(self._running):
                self._drop(ticket, FinishReason.ERROR, _shutting_down())

    async def stop(self) -> None:
        """End everything that is owed, and the worker; safe more than once."""
        await self.drain(0.0)
        for repeating in self._repeating:
            repeating.cancel()
        await asyncio.gather(*self._repeating, return_exceptions=True)
        self._is_loaded, self._absence = False, ""
        await self._supervisor.stop()

    @property
    def _state(self) -> ModelState:
        if self._num_failed_loads >= self._settings.worker.deaths_before_quarantine:
            return ModelState.QUARANTINED
        return ModelState.UNLOADED if self._absence else self._supervisor.state

    async def _worker(self) -> WorkerProcess:
        """The worker; see `Supervisor.worker`."""
        try:
            return await self._supervisor.worker()
        except EngineError:
            # Of a model that stopped while the request waited for it, the server's end is the news.
            self._check_draining()
            raise

    async def _admit(
        self, worker: WorkerProcess, request: Request, *, may_repeat: bool = True
    ) -> StreamedAnswer:
        ticket = next(self._tickets)
        try:
            counted = await self._prepare(worker, ticket, request)
            num_prompt_tokens = counted.num_prompt_tokens
            forks_share_kv = self._supervisor.forks_share_kv
            share = answer_share(
                num_prompt_tokens,
                request.num_choices,
                kv_tokens=self.plan.kv_tokens,
                forks_share_kv=forks_share_kv,
            )
            answer_tokens = self._settings.models.answer_tokens
            if not counted.may_outgrow:
                answer_tokens = max(1, min(answer_tokens, share))
            max_tokens = answer_bound(
                num_prompt_tokens,
                request.max_tokens,
                context_tokens=self.plan.context_tokens,
                answer_tokens=answer_tokens,
                may_outgrow=counted.may_outgrow,
            )
            kv_tokens = kv_bound(
                num_prompt_tokens,
                min(max_tokens, self.plan.context_tokens - num_prompt_tokens),
                request.num_choices,
                forks_share_kv=forks_share_kv,
            )
            check_fits(kv_tokens, self.plan)
            self._check_growth(kv_tokens, request)
            self._check_draining()
            worker.start(ticket, max_tokens)
        except BaseException:
            # The client's leaving is one of these: the worker must not hold its prompt for ever.
            worker.cancel(ticket)
            raise
        queue_place = self._queue_place(kv_tokens, request)
        self._kv.reserve(str(ticket), kv_tokens)
        answer = StreamedAnswer(
            ticket,
            num_prompt_tokens=num_prompt_tokens,
            max_tokens=max_tokens,
            num_choices=request.num_choices,
            plan=self.plan,
            queue_place=queue_place,
            overflow=counted.overflow,
            moved_lines=counted.moved_lines,
            on_cancel=self._cancel,
        )
        if counted.overflow is not None:
            self._counter.note_removal(counted.overflow.num_removed_tokens)
        self._running[ticket] = Running(
            request, answer, worker, has_begun=queue_place == 0, may_repeat=may_repeat
        )
        self._idle.clear()
        return answer

    async def _admit_own(self, worker: WorkerProcess, request: Request) -> StreamedAnswer:
        """Admit a request of brim itself: counters tell of what clients sent, and leave it out."""
        answer = await self._admit(worker, request)
        self._running[answer.ticket].is_counted = False
        return answer

    async def _prepare(self, worker: WorkerProcess, ticket: int, request: Request) -> Counted:
        """The prompt's length, once the worker holds its tokens."""
        return await self._summaries.prepare(worker, ticket, request)

    def _queue_place(self, kv_tokens: int, request: Request) -> int:
        """Where the request stands in the worker's queue: 0 runs at once, 1 is the next.

        As far as is known here: the worker puts interactive and short requests first, and those
        that share prefixes need fewer cells than their bounds.
        """
        if self._num_waiting:
            return self._num_waiting + 1
        num_choices = sum(each.request.num_choices for each in self._running.values())
        has_sequences = num_choices + request.num_choices <= self.plan.max_sequences
        return 0 if has_sequences and self._kv.has_room_for(kv_tokens) else 1

    @property
    def _num_waiting(self) -> int:
        """Started requests that nothing is known to have been done for."""
        return sum(not each.has_begun for each in self._running.values())

    def _new_supervisor(self) -> Supervisor:
        return Supervisor(
            self.plan,
            worker_options(self._settings, max_inflight_bytes=self._max_inflight_bytes),
            self._settings.worker,
            on_deltas=self._on_deltas,
            on_death=self._on_death,
        )

    def end_waiting_where_short(self) -> None:
        """End requests that have not begun and whose memory other programs took, newest first."""
        for ticket, running in reversed(tuple(self._running.items())):
            if not running.has_begun:
                try:
                    self._check_growth(0, running.request)
                except Busy as error:
                    self._drop(ticket, FinishReason.ERROR, error)

    def _check_growth(self, kv_tokens: int, request: Request) -> None:
        """Refuse what would have to be swapped in: other programs took what the model was granted.

        A request that is forced by the client, where the operator allows it, goes on.

        Args:
            kv_tokens: Its bound; 0 where the account has it already.
            request: The request.
        """
        short_bytes = self._seat.short_of_growth(self.name, kv_tokens)
        if short_bytes and not request.force:
            forced = ""
            if self._settings.models.allow_force:
                forced = ', or force it with "brim": {"force": true}'
            raise Busy(
                f"other programs hold memory that this request may need: {gib(short_bytes)} are "
                f"missing; close some, try again in {PRESSURE_RETRY_AFTER_S:.0f} s{forced}",
                retry_after_s=PRESSURE_RETRY_AFTER_S,
            )

    def _check_draining(self) -> None:
        if self._is_draining:
            raise _shutting_down()

    def _check_open(self) -> None:
        """Refuse a request while draining, and one more than may wait."""
        self._check_draining()
        num_open = self._num_submitting + len(self._running)
        num_ahead = max(0, num_open - self.plan.max_sequences)
        if num_open < self.plan.max_sequences + self._settings.models.max_queued_requests:
            return
        wait_s = self._mean_answer_s * max(1, num_ahead) / self.plan.max_sequences
        wait_s = math.ceil(min(max(wait_s, 1.0), MAX_RETRY_AFTER_S))
        raise Busy(
            f"{num_open} requests run or wait for model '{self.plan.model.name}', as many as may "
            f"({num_ahead} in the queue); try again in {wait_s} s",
            retry_after_s=wait_s,
        )

    def _on_deltas(self, deltas: Deltas) -> None:
        for ticket, delta in deltas:
            running = self._running.get(ticket)
            if running is None:
                continue  # cancelled while this was on its way
            running.has_begun = True
            running.answer.push(delta)
            if running.is_counted:
                self._counter.note_delta(delta)
            if running.answer.is_ended:
                self._forget(ticket)
                if running.is_counted:
                    self._counter.note_end(delta)
                if delta.finish_reason is not FinishReason.ERROR:
                    self._note_answer(running.answer, delta)

    def _on_death(self, death: WorkerDied) -> None:
        for ticket, running in tuple(self._running.items()):
            if running.has_begun or not running.may_repeat:
                self._drop(ticket, FinishReason.ERROR, death)
                continue
            running.may_repeat = False
            task = asyncio.get_running_loop().create_task(
                self._repeat(ticket, running), name=f"repeating request {ticket} of {self.name}"
            )
            self._repeating.add(task)
            task.add_done_callback(self._repeating.discard)

    async def _repeat(self, ticket: int, running: Running) -> None:
        """Give a request that waited in a worker that died to the next one."""
        try:
            worker = running.worker = await self._worker()
            await self._prepare(worker, ticket, running.request)
            if ticket in self._running:
                worker.start(ticket, running.answer.max_tokens)
            else:
                worker.cancel(ticket)  # its client has left meanwhile
        except Exception as exc:
            if ticket in self._running:
                error = exc if isinstance(exc, BrimError) else _defect(exc)
                self._drop(ticket, FinishReason.ERROR, error)

    def _cancel(self, ticket: int) -> None:
        self._drop(ticket, FinishReason.CANCELLED)

    def _drop(self, ticket: int, reason: FinishReason, error: BrimError | None = None) -> None:
        """End a running request from this side."""
        running = self._running[ticket]
        # The cancellation is sent before the grant is free: the worker reads it before any Start
        # that the grant makes possible.
        running.worker.cancel(ticket)
        running.answer.end(reason, error)
        self._forget(ticket)
        if running.is_counted:
            info = None if error is None else ErrorInfo.of(error)
            self._counter.note_end(Delta(finish_reason=reason, error=info))

    def _forget(self, ticket: int) -> None:
        """Give the grant back; the one place where a running request ends."""
        del self._running[ticket]
        self.last_used_s = time.monotonic()
        self._kv.release(str(ticket))
        if not self._running:
            self._idle.set()

    def _note_answer(self, answer: StreamedAnswer, last: Delta) -> None:
        """A request was answered to its end: it says how long answers get and take."""
        self._supervisor.note_answer()
        if last.timings is not None:
            num_tokens = answer.num_prompt_tokens + last.timings.num_completion_tokens
            self._longest_tokens = max(self._longest_tokens, num_tokens)
            # Without its wait.  One part in eight: about the last dozen answers count.
            answer_s = last.timings.prefill_s + last.timings.decode_s
            self._mean_answer_s += (answer_s - self._mean_answer_s) / 8


def _defect(exc: Exception) -> EngineError:
    _log.exception("repeating a request failed")
    return EngineError(f"repeating the request failed: {type(exc).__name__}: {exc}")


def _shutting_down() -> Busy:
    return Busy("the server is shutting down; send the request again", retry_after_s=5.0)
