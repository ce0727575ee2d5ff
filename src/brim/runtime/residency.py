"""Which of the gateway's models are in memory: loaded at the start, evicted and loaded on demand.

Small on purpose: the least recently used idle model gives way, a model that works never does, and
every load goes through the account.  One load at a time, and one for however many ask.
"""

import asyncio
import contextlib
import functools
import time
from collections.abc import Callable, Mapping

from brim.core.plan import Grant, Plan, Verdict
from brim.errors import BrimError, Busy, CapacityError, DoesNotFit
from brim.ledger.account import Account
from brim.ledger.ways import gib
from brim.runtime.granter import Granter
from brim.runtime.model_host import ModelHost
from brim.telemetry.events import log_event

START_WAIT_S = 5.0
"""How long a request waits for the start to come to its model; the server says then that it is
being loaded."""

WAIT_POLL_S = 2.0
"""Between two looks while waiting for memory at the start: programs take longer to close."""

RETRY_AFTER_S = 5.0
"""When to ask again for a model that waits for another's answers to end: most take seconds."""

OTHERS_RETRY_AFTER_S = 30.0
"""When to ask again for a model that waits for other programs: people close those."""


class Residency:
    """Loads and evicts the models of one gateway.

    Args:
        hosts: The models by name, in the order in which they are loaded.
        account: Where grants stand.
        granter: The way to it.
        force: Load even what does not fit.
        say: Told what a person should know.
    """

    def __init__(
        self,
        hosts: Mapping[str, ModelHost],
        account: Account,
        granter: Granter,
        *,
        force: bool,
        say: Callable[[str], None],
    ) -> None:
        self._hosts = hosts
        self._account = account
        self._granter = granter
        self._force = force
        self._say = say
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._one_at_a_time = asyncio.Lock()
        self._progress = asyncio.Event()
        self._is_starting = True
        self._is_stopped = False
        self.grants: dict[str, Grant] = {}

    async def start(self, wait_s: float) -> None:
        """Have every model granted, then load them, one after the other.

        A model that has no room beside those before it, and has it alone, is left for its first
        request.

        Args:
            wait_s: How long to wait for memory that other programs hold.

        Raises:
            DoesNotFit: The account refuses one; nothing was started.
            BrimError: One could not be loaded.
        """
        deadline = time.monotonic() + wait_s
        try:
            for host in self._hosts.values():
                await self._grant_at_start(host, deadline)
            for name, host in self._hosts.items():
                if name in self._account:
                    await self._load(host)
                    self._note_progress()
        finally:
            self._is_starting = False
            self._note_progress()

    async def ensure_loaded(self, host: ModelHost, *, force: bool = False) -> None:
        """Return when the model is in memory; whoever leaves meanwhile does not stop the load.

        Args:
            host: The model.
            force: Load it even where it does not fit once idle models have given way.

        Raises:
            Busy: What holds its memory works, or belongs to other programs.
            DoesNotFit: There is no room for it.
            BrimError: It could not be loaded.
        """
        if self._is_starting:
            await self._wait_for_start(host)
        while not host.is_loaded:
            if self._is_stopped:
                raise _shutting_down()
            name = host.name
            task, is_own = self._loading.get(name), False
            if task is None:
                task, is_own = self._begin_load(host, force), True
            try:
                await asyncio.shield(task)
            except CapacityError:
                # The load of others may have been refused for want of our force.
                if is_own or not force:
                    raise
            except asyncio.CancelledError:
                current = asyncio.current_task()
                if task.cancelled() and current is not None and not current.cancelling():
                    raise _shutting_down() from None
                raise

    def _begin_load(self, host: ModelHost, force: bool) -> "asyncio.Task[None]":
        """One load for all who ask for the model while it lasts."""
        task = asyncio.get_running_loop().create_task(
            self._load_on_demand(host, force), name=f"loading {host.name}"
        )
        self._loading[host.name] = task
        task.add_done_callback(functools.partial(self._forget, host.name))
        return task

    async def stop(self) -> None:
        """End loads that are under way and begin no others; safe more than once."""
        self._is_stopped = True
        tasks = tuple(self._loading.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _grant_at_start(self, host: ModelHost, deadline: float) -> None:
        has_said = False
        while True:
            try:
                await self._grant(host)
                return
            except DoesNotFit as error:
                names = self._names()
                if names and await self._fits(host, without=names):
                    host.defer("it has no room beside the others; its first request loads it")
                    return
                left_s = deadline - time.monotonic()
                if left_s <= 0 or not await self._fits(host, without=names, others_bytes=0):
                    raise
                if not has_said:
                    self._say(f"waiting for memory, {left_s:.0f} s at most: {error.message}")
                    has_said = True
            await asyncio.sleep(min(WAIT_POLL_S, left_s))

    def _note_progress(self) -> None:
        self._progress.set()
        self._progress = asyncio.Event()

    async def _wait_for_start(self, host: ModelHost) -> None:
        """Wait a moment for the start to be over, or to have loaded this model.

        Raises:
            Busy: It takes longer.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_WAIT_S):
                while self._is_starting and not host.is_loaded:
                    await self._progress.wait()
        if self._is_starting and not host.is_loaded:
            raise Busy(
                f"model '{host.name}' is being loaded; try again in {RETRY_AFTER_S:.0f} s",
                retry_after_s=RETRY_AFTER_S,
            )

    async def _load_on_demand(self, host: ModelHost, force: bool) -> None:
        async with self._one_at_a_time:
            if host.is_loaded:
                return
            host.check_loadable()
            await self._make_room(host, force)
            await self._load(host)

    async def _make_room(self, host: ModelHost, force: bool) -> None:
        """Have a model granted, evicting idle ones, least recently used first, as far as needed.

        Where that does not make room, a load that is forced is granted all the same.

        Raises:
            Busy: It would fit in the place of models that work, or of other programs.
            DoesNotFit: It would not.
        """
        while True:
            try:
                return await self._grant(host)
            except DoesNotFit as error:
                if await self._evict_for(host):
                    continue
                if force:
                    return await self._grant(host, force=True)
                raise await self._no_room(host, error) from None

    async def _evict_for(self, host: ModelHost) -> bool:
        """Evict as few idle models as make room; False where all of them would not."""
        candidates = sorted(
            (
                each
                for name, each in self._hosts.items()
                if each.is_loaded and each.is_idle and name in self._account
            ),
            key=lambda each: each.last_used_s,
        )
        for num in range(1, len(candidates) + 1):
            victims = candidates[:num]
            if await self._fits(host, without={victim.name for victim in victims}):
                break
        else:
            return False
        for victim in victims:
            # One that was asked for while the others were put out stays.
            if victim.is_idle:
                await self._evict(victim, host)
        return True

    async def _evict(self, victim: ModelHost, host: ModelHost) -> None:
        log_event(
            "model_evicted",
            model=victim.name,
            for_model=host.name,
            resident_bytes=victim.resident_bytes,
        )
        # Its process is gone before its bytes are anybody else's.
        await victim.unload(f"it gave way to {host.name}; its next request loads it again")
        await self._release(victim.name)

    async def _no_room(self, host: ModelHost, error: DoesNotFit) -> BrimError:
        if await self._fits(host, without=self._names()):
            working = ", ".join(
                name for name, each in self._hosts.items() if each.is_loaded and not each.is_idle
            )
            return Busy(
                f"model '{host.name}' has no room while {working or 'another model'} works; "
                f"try again in {RETRY_AFTER_S:.0f} s",
                retry_after_s=RETRY_AFTER_S,
            )
        if await self._fits(host, without=self._names(), others_bytes=0):
            return Busy(
                f"other programs hold the memory that model '{host.name}' needs: {error.message}",
                retry_after_s=OTHERS_RETRY_AFTER_S,
            )
        return error

    async def _grant(self, host: ModelHost, *, force: bool = False) -> None:
        plan, grant, pool = await self._granter.grant(host.wish, force=force or self._force)
        if plan is not host.wish and plan != host.wish:
            self._say(_changed(host.wish, plan))
        host.take(plan, pool)
        self.grants[host.name] = grant

    async def _load(self, host: ModelHost) -> None:
        """Load a granted model; its grant is given back where that fails."""
        machine = self._granter.machine
        assert machine is not None, "a grant needs a reading"
        try:
            # After every grant of a start: caches get what models leave.
            inflight_bytes = await self._granter.reserve_writes(
                host.name, host.wanted_inflight_bytes
            )
            self._account.begin_load(host.name)
            await host.load(machine, max_inflight_bytes=inflight_bytes)
        except BaseException:
            await self._release(host.name)
            raise
        self._account.end_load(host.name)

    async def _release(self, name: str) -> None:
        self.grants.pop(name, None)
        with contextlib.suppress(Busy):  # the account is right; the book follows at the next grant
            await self._granter.release(name)

    async def _fits(
        self, host: ModelHost, *, without: set[str], others_bytes: int | None = None
    ) -> bool:
        grant = await self._granter.trial(host.wish, without=without, others_bytes=others_bytes)
        return grant.verdict is not Verdict.NO

    def _names(self) -> set[str]:
        return {entry.name for entry in self._account.entries()}

    def _forget(self, name: str, done: "asyncio.Task[None]") -> None:
        if self._loading.get(name) is done:
            del self._loading[name]
        if not done.cancelled():
            done.exception()  # those who waited have it; nobody need be left


def _shutting_down() -> Busy:
    return Busy("the server is shutting down; send the request again", retry_after_s=5.0)


def _changed(wish: Plan, plan: Plan) -> str:
    gets, hint = [], ""
    if plan.context_tokens != wish.context_tokens:
        gets, hint = [f"a context of {plan.context_tokens}"], "; --ctx asks for more"
    if plan.kv_type_k != wish.kv_type_k:
        gets.append(f"{plan.kv_type_k} KV")
    return (
        f"{wish.model.name}: {gib(wish.memory.total_bytes)} for a context of {wish.context_tokens} "
        f"with {wish.kv_type_k} KV is more than fits comfortably, so it gets "
        f"{' with '.join(gets) or 'load options that favour memory'}, "
        f"{gib(plan.memory.total_bytes)} in all{hint}"
    )
