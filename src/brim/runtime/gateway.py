"""Puts the gateway together: one ledger account, one host for each model, one way in.

Owns the order of things at start and stop; implements `runtime.api.Runtime`.
"""

import asyncio
from collections.abc import Callable, Sequence

from brim.config.tree import Settings
from brim.core.machine import MachineSpec
from brim.core.plan import Grant, Plan
from brim.core.request import Request
from brim.errors import ConfigError, NotFound
from brim.ledger.account import Account
from brim.runtime.answer import StreamedAnswer
from brim.runtime.api import ModelStatus
from brim.runtime.model_host import ModelHost
from brim.worker.protocol import Stats

MEASURE_PERIOD_S = 5.0
"""Between two looks at what the workers hold: a person watching sees change, the system no load."""


class Gateway:
    """Serves planned models; nothing is loaded that the account has not granted.

    Use it as an async context manager, or call `start` and `stop`.

    Args:
        plans: The models, in the order in which they are listed; names must differ.
        settings: The settings.
        account: The machine's account; what the gateway is granted it gives back at `stop`.
        read_machine: A fresh reading of the machine; called outside the event loop.
        force: Load even what does not fit.

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
        force: bool = False,
    ) -> None:
        self._settings = settings
        self._account = account
        self._read_machine = read_machine
        self._force = force
        self._hosts: dict[str, ModelHost] = {}
        for plan in plans:
            if plan.model.name in self._hosts:
                raise ConfigError(f"two models are named '{plan.model.name}'; rename one")
            self._hosts[plan.model.name] = ModelHost(plan, settings)
        self._granted: dict[str, Grant] = {}
        self._measuring: list[asyncio.Task[None]] = []
        self._is_draining = False

    async def __aenter__(self) -> "Gateway":
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stop()

    def grants(self) -> dict[str, Grant]:
        """What the account answered for each model."""
        return dict(self._granted)

    def models(self) -> list[ModelStatus]:
        """All served models, in the order they were given."""
        return [host.status() for host in self._hosts.values()]

    def is_draining(self) -> bool:
        """Whether new requests are refused because the server is shutting down."""
        return self._is_draining

    async def start(self) -> None:
        """Have every model granted, then load them, one after the other.

        Raises:
            DoesNotFit: The account refuses one; nothing was started.
            BrimError: One could not be loaded; the others were stopped again.
        """
        try:
            for name, host in self._hosts.items():
                machine = await asyncio.to_thread(self._read_machine)
                self._granted[name] = self._account.grant(
                    name, host.plan, machine, force=self._force
                )
            for host in self._hosts.values():
                await host.start()
        except BaseException:
            await self.stop()
            raise
        # One task a model: one that hangs must not hide from us what the others hold.
        self._measuring = [
            asyncio.get_running_loop().create_task(
                self._measure(name, host), name=f"measuring {name}"
            )
            for name, host in self._hosts.items()
        ]

    async def submit(self, request: Request) -> StreamedAnswer:
        """See `runtime.api.Runtime.submit`."""
        return await self._host(request.model).submit(request)

    async def worker_stats(self, model: str) -> Stats:
        """The counters of a model's worker, fresh.

        Raises:
            NotFound: No such model is served.
            Busy: It is being restarted.
            EngineError: It is quarantined, stopped, or its worker died.
        """
        return await self._host(model).worker_stats()

    async def drain(self, limit_s: float) -> None:
        """Refuse new requests and let running answers finish; the limit ends the rest in error."""
        self._is_draining = True
        await asyncio.gather(*(host.drain(limit_s) for host in self._hosts.values()))

    async def stop(self) -> None:
        """End answers and workers and give the grants back; safe more than once."""
        self._is_draining = True
        for measuring in self._measuring:
            measuring.cancel()
        await asyncio.gather(*self._measuring, return_exceptions=True)
        self._measuring.clear()
        await asyncio.gather(*(host.stop() for host in self._hosts.values()))
        for name in self._granted:
            self._account.release(name)
        self._granted.clear()

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
            if host.resident_bytes is not None:
                self._account.reconcile(name, host.resident_bytes)
            await asyncio.sleep(MEASURE_PERIOD_S)
