"""Any order of requests, departures, pressure and unloads: all are served, and nothing is cut off.

Models are without processes, so that thousands of turns take seconds.
"""

import asyncio
import time
from collections.abc import Callable
from typing import cast
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st
from support.heavy import GB, CountingAccount, Readings, heavy

from brim.config.tree import ModelSettings
from brim.core.machine import MachineSpec
from brim.core.plan import Plan
from brim.core.stance import Stance
from brim.errors import Busy, ModelFileError
from brim.ledger.history import ForecastHistory
from brim.ledger.kv import KvAccount
from brim.runtime import residency as residency_module
from brim.runtime.granter import Granter
from brim.runtime.groups import Phase
from brim.runtime.model_host import ModelHost
from brim.runtime.recorder import Recorder
from brim.runtime.residency import Residency
from brim.runtime.seat import Unloaded
from brim.telemetry.event_log import EventLog

NAMES = ("a", "b", "c", "d", "broken")
PINNED = "a"


class Pool:
    """What residency wants to know of a model's answers."""

    def __init__(self, plan: Plan) -> None:
        self.pool = KvAccount(plan.kv_tokens)


class Host:
    """A model that is loaded and unloaded at once, and fails where it would be cut off."""

    can_resize = False
    is_quarantined = False
    wanted_inflight_bytes = 0
    needed_tokens = 0

    def __init__(self, name: str, on_idle: Callable[[], None]) -> None:
        self.name = name
        self.wish = self.plan = heavy(name, 4 * GB)
        self.owed = Pool(self.plan)
        self.is_loaded = False
        self.num_in_flight = 0
        self.num_loads = 0
        self.last_used_s = 0.0
        self._on_idle = on_idle

    @property
    def is_idle(self) -> bool:
        return self.num_in_flight == 0

    @property
    def idle_s(self) -> float:
        return time.monotonic() - self.last_used_s

    def check_loadable(self) -> None:
        pass

    def defer(self, reason: str) -> None:
        pass

    def take(self, plan: Plan, pool: KvAccount) -> None:
        assert not self.is_loaded

    def enter(self) -> None:
        assert self.is_loaded, "a request was let in to a model that is out of memory"
        self.num_in_flight += 1
        self.last_used_s = time.monotonic()

    def leave(self) -> None:
        self.num_in_flight -= 1
        assert self.num_in_flight >= 0, "a request left twice"
        if self.is_idle:
            self._on_idle()

    async def load(self, machine: MachineSpec, *, max_inflight_bytes: int) -> None:
        await asyncio.sleep(0)
        if self.name == "broken":
            raise ModelFileError("the file is damaged")
        self.is_loaded = True
        self.num_loads += 1

    def drop_held(self) -> None:
        pass

    async def unload(self, reason: str) -> Unloaded:
        assert self.is_loaded
        assert self.is_idle, "a model was unloaded that works"
        self.is_loaded = False
        await asyncio.sleep(0)
        return Unloaded(before_bytes=1, after_bytes=0, took_s=0.0)

    async def measure_resident(self) -> int:
        return int(self.is_loaded)


class World:
    """A gateway's residency with five models of which two have room, one of them pinned."""

    def __init__(self) -> None:
        self.history = ForecastHistory(None)
        self.account = CountingAccount()
        self.granter = Granter(
            self.account, read_machine=Readings(6 * GB), book=None, history=self.history, fit=None
        )
        self.hosts = {name: Host(name, self._note_change) for name in NAMES}
        self.residency = Residency(
            cast("dict[str, ModelHost]", self.hosts),
            self.account,
            self.granter,
            settings=ModelSettings(keep_loaded=(PINNED,)),
            record=Recorder(EventLog()),
            pinned_by_apps=tuple,
            force=False,
            say=lambda text: None,
        )
        self.was_refusing = False
        self.clients: list[asyncio.Task[str]] = []

    def _note_change(self) -> None:
        self.residency.note_change()

    async def ask(self, name: str, num_turns: int) -> str:
        host = self.hosts[name]
        try:
            await self.residency.enter(cast("ModelHost", host), force=False)
        except Busy:
            return "refused"
        except ModelFileError:
            assert name == "broken"
            return "served"  # as well as it can be
        try:
            for _ in range(num_turns):
                await asyncio.sleep(0)
                assert host.is_loaded, "its model was taken away from it"
        finally:
            host.leave()
        return "served"

    async def do(self, kind: str, number: int, num_turns: int) -> None:
        name = NAMES[number % len(NAMES)]
        if kind == "ask":
            self.clients.append(asyncio.ensure_future(self.ask(name, num_turns)))
        elif kind == "cancel" and self.clients:
            self.clients[number % len(self.clients)].cancel()
        elif kind == "unload":
            await self.residency.unload(name, "the governor's")
        elif kind == "stance":
            admits = number % 3 != 0
            self.was_refusing |= not admits
            self.residency.set_stance(Stance(admits=admits, loads=number % 3 == 1))
        await asyncio.sleep(0)


async def play(steps: list[tuple[str, int, int]]) -> None:
    world = World()
    try:
        await world.residency.start(0.0)
        for step in steps:
            await world.do(*step)
        world.residency.set_stance(Stance())
        async with asyncio.timeout(20.0):
            found = await asyncio.gather(*world.clients, return_exceptions=True)
        for each in found:
            assert each == "served" or isinstance(each, asyncio.CancelledError) or (
                each == "refused" and world.was_refusing
            ), each  # fmt: skip
        assert all(host.is_idle for host in world.hosts.values())
        await world.residency.stop()  # what is on its way in or out comes to its end
        for group in world.residency.groups:
            assert group.waiters == []
            # A load that came to its end with the server is nobody's any more.
            assert group.hosts[0].is_loaded or group.phase is Phase.ABSENT
        loaded = {host.name for host in world.hosts.values() if host.is_loaded}
        assert {entry.name for entry in world.account.entries()} == loaded
    finally:
        await world.residency.stop()
        await world.granter.close()


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["ask"] * 6 + ["cancel", "cancel", "unload", "stance"]),
        st.integers(0, 20),
        st.integers(0, 6),
    ),
    max_size=60,
)


@settings(max_examples=40, deadline=None)
@given(STEPS)
def test_everybody_is_served_and_nobodys_model_is_taken_away(
    steps: list[tuple[str, int, int]],
) -> None:
    """But for those that leave, and those that come while nothing is admitted."""
    with mock.patch.object(residency_module, "MIN_TURN_S", 0.0):
        asyncio.run(play(steps))


def test_a_pinned_model_is_loaded_once_whatever_is_asked_for() -> None:
    """Requests of all models, twenty rounds of them."""

    async def rounds() -> dict[str, int]:
        world = World()
        try:
            await world.residency.start(0.0)
            for _ in range(20):
                asked = [world.ask(name, 2) for name in NAMES[:-1]]
                assert await asyncio.gather(*asked) == ["served"] * len(asked)
            return {name: host.num_loads for name, host in world.hosts.items()}
        finally:
            await world.residency.stop()
            await world.granter.close()

    with mock.patch.object(residency_module, "MIN_TURN_S", 0.0):
        loads = asyncio.run(rounds())
    assert loads[PINNED] == 1
    assert min(loads[name] for name in "bcd") > 1
