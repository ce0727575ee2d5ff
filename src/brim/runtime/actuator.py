"""The governor's hands: does to the models of one gateway what it decides.

Implements `governor.loop.Actuator`.  Nothing is recorded here: whoever decided does that.
"""

import contextlib
from collections.abc import Callable

import msgspec

from brim.config.tree import GovernorSettings
from brim.core.stance import Stance
from brim.errors import BrimError
from brim.governor.readings import ModelReading
from brim.runtime.groups import Phase
from brim.runtime.model_host import ModelHost
from brim.runtime.residency import Residency


class Actuator:
    """The governor's hands.

    Args:
        residency: Who is in memory.
        settings: When idle models leave.
        set_stance: Has the gateway follow a stance.
    """

    def __init__(
        self,
        residency: Residency,
        settings: GovernorSettings,
        set_stance: Callable[[Stance], None],
    ) -> None:
        self._residency = residency
        self._settings = settings
        self._set_stance = set_stance

    def models(self) -> tuple[ModelReading, ...]:
        """All known models; those of a pair are in flight, idle and pinned as one."""
        return tuple(
            self._reading(host.name, host.reading())
            for group in self._residency.groups
            for host in group.hosts
        )

    async def set_stance(self, stance: Stance) -> None:
        """Have admission, loads and workers follow a stance."""
        self._set_stance(stance)

    async def drop_idle_kv(self, model: str) -> int:
        """Make a model's pool as small as what runs; tokens of idle sequences that went."""
        group = self._residency.group_of(model)
        if group.phase is not Phase.PRESENT:
            return 0
        return await self._residency.elastic.shrink(self._host(model))

    async def grow_kv(self, model: str) -> None:
        """Give a model's pool the size of its plan again, where there is room."""
        host = self._host(model)
        if self._residency.group_of(model).phase is Phase.PRESENT:
            with contextlib.suppress(BrimError):  # a worker that died, or a book that is locked
                await self._residency.elastic.grow(host, host.plan.kv_tokens)

    async def unload(self, model: str, cause: str) -> bool:
        """Take a model, with its partner, out of memory; False: something is in flight by now."""
        return await self._residency.unload(model, cause)

    async def measure(self, model: str) -> int:
        """Bytes that a model's process holds now; 0 where there is none."""
        return await self._host(model).measure_resident()

    def idle_unload_s(self, model: str) -> float | None:
        """Idle time after which a model leaves; None: never for that."""
        is_off = not self._settings.enabled or not self._settings.idle_unload_s
        return None if is_off or self._residency.pin_of(model) else self._settings.idle_unload_s

    def _reading(self, name: str, reading: ModelReading) -> ModelReading:
        group = self._residency.group_of(name)
        return msgspec.structs.replace(
            reading,
            # One that is leaving is nothing to act upon any more.
            is_loaded=reading.is_loaded and group.phase is Phase.PRESENT,
            is_loading=reading.is_loading or group.phase is Phase.LOADING,
            kv_needed_tokens=self._needed_tokens(name),
            num_in_flight=sum(host.num_in_flight for host in group.hosts),
            num_waiting=self._residency.num_waiting(name),
            idle_s=group.idle_s,
            is_pinned=bool(self._residency.pin_of(name)),
            idle_unload_s=self.idle_unload_s(name),
        )

    def _needed_tokens(self, name: str) -> int:
        """The smallest pool that a model in memory can have now."""
        host = self._host(name)
        return self._residency.elastic.smallest(host) if host.is_loaded else 0

    def _host(self, name: str) -> ModelHost:
        return next(host for host in self._residency.group_of(name).hosts if host.name == name)
