"""Models that claim to be large, on a machine on which two of them have room.

Workers are real; only the machine's size and what the models are said to need are made up.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from brim.config.tree import CacheSettings, ModelSettings, Settings
from brim.core.machine import MachineSpec
from brim.core.memory import MemoryTerms
from brim.core.plan import Grant, Plan
from brim.ledger.account import Account
from brim.ledger.budget import budget_of
from brim.runtime.gateway import Gateway
from support.serving import ENDLESS, MACHINE, toy_plan

GB = 10**9


class CountingAccount(Account):
    """Checks after every grant that the budget holds, and counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.num_grants: dict[str, int] = {}

    def grant(self, name: str, wanted: Any, machine: MachineSpec, **options: Any) -> Grant:
        grant = super().grant(name, wanted, machine, **options)
        self.num_grants[name] = self.num_grants.get(name, 0) + 1
        if not options.get("force"):
            assert self.charged_bytes <= budget_of(machine).tight.num_bytes
        return grant


class Readings:
    """The machine as a test wants it read."""

    def __init__(self, others_bytes: int = 3 * GB) -> None:
        self.others_bytes = others_bytes

    def __call__(self) -> MachineSpec:
        return msgspec.structs.replace(MACHINE, others_bytes=self.others_bytes)


def heavy(name: str, weights_bytes: int = 5 * GB, kv_bytes: int = 0, **overrides: Any) -> Plan:
    """A toy model that claims to be large: two of 5 GB fit the test machine, three do not."""
    memory = MemoryTerms(
        weights_bytes=weights_bytes, kv_bytes=kv_bytes, compute_bytes=0, overhead_bytes=0
    )
    return msgspec.structs.replace(toy_plan(name, **overrides), memory=memory)


def without_cache(**models: Any) -> Settings:
    """Nothing kept on disk, for which memory would be set aside beside what models claim."""
    return Settings(models=ModelSettings(**models), cache=CacheSettings(enabled=False))


def patience(load_wait_s: float) -> Settings:
    """No longer waits for a model than that."""
    return without_cache(load_wait_s=load_wait_s)


LONG = 8000
"""Tokens of an answer that takes a second, and is awaited."""


def roomy(name: str, weights_bytes: int = 5 * GB) -> Plan:
    """A large model with a window for endless answers."""
    return heavy(name, weights_bytes, context_tokens=2 * ENDLESS, kv_tokens=2 * ENDLESS)


@asynccontextmanager
async def heavy_serving(
    *plans: Plan, **options: Any
) -> AsyncIterator[tuple[Gateway, CountingAccount]]:
    account = CountingAccount()
    wait_s = options.pop("wait_s", 0.0)
    options = {"settings": without_cache(), "read_machine": Readings(), **options}
    gateway = Gateway(plans, account=account, **options)
    try:
        await gateway.start(wait_s=wait_s)
        yield gateway, account
    finally:
        await gateway.stop()
    assert account.entries() == []
