"""One served model's life: loaded, measured, resized, unloaded; and what it says of itself.

Requests get in through `admission`; what they are owed is `owed`'s; who is in memory and when is
`residency`'s.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable

import msgspec

from brim.config.tree import Settings
from brim.core.answer import Delta
from brim.core.event import EventKind
from brim.core.machine import MachineSpec
from brim.core.plan import Plan
from brim.core.request import Request
from brim.core.stance import WorkLimits
from brim.errors import BrimError, EngineError
from brim.governor.readings import ModelReading
from brim.ledger.history import ForecastHistory
from brim.ledger.kv import KvAccount
from brim.machine.process import resident_bytes
from brim.runtime.admission import Admission, not_kept, shutting_down
from brim.runtime.answer import StreamedAnswer
from brim.runtime.api import ModelState, ModelStatus
from brim.runtime.forecast_errors import LoadRecord
from brim.runtime.metering import Metering, WrittenBytes
from brim.runtime.owed import Owed
from brim.runtime.quarantine import Quarantine
from brim.runtime.recorder import Recorder
from brim.runtime.request_counts import RequestCounter
from brim.runtime.seat import Seat, Unloaded
from brim.runtime.supervisor import Supervisor
from brim.runtime.worker_options import cache_options, worker_options
from brim.worker.protocol import Resized, Stats

FILLED = 0.9
"""Of a window: so much of it used has touched about what a full one does."""

LAST_STATS_LIMIT_S = 1.0
"""For an idle worker's last counters before it ends: it answers within a step, and has none."""


class ModelHost:
    """Admits requests for one model and hands out their answers.

    Args:
        wish: How the model is to be loaded where there is room.
        settings: Bounds of queue and answers, back-off.
        seat: Who brings it into memory.
        history: Keeps what its loads really take.
        metering: What apps may use.
        record: Where its events go.
        on_idle: Called whenever its last request has ended.
    """

    def __init__(
        self,
        wish: Plan,
        settings: Settings,
        *,
        seat: Seat,
        history: ForecastHistory,
        metering: Metering,
        record: Recorder,
        on_idle: Callable[[], None],
    ) -> None:
        self.name = wish.model.name
        self.wish = wish
        self.plan = wish
        """How it is loaded, or will be."""
        self.resident_bytes: int | None = None
        """As last measured, None while no worker is up."""
        self.last_used_s = time.monotonic()
        """When a request last came or ended, or it was loaded."""
        self.can_resize = True
        """Until its engine says otherwise."""
        self._settings = settings
        self._seat = seat
        self._history = history
        self._metering = metering
        self._record = record
        self._on_idle = on_idle
        self._limits = WorkLimits()
        self._max_inflight_bytes = 0
        self._is_loaded = False
        self._absence = ""
        self._load_record: LoadRecord | None = None
        self._num_deaths_before = 0
        self._num_failed_loads = 0
        self._quarantine = Quarantine()
        self._longest_tokens = 0
        self._num_entered = 0
        self._worker_stats: Stats | None = None
        self._written = WrittenBytes()
        self._counter = RequestCounter()
        self._admission = Admission(
            self, settings, seat=seat, counter=self._counter, metering=metering
        )
        self.owed = Owed(
            self.name,
            KvAccount(wish.kv_tokens),
            self._counter,
            restart=self._admission.restart,
            on_answered=self._note_answer,
            on_end=self._note_end,
        )
        self.supervisor = self._new_supervisor()

    @property
    def is_loaded(self) -> bool:
        """Whether a worker has the model, or is being restarted with it."""
        return self._is_loaded

    @property
    def is_quarantined(self) -> bool:
        """Whether it failed so often that it is not tried again for some minutes."""
        return self._quarantine.is_on

    @property
    def wanted_inflight_bytes(self) -> int:
        """What its worker would use of memory for KV on its way to the disk."""
        cache = cache_options(self._settings.cache)
        return 0 if cache is None else cache.max_inflight_bytes

    @property
    def num_in_flight(self) -> int:
        """Requests that are admitted or on their way in.

        Without those that wait for its turn, and those of the background that are held.
        """
        return len(self.owed) - self.owed.num_held + self._num_entered

    @property
    def is_idle(self) -> bool:
        """Whether nothing is in flight."""
        return not self.num_in_flight

    @property
    def idle_s(self) -> float:
        """Since its last request ended; 0 while one is in flight."""
        return time.monotonic() - self.last_used_s if self.is_idle else 0.0

    @property
    def needed_tokens(self) -> int:
        """Cells without which its requests could not go on, as far as is known here."""
        stats = self._worker_stats
        running = 0 if stats is None or self.is_idle else stats.num_needed_tokens
        return max(running, self.owed.pool.largest_bound)

    def enter(self) -> None:
        """A request is on its way in; while it is loaded alone.

        Of a model in quarantine it begins the trial, once that is due.
        """
        assert self._is_loaded
        self.supervisor.try_again()
        self._num_entered += 1
        self.last_used_s = time.monotonic()

    def leave(self) -> None:
        """A request that was on its way in was admitted, or has gone."""
        self._num_entered -= 1
        self._note_end()

    def status(self) -> ModelStatus:
        """Where the model stands, but for its place in memory."""
        supervisor, stats = self.supervisor, self._worker_stats
        loaded, num_waiting = supervisor.loaded, self.owed.num_waiting
        return ModelStatus(
            name=self.name,
            state=self._state,
            reason=self._reason(),
            created_unix_s=supervisor.started_unix_s,
            plan=self.plan,
            pid=supervisor.pid,
            footprint=None if loaded is None else loaded.footprint,
            # The last reading may be of a process that has died since.
            resident_bytes=None if supervisor.pid is None else self.resident_bytes,
            load_s=None if loaded is None else loaded.load_s,
            num_running=len(self.owed) - num_waiting,
            num_waiting=num_waiting,
            num_deaths=self._num_deaths_before + supervisor.num_deaths,
            worker_stats=stats,
            requests=self._counter.counts(),
            overflow=self._settings.models.overflow,
            forecast_errors=() if self._load_record is None else self._load_record.errors(),
            kv_pool_tokens=self.owed.pool.kv_tokens if self._is_loaded else 0,
            kv_used_tokens=0 if stats is None else stats.num_needed_tokens,
            idle_s=self.idle_s if self._is_loaded and self.is_idle else None,
            load_progress=self.load_progress,
            load_eta_s=self._load_eta_s(),
        )

    def reading(self) -> ModelReading:
        """What the governor sees of it, but for its place in memory."""
        stats = self._worker_stats
        return ModelReading(
            name=self.name,
            is_loaded=self._is_loaded,
            is_loading=self.supervisor.load_began_s is not None,
            num_in_flight=self.num_in_flight,
            idle_s=self.idle_s,
            resident_bytes=self.resident_bytes,
            kv_pool_tokens=self.owed.pool.kv_tokens if self._is_loaded else 0,
            kv_plan_tokens=self.plan.kv_tokens,
            kv_idle_tokens=0 if stats is None else stats.prefix.num_idle_tokens,
            kv_needed_tokens=self.needed_tokens if self._is_loaded else 0,
            kv_token_bytes=self.plan.memory.kv_bytes // max(1, self.plan.kv_tokens),
            can_resize_kv=self.can_resize and bool(self.plan.memory.kv_bytes),
        )

    @property
    def load_progress(self) -> float | None:
        """How far its load is, 0 to 1; None while there is none."""
        began_s, progress = self.supervisor.load_began_s, self.supervisor.progress
        return None if began_s is None else progress or 0.0

    def check_loadable(self) -> None:
        """Refuse to load what failed each time that it was loaded: others gave way to it in vain.

        Raises:
            EngineError: The model is quarantined, and no trial is due.
        """
        if self.is_quarantined and not self._quarantine.is_due:
            raise EngineError(f"model '{self.name}' is quarantined: {self._reason()}")

    def defer(self, reason: str) -> None:
        """Leave it out of memory until it is asked for."""
        self._absence = reason

    def take(self, plan: Plan, pool: KvAccount) -> None:
        """Be loaded by this plan from now on; while it is out of memory alone."""
        assert not self._is_loaded
        self.plan = plan
        self.owed.pool = pool

    async def load(self, machine: MachineSpec, *, max_inflight_bytes: int = 0) -> None:
        """Load the model, granted by this reading of the machine.

        Args:
            machine: The reading.
            max_inflight_bytes: Set aside for KV on its way to the disk; 0 writes none.

        Raises:
            BrimError: It could not be loaded.
        """
        self._num_deaths_before += self.supervisor.num_deaths
        self._max_inflight_bytes = max_inflight_bytes
        self.supervisor = self._new_supervisor()
        self._absence = ""
        self._quarantine.lift()
        try:
            await self.supervisor.start()
        except BaseException as exc:
            self._absence = f"it could not be loaded: {exc}"
            if isinstance(exc, BrimError):
                self._note_failed_load()
            raise
        self._is_loaded, self._longest_tokens, self._num_failed_loads = True, 0, 0
        self.last_used_s = time.monotonic()
        self._load_record = LoadRecord(self.plan, machine, self._history)
        if self.supervisor.loaded is not None:
            await self._load_record.loaded(self.supervisor.loaded.footprint)

    def drop_held(self) -> None:
        """Tell background requests that are held to come again: their model is about to leave."""
        self.owed.drop_held(not_kept(self._seat.stance()))

    async def unload(self, reason: str) -> Unloaded:
        """Take an idle model out of memory; its process is gone when this returns.

        A process that does not end when it is asked to is killed, and that is recorded.  A model in
        quarantine has none, and stays there: no request may load it before its trial is due.
        """
        assert self.is_idle
        began_s = time.monotonic()
        if self.supervisor.state is ModelState.QUARANTINED:
            self._is_loaded = False
            return Unloaded(before_bytes=0, after_bytes=0, took_s=0.0)
        self._is_loaded, self._absence = False, reason
        with contextlib.suppress(BrimError, TimeoutError):
            async with asyncio.timeout(LAST_STATS_LIMIT_S):
                await self.worker_stats()
        pid = self.supervisor.pid
        before = 0 if pid is None else await _resident(pid)
        if not await self.supervisor.ask_to_end() and pid is not None:
            self._record(
                EventKind.UNLOAD_FAILED,
                model=self.name,
                cause="its process did not end when it was asked to, and is killed",
                before_bytes=before,
                after_bytes=await _resident(pid),
                took_s=time.monotonic() - began_s,
            )
        await self.supervisor.kill()
        self.resident_bytes = self._worker_stats = None
        after = 0 if pid is None else await _resident(pid)
        took_s = time.monotonic() - began_s
        return Unloaded(before_bytes=before, after_bytes=after, took_s=took_s)

    async def resize(self, kv_tokens: int) -> Resized:
        """Give the KV pool another size; the account is not told.

        Raises:
            BrimError: The worker died.
        """
        resized = await self.supervisor.resize(kv_tokens)
        if resized.error is not None and resized.error.kind == "Unsupported":
            self.can_resize = False
        return resized

    def set_limits(self, limits: WorkLimits) -> None:
        """Have its workers work within these limits from now on."""
        self._limits = limits
        self.owed.holds_background = not limits.runs_background
        self.supervisor.set_limits(limits)

    async def submit(self, request: Request, instead_of: str | None = None) -> StreamedAnswer:
        """Count, admit and start a request; see `runtime.api.Runtime.submit`."""
        return await self._admission.submit(request, instead_of)

    async def worker_stats(self) -> Stats:
        """The worker's counters.

        Raises:
            Busy: It is being restarted.
            EngineError: The model is quarantined, stopped, or the worker died.
        """
        worker = await self.supervisor.worker()
        self._worker_stats = stats = await worker.stats()
        self._written.note(worker.pid, stats, self._metering.meter)
        return stats

    async def measure_resident(self) -> int:
        """Bytes that its process holds now; 0 where there is none."""
        pid = self.supervisor.pid
        if pid is None:
            return 0
        measured = await _resident(pid)
        if pid == self.supervisor.pid:
            self.resident_bytes = measured
        return measured

    async def measure(self) -> None:
        """Read what the worker holds and has done."""
        pid, record = self.supervisor.pid, self._load_record
        measured = None if pid is None else await asyncio.to_thread(resident_bytes, pid)
        if pid != self.supervisor.pid:
            return  # it was unloaded or has died meanwhile
        self.resident_bytes = measured
        is_whole = self.owed.pool.kv_tokens == self.plan.kv_tokens
        if measured is not None and record is not None and is_whole:
            has_filled = self._longest_tokens >= FILLED * self.plan.context_tokens
            await record.measured(measured, has_filled=has_filled)
        if pid is not None:
            with contextlib.suppress(BrimError):  # it died meanwhile: the supervisor knows
                await self.worker_stats()

    def end_waiting_where_short(self) -> None:
        """End requests that have not begun and whose memory other programs took, newest first."""
        self.owed.end_waiting(lambda request: self._admission.check_growth(0, request))

    def refuse_new(self) -> None:
        """Refuse requests from now on, those that are being prepared included."""
        self._admission.is_draining = True

    async def drain(self, limit_s: float) -> None:
        """Refuse what has not begun, let the rest finish, and end what is left at the limit."""
        self.refuse_new()
        await self.owed.drain(limit_s, shutting_down())

    async def stop(self) -> None:
        """End everything that is owed, and the worker; safe more than once."""
        await self.drain(0.0)
        await self.owed.stop()
        self._is_loaded, self._absence = False, ""
        await self.supervisor.stop()

    @property
    def _state(self) -> ModelState:
        if self.is_quarantined:
            return ModelState.QUARANTINED
        return ModelState.UNLOADED if self._absence else self.supervisor.state

    def _reason(self) -> str:
        """Why it is not ready, in words, and when it is tried again where it is not."""
        reason = self._absence or self.supervisor.reason
        if not self.is_quarantined:
            return reason
        if self._absence:
            times = (
                f"{self._num_failed_loads} times in a row" if self._num_failed_loads > 1 else "once"
            )
            reason += (
                f", {times}; start brim again, with another file or a smaller --context, or wait"
            )
        return f"{reason}; {self._quarantine.words()}"

    def _note_failed_load(self) -> None:
        self._num_failed_loads += 1
        limit = self._settings.worker.deaths_before_quarantine
        if self._num_failed_loads < limit and not self._quarantine.is_trial:
            return
        self._quarantine.begin()
        self._record(
            EventKind.MODEL_QUARANTINED,
            model=self.name,
            cause=self._reason(),
            detail={"tried_again_in_s": round(self._quarantine.left_s, 1)},
        )

    def _load_eta_s(self) -> float | None:
        began_s, progress = self.supervisor.load_began_s, self.supervisor.progress
        if began_s is None or not progress:
            return None
        return (time.monotonic() - began_s) * (1.0 - progress) / progress

    def _new_supervisor(self) -> Supervisor:
        options = worker_options(self._settings, max_inflight_bytes=self._max_inflight_bytes)
        return Supervisor(
            self.plan,
            msgspec.structs.replace(options, limits=self._limits),
            self._settings.worker,
            quarantine=self._quarantine,
            on_deltas=self.owed.on_deltas,
            on_death=self.owed.on_death,
            record=self._record,
        )

    def _note_end(self) -> None:
        self.last_used_s = time.monotonic()
        if self.is_idle:
            self._on_idle()

    def _note_answer(self, answer: StreamedAnswer, last: Delta) -> None:
        """A request was answered to its end: it says how long answers get and take."""
        self.supervisor.note_answer()
        self._admission.note_answer(answer, last)
        if last.timings is not None:
            num_tokens = answer.num_prompt_tokens + last.timings.num_completion_tokens
            self._longest_tokens = max(self._longest_tokens, num_tokens)


async def _resident(pid: int) -> int:
    """Bytes of a process that is known to be, or to have been, ours; 0 where it is gone."""
    return await asyncio.to_thread(resident_bytes, pid) or 0
