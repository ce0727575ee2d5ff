"""The answers that one model owes: who waits for what, and each ending told exactly once.

Whatever ends a request (its last token, its client, an error, its worker's death, the server's end)
passes through `_forget`, which gives back what it reserved and tells the meter.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from brim.core.answer import Delta, ErrorInfo, FinishReason
from brim.core.request import Priority, Request
from brim.errors import BrimError, Busy, EngineError, WorkerDied
from brim.ledger.kv import KvAccount
from brim.runtime.answer import StreamedAnswer
from brim.runtime.metering import Metered
from brim.runtime.request_counts import RequestCounter
from brim.runtime.worker_process import Deltas, WorkerProcess
from brim.telemetry.trace import where

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Running:
    """A started request: its answer, and the worker that owes it."""

    request: Request
    answer: StreamedAnswer
    worker: WorkerProcess
    metered: Metered
    has_begun: bool
    """Whether it may have been worked on: it found no queue, or something of it has come."""
    may_repeat: bool
    """Whether another worker may be given it.  Once, lest a prompt that kills workers take three of
    them."""
    is_counted: bool = True
    """Whether a client sent it."""


class Owed:
    """Started requests of one model, over all lives of its worker.

    Args:
        name: The model.
        pool: Its KV pool.
        counter: Counts how requests end.
        restart: Gives a request that waited in a worker that died to the next one.
        on_answered: Called with an answer that came to its end, and its last delta.
        on_end: Called after every ending.
    """

    def __init__(
        self,
        name: str,
        pool: KvAccount,
        counter: RequestCounter,
        *,
        restart: Callable[[int, Running], Awaitable[None]],
        on_answered: Callable[[StreamedAnswer, Delta], None],
        on_end: Callable[[], None],
    ) -> None:
        self._name = name
        self.pool = pool
        self._counter = counter
        self._restart = restart
        self._on_answered = on_answered
        self._on_end = on_end
        self.holds_background = False
        """Whether background requests that have not begun are held in the worker."""
        self._running: dict[int, Running] = {}
        self._restarting: set[asyncio.Task[None]] = set()
        self._nothing_left = asyncio.Event()
        self._nothing_left.set()

    def __len__(self) -> int:
        return len(self._running)

    def __contains__(self, ticket: int) -> bool:
        return ticket in self._running

    @property
    def num_waiting(self) -> int:
        """Started requests that nothing is known to have been done for."""
        return sum(not each.has_begun for each in self._running.values())

    @property
    def num_held(self) -> int:
        """Of `num_waiting`: background requests that wait for power or memory, and not for others.

        They keep no model in memory: see `drop_held`.
        """
        return sum(map(self.is_held, self._running.values()))

    @property
    def num_background_waiting(self) -> int:
        """Of `num_waiting`: those that give way to everybody for whom somebody waits."""
        return sum(
            each.request.priority is Priority.BACKGROUND and not each.has_begun
            for each in self._running.values()
        )

    def is_held(self, running: Running) -> bool:
        """Whether nothing is done for it because nobody waits for it."""
        is_background = running.request.priority is Priority.BACKGROUND
        return self.holds_background and is_background and not running.has_begun

    @property
    def num_choices(self) -> int:
        """Of all that are not held."""
        return sum(
            each.request.num_choices for each in self._running.values() if not self.is_held(each)
        )

    def add(self, ticket: int, running: Running, kv_tokens: int) -> None:
        """A request was started, with this bound of KV."""
        self.pool.reserve(str(ticket), kv_tokens)
        self._running[ticket] = running
        self._nothing_left.clear()

    def on_deltas(self, deltas: Deltas) -> None:
        """Hand out what the worker has produced."""
        for ticket, delta in deltas:
            running = self._running.get(ticket)
            if running is None:
                continue  # cancelled while this was on its way
            running.has_begun = True
            running.answer.push(delta)
            running.metered.note(delta)
            if running.is_counted:
                self._counter.note_delta(delta)
            if running.answer.is_ended:
                self._forget(ticket)
                if running.is_counted:
                    self._counter.note_end(delta)
                if delta.finish_reason is not FinishReason.ERROR:
                    self._on_answered(running.answer, delta)

    def on_death(self, death: WorkerDied) -> None:
        """End what the dead worker was working on; what waited in it goes to the next one."""
        for ticket, running in tuple(self._running.items()):
            if running.has_begun or not running.may_repeat:
                self.drop(ticket, FinishReason.ERROR, death)
                continue
            running.may_repeat = False
            task = asyncio.get_running_loop().create_task(
                self._repeat(ticket, running), name=f"repeating request {ticket} of {self._name}"
            )
            self._restarting.add(task)
            task.add_done_callback(self._restarting.discard)

    def cancel(self, ticket: int) -> None:
        """The client of a request has left."""
        self.drop(ticket, FinishReason.CANCELLED)

    def drop(self, ticket: int, reason: FinishReason, error: BrimError | None = None) -> None:
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

    def end_waiting(self, check: Callable[[Request], None]) -> None:
        """End requests that have not begun and that `check` refuses with Busy, newest first."""
        for ticket, running in reversed(tuple(self._running.items())):
            if not running.has_begun:
                try:
                    check(running.request)
                except Busy as error:
                    self.drop(ticket, FinishReason.ERROR, error)

    def drop_held(self, reason: BrimError) -> None:
        """End held requests, whose model is to leave: they would come back to another worker."""
        for ticket, running in tuple(self._running.items()):
            if self.is_held(running):
                self.drop(ticket, FinishReason.ERROR, reason)

    async def drain(self, limit_s: float, reason: BrimError) -> None:
        """End what has not begun, let the rest finish, and end what is left at the limit."""
        for ticket, running in tuple(self._running.items()):
            if not running.has_begun:
                self.drop(ticket, FinishReason.ERROR, reason)
        try:
            async with asyncio.timeout(limit_s):
                await self._nothing_left.wait()
        except TimeoutError:
            for ticket in tuple(self._running):
                self.drop(ticket, FinishReason.ERROR, reason)

    async def stop(self) -> None:
        """Give nothing more to other workers; safe more than once."""
        for task in tuple(self._restarting):
            task.cancel()
        await asyncio.gather(*self._restarting, return_exceptions=True)

    async def _repeat(self, ticket: int, running: Running) -> None:
        try:
            await self._restart(ticket, running)
        except Exception as exc:
            if ticket in self._running:
                error = exc if isinstance(exc, BrimError) else _defect(exc)
                self.drop(ticket, FinishReason.ERROR, error)

    def _forget(self, ticket: int) -> None:
        """Give back what it reserved; the one place where a running request ends."""
        running = self._running.pop(ticket)
        self.pool.release(str(ticket))
        running.metered.finish(was_read=running.has_begun)
        if not self._running:
            self._nothing_left.set()
        self._on_end()


def _defect(exc: Exception) -> EngineError:
    _log.error("repeating a request failed: %s", where(exc))
    return EngineError(f"repeating the request failed: {type(exc).__name__}: {exc}")
