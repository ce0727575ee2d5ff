"""Keeps one model's worker running: starts it, restarts it with back-off, gives up on it.

Owns the process's life and the model's state.  What the worker owed when it died is told to
`on_death`; the answers themselves are model_host's business.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable

from brim.config.tree import WorkerSettings
from brim.core.plan import Plan
from brim.errors import BrimError, Busy, EngineError, WorkerDied
from brim.runtime.api import ModelState
from brim.runtime.worker_process import Deltas, WorkerProcess
from brim.telemetry.events import log_event
from brim.worker.protocol import Loaded, WorkerOptions

_log = logging.getLogger(__name__)

RESTART_WAIT_S = 5.0
"""How long a request waits for a worker that died once: the first back-off and most loads are
shorter, so that one death costs later requests a pause and not an error."""


class Supervisor:
    """One model's worker, over all its lives.

    Args:
        plan: How the model is loaded.
        options: How its worker works.
        settings: Back-off and quarantine.
        on_deltas: Called with what the worker produces.
        on_death: Called once for each death, with what to tell those who were owed an answer.
    """

    def __init__(
        self,
        plan: Plan,
        options: WorkerOptions,
        settings: WorkerSettings,
        *,
        on_deltas: Callable[[Deltas], None],
        on_death: Callable[[WorkerDied], None],
    ) -> None:
        self._plan = plan
        self._options = options
        self._settings = settings
        self._on_deltas = on_deltas
        self._on_death = on_death
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
        self._supervising = asyncio.get_running_loop().create_task(
            self._supervise(self._worker), name=f"supervisor of {self._plan.model.name}"
        )

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
            raise EngineError(f"model '{name}' is quarantined: {self.reason}")
        if self.state is ModelState.STOPPED:
            raise EngineError(f"model '{name}' is stopped; start brim again to use it")
        load_s = 0.0 if self.loaded is None else self.loaded.load_s
        wait_s = math.ceil(max(1.0, self._next_start_s - time.monotonic() + load_s))
        what = f"is being started again ({self.reason})" if self.reason else "is being loaded"
        raise Busy(f"model '{name}' {what}; try again in {wait_s} s", retry_after_s=wait_s)

    def note_answer(self) -> None:
        """A request was answered to its end: deaths before it no longer count."""
        self._num_deaths_in_a_row = 0

    async def stop(self) -> None:
        """Shut the worker down; safe more than once."""
        self._set_state(ModelState.STOPPED, "it was shut down")
        if self._supervising is not None:
            self._supervising.cancel()
            await asyncio.wait([self._supervising])
        if self._worker is not None:
            await self._worker.terminate()

    @property
    def _is_worth_waiting(self) -> bool:
        return self._num_deaths_in_a_row <= 1 and self.state not in (
            ModelState.QUARANTINED,
            ModelState.STOPPED,
        )

    def _set_state(self, state: ModelState, reason: str = "") -> None:
        self.state, self.reason = state, reason
        self._changed.set()
        self._changed = asyncio.Event()

    async def _launch(self) -> WorkerProcess:
        worker = await WorkerProcess.spawn(self._plan, self._on_deltas)
        try:
            self.loaded = await worker.load(self._plan, self._options)
        except BaseException:
            await worker.kill()
            raise
        self.started_unix_s = int(time.time())
        self._set_state(ModelState.READY)
        return worker

    async def _supervise(self, worker: WorkerProcess) -> None:
        """Follow the worker's deaths until it is stopped or quarantined."""
        death: BrimError = await worker.wait_dead()
        while True:
            self._note_death(death)
            if self.state is ModelState.QUARANTINED:
                return
            # The next one must find the memory that the last one held.
            await worker.wait_reaped()
            await asyncio.sleep(max(0.0, self._next_start_s - time.monotonic()))
            try:
                self._worker = worker = await self._launch()
            except BrimError as error:
                death = error
            except Exception as exc:
                # Whatever it was, the model must stay looked after: back-off and quarantine bound
                # how often it is tried.
                _log.exception("restarting the worker of '%s' failed", self._plan.model.name)
                death = EngineError(
                    f"the worker of model '{self._plan.model.name}' could not be started again: "
                    f"{type(exc).__name__}: {exc}"
                )
            else:
                log_event("worker_restarted", model=self._plan.model.name, pid=worker.pid)
                death = await worker.wait_dead()

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
        if num_deaths >= settings.deaths_before_quarantine:
            self._set_state(
                ModelState.QUARANTINED,
                f"its worker died {num_deaths} times without an answer in between "
                f"({death.message}); "
                "start brim again, with a smaller --context where memory is tight",
            )
            log_event("model_quarantined", model=self._plan.model.name, deaths=num_deaths)
            outlook = "it has died too often and is not restarted"
        else:
            self._set_state(ModelState.RESTARTING, death.message)
            outlook = "it is being restarted; send the request again"
        self._on_death(
            WorkerDied(f"{death.message}; {outlook}", retry_after_s=max(1.0, math.ceil(backoff_s)))
        )
