"""What gives way so that a model has room, cheapest first, and why nothing does.

Pools of other models first, then idle models, then those that work.  Pinned ones stay.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence

from brim.config.tree import ModelSettings
from brim.core.event import EventKind
from brim.core.plan import Verdict
from brim.errors import BrimError, Busy, DoesNotFit
from brim.ledger.account import Account
from brim.runtime.elastic_kv import ElasticKv
from brim.runtime.granter import Granter
from brim.runtime.groups import Group, Phase
from brim.runtime.model_host import ModelHost
from brim.runtime.recorder import Recorder

OTHERS_RETRY_AFTER_S = 30.0
"""When to ask again for a model that waits for other programs: people close those."""

KEPT_PART = 4
"""One part in this many of an idle model's pool stays when another model needs room: enough for
usual requests, which would otherwise have it grow again at once."""


class Room:
    """Looks for room for a model where others are.

    Args:
        groups: The models.
        account: Where grants stand.
        granter: The way to it.
        elastic: Resizes pools.
        settings: Pins.
        pinned_by_apps: Models that apps want kept.
        record: Where pools that were made smaller are recorded.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        account: Account,
        granter: Granter,
        elastic: ElasticKv,
        *,
        settings: ModelSettings,
        pinned_by_apps: Callable[[], Collection[str]],
        record: Recorder,
    ) -> None:
        self._groups = groups
        self._account = account
        self._granter = granter
        self._elastic = elastic
        self._settings = settings
        self._pinned_by_apps = pinned_by_apps
        self._record = record

    def present(self) -> list[Group]:
        """Those that are in memory, whether or not they take requests."""
        return [each for each in self._groups if each.phase is Phase.PRESENT]

    def idle(self) -> list[Group]:
        """Those that may leave at once, least recently used first."""
        pinned = self.pinned()
        idle = [each for each in self.present() if each.is_idle and each not in pinned]
        return sorted(idle, key=lambda each: each.last_used_s)

    def pinned(self) -> list[Group]:
        """Those in memory that are to stay there."""
        return [each for each in self.present() if self.is_pinned(each)]

    def is_pinned(self, group: Group) -> bool:
        """Whether somebody wants it kept."""
        return bool(self.pin_of(group))

    def granted_names(self) -> set[str]:
        """All models in the account, loaded or not."""
        return {entry.name for entry in self._account.entries()}

    async def fits(
        self,
        group: Group,
        *,
        without: Collection[str] = (),
        kv_bytes: Mapping[str, int] | None = None,
        others_bytes: int | None = None,
    ) -> bool:
        """Whether a group would be granted under these conditions; see `Granter.trial`."""
        grant = await self._granter.trial(
            *(host.wish for host in group.hosts),
            without=without,
            kv_bytes=kv_bytes,
            others_bytes=others_bytes,
        )
        return grant.verdict is not Verdict.NO

    async def shrink_for(self, group: Group) -> bool:
        """Have pools of other models make room, least recently used first, where that is enough.

        An idle model keeps a part of its pool, one that works its window.
        """
        chosen: list[tuple[ModelHost, int]] = []
        kv_bytes: dict[str, int] = {}
        for other in sorted(self.present(), key=lambda each: each.last_used_s):
            for host in other.hosts:
                plan = host.plan
                floor = plan.kv_tokens // KEPT_PART if other.is_idle else plan.context_tokens
                size = self._elastic.smallest(host, floor)
                if not host.can_resize or size >= host.owed.pool.kv_tokens:
                    continue
                # It may have left since the list was made: what fits is looked up in between.
                if not plan.memory.kv_bytes or host.name not in self._account:
                    continue
                chosen.append((host, floor))
                kv_bytes[host.name] = self._elastic.bytes_at(host, size)
                if await self.fits(group, kv_bytes=kv_bytes):
                    return await self._shrink(chosen, group)
        return False

    async def victims(self, group: Group) -> list[Group] | None:
        """As few as make room: idle ones first, then those that have been in memory longest.

        None where all that may leave would not.
        """
        pinned = self.pinned()
        working = [each for each in self.present() if not each.is_idle]
        working.sort(key=lambda each: each.present_since_s)
        candidates = [
            each for each in (*self.idle(), *working) if each not in pinned and each is not group
        ]
        for num in range(1, len(candidates) + 1):
            victims = candidates[:num]
            if await self.fits(group, without=names_of(victims)):
                # One that the last ones make unnecessary stays.
                return await self._without_surplus(group, victims)
        return None

    async def no_room(self, group: Group, error: DoesNotFit) -> BrimError:
        """Why a group has no room although everybody gave way who may."""
        names = self.granted_names()
        pinned = self.pinned()
        if pinned and await self.fits(group, without=names):
            kept = ", ".join(f"{each.name} (by {self.pin_of(each)})" for each in pinned)
            return DoesNotFit(
                f"model '{group.name}' has no room beside what is to stay in memory: {kept}; "
                f"{error.message}"
            )
        if await self.fits(group, without=names, others_bytes=0):
            return Busy(
                f"other programs hold the memory that model '{group.name}' needs: {error.message}",
                retry_after_s=OTHERS_RETRY_AFTER_S,
            )
        return error

    async def _without_surplus(self, group: Group, victims: list[Group]) -> list[Group]:
        for victim in victims[:-1]:
            fewer = [each for each in victims if each is not victim]
            if await self.fits(group, without=names_of(fewer)):
                victims = fewer
        return victims

    async def _shrink(self, chosen: Sequence[tuple[ModelHost, int]], group: Group) -> bool:
        has_shrunk = False
        for host, floor in chosen:
            tokens, before = host.owed.pool.kv_tokens, await host.measure_resident()
            began_s = time.monotonic()
            num_dropped = await self._elastic.shrink(host, floor)
            if host.owed.pool.kv_tokens < tokens:
                has_shrunk = True
                self._record(
                    EventKind.KV_SHRUNK,
                    model=host.name,
                    cause=f"{group.name} needs room",
                    before_bytes=before,
                    after_bytes=await host.measure_resident(),
                    took_s=time.monotonic() - began_s,
                    detail={
                        "pool_tokens_before": tokens,
                        "pool_tokens_after": host.owed.pool.kv_tokens,
                        "dropped_tokens": num_dropped,
                    },
                )
        return has_shrunk

    def pin_of(self, group: Group) -> str:
        """Who wants one of its models kept, in words; empty for nobody.

        In quarantine nothing of it is left to be kept but its bytes in the account.
        """
        names = group.names
        if all(host.is_quarantined for host in group.hosts):
            return ""
        if not names.isdisjoint(self._settings.keep_loaded):
            return "models.keep_loaded"
        return "an app" if not names.isdisjoint(self._pinned_by_apps()) else ""


def names_of(groups: Collection[Group]) -> set[str]:
    """Of all their models, as the account knows them."""
    return {name for group in groups for name in group.names}
