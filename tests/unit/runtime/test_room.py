"""What gives way, where others leave while it is looked for."""

from collections.abc import Mapping
from typing import Any, cast

import pytest
from support.heavy import GB, Readings, heavy

from brim.config.tree import ModelSettings
from brim.ledger.account import Account
from brim.ledger.history import ForecastHistory
from brim.ledger.kv import KvAccount
from brim.runtime.elastic_kv import ElasticKv
from brim.runtime.granter import Granter
from brim.runtime.groups import Group, Phase
from brim.runtime.recorder import Recorder
from brim.runtime.room import Room
from brim.telemetry.event_log import EventLog

pytestmark = pytest.mark.anyio


class Owed:
    """The pool of a model that owes nothing."""

    def __init__(self, kv_tokens: int) -> None:
        self.pool = KvAccount(kv_tokens)


class Host:
    """An idle model in memory, with a pool."""

    can_resize = is_idle = True
    is_quarantined = False
    needed_tokens = 0
    last_used_s = 0.0

    def __init__(self, name: str) -> None:
        self.name = name
        self.plan = self.wish = heavy(name, GB, GB, kv_tokens=8192)
        self.owed = Owed(self.plan.kv_tokens)


async def test_a_model_that_leaves_while_pools_are_looked_at_is_passed_over() -> None:
    """What it would give back is nobody's question any more, and whoever needs room is served."""
    account, machine = Account(), Readings()()
    groups = [Group([cast("Any", Host(name))]) for name in "abc"]
    for group in groups[:2]:
        account.grant(group.name, group.hosts[0].plan, machine)
        group.phase = Phase.PRESENT
    history = ForecastHistory(None)
    granter = Granter(account, read_machine=Readings(), book=None, history=history, fit=None)
    looked_at: list[Mapping[str, int] | None] = []

    class LeavingMeanwhile(Room):
        async def fits(self, group: Group, **conditions: Any) -> bool:
            looked_at.append(dict(conditions["kv_bytes"]))
            account.release("b")
            return False

    room = LeavingMeanwhile(
        groups,
        account,
        granter,
        ElasticKv(account, granter),
        settings=ModelSettings(),
        pinned_by_apps=tuple,
        record=Recorder(EventLog()),
    )
    assert not await room.shrink_for(groups[2])
    assert [[*each] for each in looked_at if each is not None] == [["a"]]
    history.close()
