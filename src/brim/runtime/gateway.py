"""Puts the gateway together: one ledger account, one host for each model, one way in.

Owns the order of things at start and stop; implements `runtime.api.Runtime`.
"""

import asyncio
import contextlib
from collections.abc import Callable, Collection, Sequence

import msgspec

from brim.config.tree import Settings
from brim.core.machine import MachineSpec
from brim.core.plan import Grant, Plan
from brim.core.request import Request
from brim.core.stance import Stance
from brim.errors import ConfigError, InvalidRequest, NotFound, Unauthorized
from brim.ledger.account import Account
from brim.ledger.book import Book
from brim.ledger.entry import EntryLine, Statement
from brim.ledger.history import ForecastHistory
from brim.runtime.actuator import Actuator
from brim.runtime.admission import shutting_down
from brim.runtime.answer import StreamedAnswer
from brim.runtime.api import ModelStatus
from brim.runtime.granter import Fit, Granter
from brim.runtime.groups import Phase
from brim.runtime.metering import Meter, Metering
from brim.runtime.model_host import ModelHost
from brim.runtime.recorder import Recorder
from brim.runtime.residency import Residency
from brim.telemetry.event_log import EventLog
from brim.telemetry.events import log_event
from brim.worker.protocol import Stats

MEASURE_PERIOD_S = 5.0
"""Between two looks at what the workers hold: a person watching sees change, the system no load."""

READ_PERIOD_S = 15.0
"""Between two readings of the machine for admission: other programs take memory at the pace at
which people open them, and a reading walks the page tables of our workers, 30 ms for one of
1.8 GB."""

ENERGY_PERIOD_S = 1.0
"""Between two looks at the energy meter: as long as requests of two apps take turns."""


def _unsaid(_: str) -> None:
    """Nobody listens."""


class Gateway:
    """Serves planned models; nothing is loaded that the account has not granted.

    Use it as an async context manager, or call `start` and `stop`.

    Args:
        plans: The models, in the order in which they are listed; names must differ.
        settings: The settings.
        account: The machine's account; what the gateway is granted it gives back at `stop`.
        read_machine: A fresh reading of the machine; called outside the event loop.
        book: Where other processes of this machine see our grants, and we theirs.
        history: Keeps what loads were forecast to take and took; in memory where None.
        fit: Makes a plan smaller that does not fit comfortably; None loads plans as they are.
        force: Load even what does not fit.
        say: Told what a person should know: a wait, a smaller context.
        events: Where it is recorded what happens to models; one of its own where None.
        meter: Bounds and records what apps use; None where there are no apps.
        pinned_by_apps: Models that apps want kept in memory; asked again and again.
        read_joules: Joules that the machine has used since the first reading, or None while it
            cannot tell; called outside the event loop.

    Raises:
        ConfigError: Two plans have one name, or a model has two partners.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        *,
        settings: Settings,
        account: Account,
        read_machine: Callable[[], MachineSpec],
        book: Book | None = None,
        history: ForecastHistory | None = None,
        fit: Fit | None = None,
        force: bool = False,
        say: Callable[[str], None] = _unsaid,
        events: EventLog | None = None,
        meter: Meter | None = None,
        pinned_by_apps: Callable[[], Collection[str]] = tuple,
        read_joules: Callable[[], float | None] | None = None,
    ) -> None:
        self._settings = settings
        self._account = account
        history = ForecastHistory(None) if history is None else history
        self._granter = Granter(
            account, read_machine=read_machine, book=book, history=history, fit=fit
        )
        self._event_log = EventLog() if events is None else events
        self._metering = Metering(meter)
        self._read_joules = read_joules
        self._stance = Stance()
        record = Recorder(self._event_log, is_simulated=self._is_simulated)
        self._hosts: dict[str, ModelHost] = {}
        for plan in plans:
            if plan.model.name in self._hosts:
                raise ConfigError(f"two models are named '{plan.model.name}'; rename one")
            self._hosts[plan.model.name] = ModelHost(
                plan,
                settings,
                seat=self,
                history=history,
                metering=self._metering,
                record=record,
                on_idle=self._note_idle,
            )
        self._residency = Residency(
            self._hosts,
            account,
            self._granter,
            settings=settings.models,
            record=record,
            pinned_by_apps=pinned_by_apps,
            force=force,
            say=say,
        )
        self.actuator = Actuator(self._residency, settings.governor, self.set_stance)
        self._watching: list[asyncio.Task[None]] = []
        self._is_draining = False

    async def __aenter__(self) -> "Gateway":
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stop()

    def grants(self) -> dict[str, Grant]:
        """What the account answered for each model that is in memory."""
        return dict(self._residency.grants)

    def models(self) -> list[ModelStatus]:
        """All served models, in the order they were given."""
        statement = self.statement()
        lines = {} if statement is None else {line.name: line for line in statement.entries}
        return [self._status(host, lines.get(name)) for name, host in self._hosts.items()]

    @property
    def event_log(self) -> EventLog:
        """What happened to models and to what is allowed."""
        return self._event_log

    def stance(self) -> Stance:
        """What is allowed at the moment."""
        return self._stance

    def set_stance(self, stance: Stance) -> None:
        """Have admission, loads and workers follow a stance from now on."""
        self._stance = stance
        for host in self._hosts.values():
            host.set_limits(stance.work)
        self._residency.set_stance(stance)

    def load_progress(self, model: str) -> float | None:
        """See `runtime.api.Runtime.load_progress`."""
        if model not in self._hosts:
            return None
        progress = self._hosts[model].load_progress
        if progress is None and self._residency.num_waiting(model):
            return 0.0
        return progress

    def statement(self) -> Statement | None:
        """The account by the newest reading of the machine."""
        return self._granter.statement()

    def is_draining(self) -> bool:
        """Whether new requests are refused because the server is shutting down."""
        return self._is_draining

    async def start(self, *, wait_s: float = 0.0) -> None:
        """Have every model granted, then load them, one after the other.

        A model that has no room beside the others, and has it alone, is loaded when it is asked
        for, in the place of idle ones.

        Args:
            wait_s: How long to wait for memory that other programs hold.

        Raises:
            DoesNotFit: The account refuses one; nothing was started.
            BrimError: One could not be loaded; the others were stopped again.
        """
        try:
            await self._residency.start(wait_s)
        except BaseException:
            await self.stop()
            raise
        # One task a model: one that hangs must not hide from us what the others hold.
        loop = asyncio.get_running_loop()
        self._watching = [
            loop.create_task(self._measure(name, host), name=f"measuring {name}")
            for name, host in self._hosts.items()
        ]
        self._watching.append(loop.create_task(self._read(), name="reading the machine"))
        if self._read_joules is not None:
            counting = self._share_energy(self._read_joules)
            self._watching.append(loop.create_task(counting, name="sharing energy"))

    async def submit(self, request: Request) -> StreamedAnswer:
        """See `runtime.api.Runtime.submit`."""
        if request.force and not self._settings.models.allow_force:
            raise Unauthorized(
                'this server takes no forced requests; leave "force" out, or have its operator set '
                "models.allow_force",
                param="brim.force",
            )
        host = self._host(request.model)
        if self._stance.prefers_draft and request.accepts_draft:
            *_, smaller = self._residency.group_of(host.name).hosts
            if smaller is not host:
                with contextlib.suppress(InvalidRequest):  # its window may be the smaller one too
                    renamed = msgspec.structs.replace(request, model=smaller.name)
                    return await smaller.submit(renamed, instead_of=host.name)
        return await host.submit(request)

    async def worker_stats(self, model: str) -> Stats:
        """The counters of a model's worker, fresh.

        Raises:
            NotFound: No such model is served.
            Busy: It is being restarted.
            EngineError: It is quarantined, stopped, or its worker died.
        """
        return await self._host(model).worker_stats()

    async def enter(self, host: ModelHost, *, force: bool) -> None:
        """See `runtime.seat.Seat`."""
        await self._residency.enter(host, force=force)

    async def grow(self, host: ModelHost, kv_tokens: int) -> None:
        """See `runtime.seat.Seat`."""
        await self._residency.grow(host, kv_tokens)

    def short_of_growth(self, name: str, num_kv_tokens: int) -> int:
        """See `runtime.seat.Seat`."""
        return self._granter.short_of_growth(name, num_kv_tokens)

    async def drain(self, limit_s: float) -> None:
        """Refuse new requests and let running answers finish; the limit ends the rest in error."""
        self._is_draining = True
        for host in self._hosts.values():
            host.refuse_new()
        self._residency.refuse_waiting(shutting_down())
        await asyncio.gather(*(host.drain(limit_s) for host in self._hosts.values()))

    async def stop(self) -> None:
        """End answers and workers and give the grants back; safe more than once."""
        self._is_draining = True
        for watching in self._watching:
            watching.cancel()
        await asyncio.gather(*self._watching, return_exceptions=True)
        self._watching.clear()
        await self._residency.stop()
        await asyncio.gather(*(host.stop() for host in self._hosts.values()))
        await self._residency.elastic.stop()
        for name in self._hosts:
            self._account.release(name)
        self._residency.grants.clear()
        await self._granter.close()

    def _status(self, host: ModelHost, entry: EntryLine | None) -> ModelStatus:
        """What the host says of itself, and its place in memory."""
        group, leaves_in_s, stays = self._residency.group_of(host.name), None, ""
        if group.phase is Phase.PRESENT and not host.is_quarantined:
            limit_s = self.actuator.idle_unload_s(host.name)
            if pin := self._residency.pin_of(host.name):
                stays = f"pinned by {pin}"
            elif limit_s is None:
                stays = "idle models are not unloaded"
            elif not group.is_idle:
                stays = "in use"
            else:
                leaves_in_s = max(0.0, limit_s - group.idle_s)
        pair = None
        if len(group.hosts) == 2:
            target, draft = group.hosts
            pair = (target.name, draft.name)
        return msgspec.structs.replace(
            host.status(),
            entry=entry,
            leaves_in_s=leaves_in_s,
            stays=stays,
            pair=pair,
            num_waiting_load=self._residency.num_waiting(host.name),
        )

    def _is_simulated(self) -> bool:
        machine = self._granter.machine
        return machine is not None and machine.is_simulated

    def _note_idle(self) -> None:
        self._residency.note_change()

    async def _share_energy(self, read_joules: Callable[[], float | None]) -> None:
        """Tell the meter whose energy it was, once a second."""
        before_j = await _joules(read_joules) or 0.0
        while True:
            await asyncio.sleep(ENERGY_PERIOD_S)
            now_j = await _joules(read_joules)
            if now_j is not None:
                is_working = any(not host.is_idle for host in self._hosts.values())
                self._metering.note_joules(now_j - before_j, is_working=is_working)
                before_j = now_j

    def _host(self, model: str) -> ModelHost:
        host = self._hosts.get(model)
        if host is None:
            served = ", ".join(f"'{name}'" for name in self._hosts)
            raise NotFound(f"no model '{model}' is served; served: {served}", param="model")
        return host

    async def _measure(self, name: str, host: ModelHost) -> None:
        """Keep the account true: what a worker is seen to hold counts where it is more.

        A worker that hangs is found here as well, whether or not anyone waits for its answers.
        """
        while True:
            try:
                await host.measure()
                if host.resident_bytes is not None and name in self._account:
                    self._account.reconcile(name, host.resident_bytes)
            except Exception as exc:  # whatever it was, a worker that hangs must still be found
                log_event("model_unmeasured", model=name, reason=repr(exc))
            await asyncio.sleep(MEASURE_PERIOD_S)

    async def _read(self) -> None:
        """Keep the reading that requests are admitted by fresh."""
        while True:
            await asyncio.sleep(READ_PERIOD_S)
            try:
                await self._granter.refresh()
            except Exception as exc:  # a reading that fails must not be the last one
                log_event("machine_unread", reason=repr(exc))
            else:
                for host in self._hosts.values():
                    host.end_waiting_where_short()


async def _joules(read: Callable[[], float | None]) -> float | None:
    """What a meter says; None as well where it cannot be read this time."""
    try:
        return await asyncio.to_thread(read)
    except Exception as exc:
        log_event("energy_unread", reason=repr(exc))
        return None
