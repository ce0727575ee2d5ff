"""How requests of one model get in: entered, counted, bounded, and started.

A request waits for its model's place in memory, is prepared in the worker (phase one: how long is
it?), bounded and checked against what holds now, and then started (phase two): the worker's
scheduler, which knows what is shared, lets it wait for its turn.
"""

import itertools
import math
from collections import Counter
from typing import TYPE_CHECKING

import msgspec

from brim.config.tree import Settings
from brim.core.answer import Delta
from brim.core.request import Priority, Request
from brim.core.stance import Stance
from brim.core.units import gib
from brim.errors import BrimError, Busy, WorkerDied
from brim.runtime.answer import StreamedAnswer
from brim.runtime.bounds import Bounds, bounds_of, windowed, with_answer
from brim.runtime.metering import Metered, Metering
from brim.runtime.owed import Running
from brim.runtime.request_counts import RequestCounter
from brim.runtime.summaries import Summaries
from brim.runtime.worker_process import WorkerProcess
from brim.scheduler.admission import check_choices
from brim.worker.protocol import Counted

if TYPE_CHECKING:
    from brim.runtime.model_host import ModelHost
    from brim.runtime.seat import Seat

MAX_RETRY_AFTER_S = 60.0
"""Longer advice than a minute would be a guess about other clients."""

PRESSURE_RETRY_AFTER_S = 15.0
"""By then the machine has been read again."""

MAX_GROWTHS = 3
"""A pool that is made smaller each time that it has grown for a request is not to be had."""


class Admission:
    """The way in of one model.

    Args:
        host: The model.
        settings: Bounds of queue and answers.
        seat: Who brings it into memory.
        counter: Counts refusals.
        metering: What apps may use.
    """

    def __init__(
        self,
        host: "ModelHost",
        settings: Settings,
        *,
        seat: "Seat",
        counter: RequestCounter,
        metering: Metering,
    ) -> None:
        self._host = host
        self._settings = settings
        self._seat = seat
        self._counter = counter
        self._metering = metering
        self._summaries = Summaries(self._admit_own)
        self._tickets = itertools.count(1)
        self._submitting: Counter[Priority] = Counter()
        self._mean_answer_s = 1.0
        self.is_draining = False

    async def submit(self, request: Request, instead_of: str | None) -> StreamedAnswer:
        """Enter, count, admit and start a request; see `runtime.api.Runtime.submit`.

        Args:
            request: The request.
            instead_of: The model that was asked for, where that is another one.
        """
        metered: Metered | None = None
        try:
            self._check_open(request.priority)
            check_choices(request.num_choices, self._host.plan)
            if request.keeps_on_disk and not self._metering.keeps_on_disk(request.app):
                request = msgspec.structs.replace(request, keeps_on_disk=False)
            metered = self._metering.of(request)
            metered.enter()
        except BrimError as error:
            self._counter.note_refusal(error)
            raise
        try:
            return await self._enter(request, metered, instead_of)
        except BaseException as error:
            metered.finish()
            if isinstance(error, BrimError):
                self._counter.note_refusal(error)
            raise

    def note_answer(self, answer: StreamedAnswer, last: Delta) -> None:
        """A request was answered to its end: it says how long answers take."""
        if last.timings is not None:
            # Without its wait.  One part in eight: about the last dozen answers count.
            answer_s = last.timings.prefill_s + last.timings.decode_s
            self._mean_answer_s += (answer_s - self._mean_answer_s) / 8

    async def restart(self, ticket: int, running: Running) -> None:
        """Give a request that waited in a worker that died to the next one."""
        worker = running.worker = await self._worker()
        await self._summaries.prepare(worker, ticket, running.request)
        if ticket in self._host.owed:
            worker.start(ticket, running.answer.max_tokens)
        else:
            worker.cancel(ticket)  # its client has left meanwhile

    def check_growth(self, kv_tokens: int, request: Request) -> None:
        """Refuse what would have to be swapped in: other programs took what the model was granted.

        A request that is forced by the client, where the operator allows it, goes on.

        Args:
            kv_tokens: Its bound; 0 where the account has it already.
            request: The request.

        Raises:
            Busy: Bytes are missing.
        """
        short_bytes = self._seat.short_of_growth(self._host.name, kv_tokens)
        if short_bytes and not request.force:
            forced = ""
            if self._settings.models.allow_force:
                forced = ', or force it with "brim": {"force": true}'
            raise Busy(
                f"other programs hold memory that this request may need: {gib(short_bytes)} are "
                f"missing; close some, try again in {PRESSURE_RETRY_AFTER_S:.0f} s{forced}",
                retry_after_s=PRESSURE_RETRY_AFTER_S,
            )

    async def _enter(
        self, request: Request, metered: Metered, instead_of: str | None
    ) -> StreamedAnswer:
        self._submitting[request.priority] += 1
        try:
            await self._seat.enter(self._host, force=request.force)
            try:
                return await self._admit_or_again(request, metered, instead_of)
            finally:
                self._host.leave()
        finally:
            self._submitting[request.priority] -= 1

    async def _admit_or_again(
        self, request: Request, metered: Metered, instead_of: str | None
    ) -> StreamedAnswer:
        try:
            return await self._admit(await self._worker(), request, metered, instead_of=instead_of)
        except WorkerDied:
            # It was not started: nothing of it has happened yet, so it is prepared once more.
            # Not more often, lest a prompt that kills workers take three of them.
            self._check_draining()
        return await self._admit(
            await self._worker(), request, metered, instead_of=instead_of, may_repeat=False
        )

    async def _worker(self) -> WorkerProcess:
        """The worker; see `Supervisor.worker`."""
        try:
            return await self._host.supervisor.worker()
        except BrimError:
            # Of a model that stopped while the request waited for it, the server's end is the news.
            self._check_draining()
            raise

    async def _admit(
        self,
        worker: WorkerProcess,
        request: Request,
        metered: Metered,
        *,
        instead_of: str | None = None,
        may_repeat: bool = True,
    ) -> StreamedAnswer:
        ticket, host = next(self._tickets), self._host
        try:
            metered.check_kv_quality(host.plan)
            wanted = windowed(request, host.plan, self._seat.stance())
            counted = await self._summaries.prepare(worker, ticket, wanted)
            bounds = self._bounds(request, counted, metered)
            await self._have_pool(bounds.kv_tokens)
            # Others of its app may have taken of the budget meanwhile; from here on nothing waits.
            bounds = self._bounds(request, counted, metered)
            metered.check_share(host.name, bounds.kv_tokens, host.plan.kv_tokens)
            self.check_growth(bounds.kv_tokens, request)
            self._check_draining()
            worker.start(ticket, bounds.max_tokens)
            metered.begin(
                host.name,
                num_prompt_tokens=counted.num_prompt_tokens,
                max_completion_tokens=bounds.max_tokens * request.num_choices,
                kv_tokens=bounds.kv_tokens,
            )
        except BaseException:
            # The client's leaving is one of these: the worker must not hold its prompt for ever.
            worker.cancel(ticket)
            raise
        queue_place = self._queue_place(bounds.kv_tokens, request)
        answer = StreamedAnswer(
            ticket,
            num_prompt_tokens=counted.num_prompt_tokens,
            max_tokens=bounds.max_tokens,
            num_choices=request.num_choices,
            plan=host.plan,
            queue_place=queue_place,
            overflow=counted.overflow,
            moved_lines=counted.moved_lines,
            instead_of=instead_of,
            on_cancel=host.owed.cancel,
        )
        if counted.overflow is not None:
            self._counter.note_removal(counted.overflow.num_removed_tokens)
        host.owed.add(
            ticket,
            Running(
                wanted, answer, worker, metered,
                has_begun=queue_place == 0, may_repeat=may_repeat, is_counted=not metered.is_own,
            ),
            bounds.kv_tokens,
        )  # fmt: skip
        return answer

    async def _admit_own(self, worker: WorkerProcess, request: Request) -> StreamedAnswer:
        """Admit a request of brim itself: counters tell of what clients sent, and leave it out."""
        metered = self._metering.of(request, is_own=True)
        try:
            return await self._admit(worker, request, metered)
        except BaseException:
            metered.finish()
            raise

    def _bounds(self, request: Request, counted: Counted, metered: Metered) -> Bounds:
        plan, forks_share_kv = self._host.plan, self._host.supervisor.forks_share_kv
        bounds = bounds_of(
            request,
            counted,
            plan,
            self._seat.stance(),
            answer_tokens=self._settings.models.answer_tokens,
            forks_share_kv=forks_share_kv,
        )
        max_tokens = metered.answer_bound(
            num_prompt_tokens=counted.num_prompt_tokens,
            num_choices=request.num_choices,
            max_tokens=bounds.max_tokens,
        )
        if max_tokens == bounds.max_tokens:
            return bounds
        return with_answer(request, counted, max_tokens, plan, forks_share_kv=forks_share_kv)

    async def _have_pool(self, kv_tokens: int) -> None:
        """Have a pool that was made smaller grow for a request.

        Raises:
            Busy: There is no room for it now.
        """
        for _ in range(MAX_GROWTHS):
            if kv_tokens <= self._host.owed.pool.kv_tokens:
                return
            await self._seat.grow(self._host, kv_tokens)
        if kv_tokens > self._host.owed.pool.kv_tokens:
            raise Busy(
                f"the KV pool of model '{self._host.name}' was made smaller while memory is short; "
                f"try again in {PRESSURE_RETRY_AFTER_S:.0f} s",
                retry_after_s=PRESSURE_RETRY_AFTER_S,
            )

    def _queue_place(self, kv_tokens: int, request: Request) -> int:
        """Where the request stands in the worker's queue: 0 runs at once, 1 is the next.

        As far as is known here: the worker puts interactive and short requests first, and those
        that share prefixes need fewer cells than their bounds.
        """
        owed = self._host.owed
        num_waiting = owed.num_waiting - owed.num_held
        if num_waiting or self._is_held(request):
            return num_waiting + 1
        has_sequences = owed.num_choices + request.num_choices <= self._host.plan.max_sequences
        return 0 if has_sequences and owed.pool.has_room_for(kv_tokens) else 1

    def _is_held(self, request: Request) -> bool:
        return self._host.owed.holds_background and request.priority is Priority.BACKGROUND

    def _check_draining(self) -> None:
        if self.is_draining:
            raise shutting_down()

    def _check_open(self, priority: Priority) -> None:
        """Refuse a request while nothing new is admitted, and one more than may wait.

        What waits in the background takes nobody's place in the queue but its own kind's: while
        it is held that would last for hours.
        """
        self._check_draining()
        stance = self._seat.stance()
        if not stance.admits:
            raise not_admitted(stance.reason, stance.retry_after_s)
        plan = self._host.plan
        num_open = self._submitting.total() + len(self._host.owed)
        if priority is not Priority.BACKGROUND:
            num_open -= self._submitting[Priority.BACKGROUND]
            num_open -= self._host.owed.num_background_waiting
        num_ahead = max(0, num_open - plan.max_sequences)
        if num_open < plan.max_sequences + self._settings.models.max_queued_requests:
            return
        wait_s = self._mean_answer_s * max(1, num_ahead) / plan.max_sequences
        wait_s = math.ceil(min(max(wait_s, 1.0), MAX_RETRY_AFTER_S))
        raise Busy(
            f"{num_open} requests run or wait for model '{self._host.name}', as many as may "
            f"({num_ahead} in the queue); try again in {wait_s} s",
            retry_after_s=wait_s,
        )


def not_admitted(reason: str, retry_after_s: float) -> Busy:
    """What clients are told while the governor lets nothing new in."""
    return Busy(
        f"{reason or 'memory is short'}; running answers are finished first: try again in "
        f"{retry_after_s:.0f} s",
        retry_after_s=retry_after_s,
    )


def not_kept(stance: Stance) -> Busy:
    """What held background requests are told when their model leaves."""
    return Busy(
        f"{stance.reason or 'power or memory is short'}: background requests wait, and the model "
        f"of this one leaves memory; send it again in {stance.retry_after_s:.0f} s",
        retry_after_s=stance.retry_after_s,
    )


def shutting_down() -> Busy:
    """What clients are told while the server drains."""
    return Busy("the server is shutting down; send the request again", retry_after_s=5.0)
