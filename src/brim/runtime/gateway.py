"""Puts the gateway together: one ledger account, one host for each model, one way in.

Owns the order of things at start and stop; implements `runtime.api.Runtime`.
"""

import asyncio
from collections.abc import Callable, Sequence

import msgspec

from brim.config.tree import Settings
from brim.core.machine import MachineSpec
from brim.core.plan import Grant, Plan
from brim.core.request import Request
from brim.errors import BrimError, ConfigError, NotFound, Unauthorized
from brim.ledger.account import Account
from brim.ledger.book import Book
from brim.ledger.entry import Statement
from brim.ledger.history import ForecastHistory
from brim.runtime.answer import StreamedAnswer
from brim.runtime.api import ModelStatus
from brim.runtime.granter import Fit, Granter
from brim.runtime.model_host import ModelHost
from brim.runtime.residency import Residency
from brim.telemetry.events import log_event
from brim.worker.protocol import Stats

MEASURE_PERIOD_S = 5.0
"""Between two looks at what the workers hold: a person watching sees change, the system no load."""

READ_PERIOD_S = 15.0
"""Between two readings of the machine for admission: other programs take memory at the pace at
which people open them, and a reading walks the page tables of our workers, 30 ms for one of
1.8 GB."""


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

    Raises:
        ConfigError: Two plans have one name.
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
    ) -> None:
        self._settings = settings
        self._account = account
        history = ForecastHistory(None) if history is None else history
        self._granter = Granter(
            account, read_machine=read_machine, book=book, history=history, fit=fit
        )
        self._hosts: dict[str, ModelHost] = {}
        for plan in plans:
            if plan.model.name in self._hosts:
                raise ConfigError(f"two models are named '{plan.model.name}'; rename one")
            self._hosts[plan.model.name] = ModelHost(plan, settings, seat=self, history=history)
        self._residency = Residency(self._hosts, account, self._granter, force=force, say=say)
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
        return [
            msgspec.structs.replace(host.status(), entry=lines.get(name))
            for name, host in self._hosts.items()
        ]

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

    async def submit(self, request: Request) -> StreamedAnswer:
        """See `runtime.api.Runtime.submit`."""
        if request.force and not self._settings.models.allow_force:
            raise Unauthorized(
                'this server takes no forced requests; leave "force" out, or have its operator set '
                "models.allow_force",
                param="brim.force",
            )
        return await self._host(request.model).submit(request)

    async def worker_stats(self, model: str) -> Stats:
        """The counters of a model's worker, fresh.

        Raises:
            NotFound: No such model is served.
            Busy: It is being restarted.
            EngineError: It is quarantined, stopped, or its worker died.
        """
        return await self._host(model).worker_stats()

    async def ensure_loaded(self, host: ModelHost, *, force: bool) -> None:
        """See `runtime.model_host.Seat`."""
        await self._residency.ensure_loaded(host, force=force)

    def short_of_growth(self, name: str, num_kv_tokens: int) -> int:
        """See `runtime.model_host.Seat`."""
        return self._granter.short_of_growth(name, num_kv_tokens)

    async def drain(self, limit_s: float) -> None:
        """Refuse new requests and let running answers finish; the limit ends the rest in error."""
        self._is_draining = True
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
        for name in self._hosts:
            self._account.release(name)
        self._residency.grants.clear()
        await self._granter.close()

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
            await host.measure()
            if host.resident_bytes is not None and name in self._account:
                self._account.reconcile(name, host.resident_bytes)
            await asyncio.sleep(MEASURE_PERIOD_S)

    async def _read(self) -> None:
        """Keep the reading that requests are admitted by fresh."""
        while True:
            await asyncio.sleep(READ_PERIOD_S)
            try:
                await self._granter.refresh()
            except (BrimError, OSError) as exc:
                log_event("machine_unread", reason=exc)
            else:
                for host in self._hosts.values():
                    host.end_waiting_where_short()
