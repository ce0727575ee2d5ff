"""Keeps one model's worker running: starts it, restarts it with back-off, gives up on it.

Owns the process's life and the model's state.  What the worker owed when it died is told to
`on_death`; the answers themselves are model_host's business.
"""

import asyncio
import contextlib
import functools
import logging
import math
import time
from collections.abc import Callable

import msgspec

from brim.config.tree import WorkerSettings
from brim.core.event import EventKind
from brim.core.plan import Plan
from brim.core.stance import WorkLimits
from brim.errors import BrimError, Busy, EngineError, WorkerDied
from brim.runtime.api import ModelState
from brim.runtime.quarantine import Quarantine
from brim.runtime.recorder import Recorder
from brim.runtime.worker_process import Deltas, WorkerProcess
from brim.telemetry.events import log_event
from brim.worker.protocol import Loaded, Resized, WorkerOptions

_log = logging.getLogger(__name__)

RESTART_WAIT_S = 5.0
"""How long a request waits for a worker that died once: the first back-off and most loads are
shorter, so that one death costs later requests a pause and not an error."""


class Supervisor:
    """One model's worker, over all its lives.

    Args:
        plan: How the model is loaded.
        options: How its worker works.
        settings: Back-off, and deaths before quarantine.
        quarantine: The model's, which outlives its workers.
        on_deltas: Called with what the worker produces.
        on_death: Called once for each death, with what to tell those who were owed an answer.
        record: Where deaths and quarantine are recorded.
    """

    def __init__(
        self,
        plan: Plan,
        options: WorkerOptions,
        settings: WorkerSettings,
        *,
        quarantine: Quarantine,
        on_deltas: Callable[[Deltas], None],
        on_death: Callable[[WorkerDied], None],
        record: Recorder,
    ) -> None:
        self._plan = plan
        self._options = options
        self._settings = settings
        self._quarantine = quarantine
        self._on_deltas = on_deltas
        self._on_death = on_death
        self._record = record
        self._kv_tokens: int | None = None
        self._worker: WorkerProcess | None = None
        self._supervising: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._num_deaths_in_a_row = 0
        self._next_start_s = 0.0
        self.state = ModelState.STARTING
        self.reason = ""
        self.loaded: Loaded | None = None
        self.num_deaths = 0
        self.started_unix_s = 0
        self.progress: float | None = None
        """How far the load under way is, 0 to 1; None where the worker has not said."""
        self.load_began_s: float | None = None
        """By the monotonic clock; None where no load is under way."""

    @property
    def pid(self) -> int | None:
        """The running worker's process id."""
        return self._worker.pid if self._worker and self._worker.is_connected else None

    @property
    def forks_share_kv(self) -> bool:
        """Whether choices share their prompt's KV."""
        return self.loaded is not None and self.loaded.forks_share_kv

    @property
    def _is_ready(self) -> bool:
        return self.state is ModelState.READY and self.pid is not None

    async def start(self) -> None:
        """Start the worker and load the model, once.

        Raises:
            BrimError: It could not be loaded; nothing is left running.
        """
        self._worker = await self._launch()
        self._supervising = self._supervised(self._worker)

    async def worker(self) -> WorkerProcess:
        """The worker, ready to take requests; waits a moment where it is being restarted.

        Raises:
            Busy: It is not ready yet; `retry_after_s` says when it may be.
            EngineError: The model is quarantined or stopped.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RESTART_WAIT_S):
                while not self._is_ready and self._is_worth_waiting:
                    await self._changed.wait()
        if self._is_ready and self._worker is not None:
            return self._worker
        name = self._plan.model.name
        if self.state is ModelState.QUARANTINED:
            raise EngineError(
                f"model '{name}' is quarantined: {self.reason}; {self._quarantine.words()}"
            )
        if self.state is ModelState.STOPPED:
            raise EngineError(f"model '{name}' is stopped; start brim again to use it")
        load_s = 0.0 if self.loaded is None else self.loaded.load_s
        wait_s = math.ceil(max(1.0, self._next_start_s - time.monotonic() + load_s))
        what = f"is being started again ({self.reason})" if self.reason else "is being loaded"
        raise Busy(f"model '{name}' {what}; try again in {wait_s} s", retry_after_s=wait_s)

    def try_again(self) -> None:
        """Have a model that is in quarantine tried once; nothing where that is not due."""
        if self.state is not ModelState.QUARANTINED or not self._quarantine.is_due:
            return
        self._quarantine.lift()
        self._next_start_s = time.monotonic()
        self._set_state(ModelState.RESTARTING, "it is tried once more after its quarantine")
        self._supervising = self._supervised(None)

    def note_answer(self) -> None:
        """A request was answered to its end: deaths before it no longer count."""
        self._num_deaths_in_a_row = 0
        self._quarantine.forget()

    def set_limits(self, limits: WorkLimits) -> None:
        """Have the worker, and those that follow it, work within these limits."""
        self._options = msgspec.structs.replace(self._options, limits=limits)
        if self._worker is not None:
            self._worker.set_limits(limits)

    async def resize(self, kv_tokens: int) -> Resized:
        """Give the KV pool another size, which workers that follow have as well.

        Raises:
            BrimError: The worker died, or there is none.
        """
        resized = await (await self.worker()).resize(kv_tokens)
        self._kv_tokens = resized.kv_tokens
        return resized

    async def ask_to_end(self) -> bool:
        """Have the worker shut down; False where it is still there at the limit."""
        self._set_state(ModelState.STOPPED, "it was shut down")
        if self._supervising is not None:
            self._supervising.cancel()
            await asyncio.wait([self._supervising])
        return self._worker is None or await self._worker.ask_to_end()

    async def stop(self) -> None:
        """Shut the worker down, and kill it where it does not; safe more than once."""
        await self.ask_to_end()
        await self.kill()

    async def kill(self) -> None:
        """End at once what `ask_to_end` has left, if it has left anything."""
        if self._worker is not None:
            await self._worker.kill()  # does nothing to one that has ended

    @property
    def _is_worth_waiting(self) -> bool:
        if self.state in (ModelState.QUARANTINED, ModelState.STOPPED):
            return False
        return self._num_deaths_in_a_row <= 1 or self._quarantine.is_trial

    def _set_state(self, state: ModelState, reason: str = "") -> None:
        self.state, self.reason = state, reason
        self._changed.set()
        self._changed = asyncio.Event()

    async def _launch(self) -> WorkerProcess:
        self.progress, self.load_began_s = None, time.monotonic()
        try:
            worker = await WorkerProcess.spawn(self._plan, self._on_deltas)
            try:
                await self._load(worker)
            except BaseException:
                await worker.kill()
                raise
        finally:
            self.progress = self.load_began_s = None
        self.started_unix_s = int(time.time())
        self._set_state(ModelState.READY)
        return worker

    async def _load(self, worker: WorkerProcess) -> None:
        options = self._options
        self.loaded = await worker.load(
            self._plan, options, on_progress=functools.partial(setattr, self, "progress")
        )
        if self._kv_tokens is not None and self._kv_tokens != self._plan.kv_tokens:
            # The account has room for the pool that the one before it had, not for the plan's.
            await worker.resize(self._kv_tokens)
        if self._options is not options:
            worker.set_limits(self._options.limits)  # they changed meanwhile; nothing waits now

    def _supervised(self, worker: WorkerProcess | None) -> "asyncio.Task[None]":
        return asyncio.get_running_loop().create_task(
            self._supervise(worker), name=f"supervisor of {self._plan.model.name}"
        )

    async def _supervise(self, worker: WorkerProcess | None) -> None:
        """Follow the worker's deaths until it is stopped or quarantined; None: start one first."""
        while True:
            now = await self._relaunch() if worker is None else worker
            death = now if isinstance(now, BrimError) else await now.wait_dead()
            self._note_death(death)
            if self.state is ModelState.QUARANTINED:
                return
            # The next one must find the memory that the last one held.
            if not isinstance(now, BrimError):
                await now.wait_reaped()
            await asyncio.sleep(max(0.0, self._next_start_s - time.monotonic()))
            worker = None

    async def _relaunch(self) -> WorkerProcess | BrimError:
        """Another worker, or why there is none."""
        name = self._plan.model.name
        try:
            self._worker = worker = await self._launch()
        except BrimError as error:
            return error
        except Exception as exc:
            # Whatever it was, the model must stay looked after: back-off and quarantine bound how
            # often it is tried.
            _log.exception("restarting the worker of '%s' failed", name)
            return EngineError(
                f"the worker of model '{name}' could not be started again: "
                f"{type(exc).__name__}: {exc}"
            )
        # Whoever was told of the death learns that the model is back.
        self._record(
            EventKind.MODEL_LOADED,
            model=name,
            cause="its worker died and was started again",
            detail={"pid": worker.pid},
        )
        return worker

    def _note_death(self, death: BrimError) -> None:
        settings = self._settings
        self.num_deaths += 1
        self._num_deaths_in_a_row += 1
        num_deaths = self._num_deaths_in_a_row
        backoff_s = min(
            settings.restart_backoff_s * 2 ** (num_deaths - 1), settings.restart_backoff_limit_s
        )
        self._next_start_s = time.monotonic() + backoff_s
        log_event(
            "worker_died",
            model=self._plan.model.name,
            deaths_in_a_row=num_deaths,
            backoff_s=backoff_s,
            reason=death.message,
        )
        self._record(
            EventKind.WORKER_DIED,
            model=self._plan.model.name,
            cause=death.message,
            detail={"deaths_in_a_row": num_deaths, "backoff_s": backoff_s},
        )
        if num_deaths >= settings.deaths_before_quarantine or self._quarantine.is_trial:
            self._enter_quarantine(death)
            outlook = f"it has died too often; {self._quarantine.words()}"
        else:
            self._set_state(ModelState.RESTARTING, death.message)
            outlook = "it is being restarted; send the request again"
        self._on_death(
            WorkerDied(f"{death.message}; {outlook}", retry_after_s=max(1.0, math.ceil(backoff_s)))
        )

    def _enter_quarantine(self, death: BrimError) -> None:
        num_deaths = self._num_deaths_in_a_row
        self._quarantine.begin()
        times = f"{num_deaths} times" if num_deaths != 1 else "once"
        self._set_state(
            ModelState.QUARANTINED,
            f"its worker died {times} without an answer in between ({death.message}); "
            "start brim again, with a smaller --context where memory is tight, or wait",
        )
        log_event("model_quarantined", model=self._plan.model.name, deaths=num_deaths)
        self._record(
            EventKind.MODEL_QUARANTINED,
            model=self._plan.model.name,
            cause=f"{self.reason}; {self._quarantine.words()}",
            detail={
                "deaths_in_a_row": num_deaths,
                "tried_again_in_s": round(self._quarantine.left_s, 1),
            },
        )
