"""Groups of models in and out of memory: granted, loaded and unloaded as one, and recorded.

Who comes and who goes is `residency`'s to decide.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable

from brim.core.event import EventKind
from brim.core.plan import Grant, Plan
from brim.core.units import gib
from brim.errors import Busy
from brim.ledger.account import Account
from brim.runtime.granter import Granter
from brim.runtime.groups import Group, Phase
from brim.runtime.model_host import ModelHost
from brim.runtime.recorder import Recorder
from brim.runtime.seat import Unloaded


class Moves:
    """Loads and unloads the models of one gateway.

    Args:
        account: Where grants stand.
        granter: The way to it.
        record: Where loads and unloads are recorded.
        on_change: Called when a group has left.
        force: Load even what does not fit.
        say: Told what a person should know.
    """

    def __init__(
        self,
        account: Account,
        granter: Granter,
        *,
        record: Recorder,
        on_change: Callable[[], None],
        force: bool,
        say: Callable[[str], None],
    ) -> None:
        self._account = account
        self._granter = granter
        self._record = record
        self._on_change = on_change
        self._force = force
        self._say = say
        self._loading: asyncio.Task[None] | None = None
        self._leaving: set[asyncio.Task[dict[str, Unloaded]]] = set()
        self.grants: dict[str, Grant] = {}

    async def grant(self, group: Group, *, force: bool = False) -> None:
        """Enter all models of a group into the account, or none."""
        granted = list[str]()
        try:
            for host in group.hosts:
                plan, grant, pool = await self._granter.grant(host.wish, force=force or self._force)
                granted.append(host.name)
                if plan is not host.wish and plan != host.wish:
                    self._say(_changed(host.wish, plan))
                host.take(plan, pool)
                self.grants[host.name] = grant
        except BaseException:
            for name in granted:
                await self._release(name)
            raise

    async def load(self, group: Group, cause: str) -> bool:
        """Load a granted group and let those in who wait; the grants go back where that fails.

        Returns:
            False where `cancel_load` has ended it.

        Raises:
            BrimError: One of its models could not be loaded.
        """
        group.phase = Phase.LOADING
        self._loading = loading = asyncio.get_running_loop().create_task(
            self._load_all(group, cause), name=f"loading {group.name}"
        )
        try:
            await asyncio.wait([loading])
        finally:
            self._loading = None
            if not loading.done():
                loading.cancel()
                await asyncio.wait([loading])
            # Not in the task, which may be cancelled before it has begun.
            if loading.cancelled() or loading.exception() is not None:
                await self.undo(group)
        if loading.cancelled():
            return False
        loading.result()
        group.present_since_s = time.monotonic()
        group.admit_all()
        return True

    async def undo(self, group: Group) -> None:
        """Leave nothing of a grant, or of a load that failed or was cut short."""
        for host in group.hosts:
            if host.is_loaded:
                await host.unload("its partner could not be loaded")
            await self._release(host.name)
        group.phase = Phase.ABSENT

    def cancel_load(self) -> None:
        """End the load that is under way; nothing where there is none."""
        if self._loading is not None:
            self._loading.cancel()

    async def evict(self, group: Group, cause: str) -> None:
        """Take a group out of memory, and record why; nothing where it is not idle any more."""
        if group.phase is not Phase.PRESENT or not group.is_idle:
            return
        parts = await self.take_out(group, f"{cause}; its next request loads it again")
        for name, part in parts.items():
            self._record(
                EventKind.MODEL_UNLOADED,
                model=name,
                cause=cause,
                before_bytes=part.before_bytes,
                after_bytes=part.after_bytes,
                took_s=part.took_s,
            )

    async def take_out(self, group: Group, reason: str) -> dict[str, Unloaded]:
        """End the processes of an idle group; then its bytes are anybody's.

        Goes on where whoever called it does not.
        """
        group.phase = Phase.LEAVING
        # Now, while they are held: a stance that lets them run must not find them in what leaves.
        for host in group.hosts:
            host.drop_held()
        leaving = asyncio.get_running_loop().create_task(
            self._take_out(group, reason), name=f"unloading {group.name}"
        )
        self._leaving.add(leaving)
        leaving.add_done_callback(self._leaving.discard)
        return await asyncio.shield(leaving)

    async def stop(self) -> None:
        """Let no load and no unload go on; safe more than once."""
        self.cancel_load()
        if self._loading is not None:
            await asyncio.wait([self._loading])
        if self._leaving:
            await asyncio.wait(tuple(self._leaving))

    async def _load_all(self, group: Group, cause: str) -> None:
        for host in group.hosts:
            await self._load_one(host, cause)

    async def _load_one(self, host: ModelHost, cause: str) -> None:
        machine = self._granter.machine
        assert machine is not None, "a grant needs a reading"
        began_s = time.monotonic()
        self._record(EventKind.MODEL_LOADING, model=host.name, cause=cause, before_bytes=0)
        # After every grant of a start: caches get what models leave.
        inflight_bytes = await self._granter.reserve_writes(host.name, host.wanted_inflight_bytes)
        self._account.begin_load(host.name)
        await host.load(machine, max_inflight_bytes=inflight_bytes)
        self._account.end_load(host.name)
        self._record(
            EventKind.MODEL_LOADED,
            model=host.name,
            cause=cause,
            before_bytes=0,
            after_bytes=await host.measure_resident(),
            took_s=time.monotonic() - began_s,
        )

    async def _take_out(self, group: Group, reason: str) -> dict[str, Unloaded]:
        parts: dict[str, Unloaded] = {}
        try:
            for host in group.hosts:
                parts[host.name] = await host.unload(reason)
                await self._release(host.name)
        finally:
            group.phase, group.is_closed = Phase.ABSENT, False
            self._on_change()
        return parts

    async def _release(self, name: str) -> None:
        self.grants.pop(name, None)
        with contextlib.suppress(Busy):  # the account is right; the book follows at the next grant
            await self._granter.release(name)


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
