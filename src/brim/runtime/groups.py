"""Models that come and go together: one alone, or a target with its draft; and who waits for them.

State alone: `residency` decides.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from brim.config.tree import ModelSettings
from brim.errors import BrimError, ConfigError
from brim.runtime.model_host import ModelHost


class Phase(StrEnum):
    """Where a group stands."""

    ABSENT = "absent"
    LOADING = "loading"
    PRESENT = "present"
    LEAVING = "leaving"
    """Its processes are ending; its bytes are still its own."""


@dataclass(eq=False)
class Waiter:
    """A request that waits for its model to be in memory and to take requests."""

    host: ModelHost
    is_forced: bool
    future: "asyncio.Future[None]"
    arrived_s: float = field(default_factory=time.monotonic)
    is_granted: bool = False
    """Whether it counts as in flight already."""


class Group:
    """One or two models.

    Args:
        hosts: The models, a target before its draft.
    """

    def __init__(self, hosts: Sequence[ModelHost]) -> None:
        self.hosts = tuple(hosts)
        self.phase = Phase.ABSENT
        self.is_closed = False
        """Whether new requests wait, so that others get a turn."""
        self.present_since_s = 0.0
        self.waiters: list[Waiter] = []

    @property
    def name(self) -> str:
        """For people."""
        return " with ".join(host.name for host in self.hosts)

    @property
    def names(self) -> set[str]:
        """Of its models, as the account knows them."""
        return {host.name for host in self.hosts}

    @property
    def is_open(self) -> bool:
        """Whether a request goes straight in."""
        return self.phase is Phase.PRESENT and not self.is_closed

    @property
    def is_idle(self) -> bool:
        """Whether nothing is in flight."""
        return all(host.is_idle for host in self.hosts)

    @property
    def idle_s(self) -> float:
        """Since the last request of any of them ended; 0 while one is in flight."""
        return min(host.idle_s for host in self.hosts)

    @property
    def last_used_s(self) -> float:
        """When a request of any of them last came or ended, by the monotonic clock."""
        return max(host.last_used_s for host in self.hosts)

    @property
    def is_forced(self) -> bool:
        """Whether somebody who waits wants it loaded whether or not it fits."""
        return any(waiter.is_forced for waiter in self.waiters)

    @property
    def waiting_since_s(self) -> float:
        """When the first of those who wait came."""
        return min(waiter.arrived_s for waiter in self.waiters)

    def admit_all(self) -> None:
        """It is in memory and open: everybody who waits is in flight from now on.

        At once, and not when they wake up: until then nothing else may take its place.
        """
        self.phase, self.is_closed = Phase.PRESENT, False
        for waiter in self.waiters:
            if not waiter.future.done():
                waiter.is_granted = True
                waiter.host.enter()
                waiter.future.set_result(None)
        self.waiters.clear()

    def refuse_all(self, error: BrimError) -> None:
        """Everybody who waits is told that."""
        for waiter in self.waiters:
            if not waiter.future.done():
                waiter.future.set_exception(error)
                waiter.future.exception()  # its request may be gone: nobody need be told
        self.waiters.clear()


def groups_of(hosts: Mapping[str, ModelHost], settings: ModelSettings) -> list[Group]:
    """The models of one gateway, those of pairs together, in the order in which they were given.

    A pair of which a model is not served is no pair here.

    Raises:
        ConfigError: A model has two partners, or is its own.
    """
    partners: dict[str, tuple[str, str]] = {}
    for pair in settings.pairs:
        target, draft = pair.split("+")
        for name in (target, draft):
            if name in partners or target == draft:
                raise ConfigError(
                    f"models.pairs has '{pair}', and '{name}' is in a pair already; a model has "
                    "one partner, and that is another model",
                    param="models.pairs",
                )
        if not {target, draft} <= {*hosts}:
            continue
        partners[target] = partners[draft] = (target, draft)
    groups, seen = [], set[str]()
    for name in hosts:
        if name not in seen:
            members = partners.get(name, (name,))
            groups.append(Group([hosts[member] for member in members]))
            seen |= {*members}
    return groups
