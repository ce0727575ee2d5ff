"""A KV pool that shrinks and grows under running answers: they are what they would have been."""

import asyncio
import itertools

import pytest
from conftest import require_engine
from support.crowd import PROMPTS, Served, one_of_a_crowd
from support.models import DEMO, plan_for
from support.serving import serving, toy_plan

from brim.core.plan import Plan
from brim.runtime.gateway import Gateway

pytestmark = pytest.mark.anyio

NUM_CLIENTS = 3
NUM_CHANGES = 8


@pytest.fixture(params=["toy", "llamacpp"])
def plan(request: pytest.FixtureRequest) -> Plan:
    """A pool of 16K cells, far more than three clients need."""
    require_engine(request.param)
    if request.param == "toy":
        return toy_plan(context_tokens=2048, kv_tokens=16384)
    return plan_for("llamacpp", path=DEMO, context_tokens=2048, kv_tokens=16384)


async def keep_asking(
    gateway: Gateway, name: str, prompts: "itertools.cycle[str]", done: asyncio.Event
) -> list[Served]:
    """One answer after the other until the pool has changed for the last time."""
    found = []
    while not done.is_set():
        found.append(await one_of_a_crowd(gateway, name, next(prompts)))
    return found


async def test_answers_are_the_same_while_the_pool_shrinks_and_grows(plan: Plan) -> None:
    """Eight changes under three streams of greedy requests: every answer is whole and right."""
    name = plan.model.name
    async with serving(plan) as gateway:
        alone = {prompt: await one_of_a_crowd(gateway, name, prompt) for prompt in PROMPTS}
        done, prompts = asyncio.Event(), itertools.cycle(PROMPTS)
        asking = [
            asyncio.create_task(keep_asking(gateway, name, prompts, done))
            for _ in range(NUM_CLIENTS)
        ]
        pools = []
        for _ in range(NUM_CHANGES // 2):
            await asyncio.sleep(0)
            await gateway.actuator.drop_idle_kv(name)
            pools.append(gateway.actuator.models()[0].kv_pool_tokens)
            await gateway.actuator.grow_kv(name)
            pools.append(gateway.actuator.models()[0].kv_pool_tokens)
        done.set()
        served = [each for found in await asyncio.gather(*asking) for each in found]
    assert max(pools[::2]) <= plan.kv_tokens // 4, "the pool did not shrink"
    assert pools[1::2] == [plan.kv_tokens] * (NUM_CHANGES // 2)
    assert len(served) >= NUM_CLIENTS
    wrong = [each for each in served if each.error or each.text != alone[each.prompt].text]
    assert wrong == []
