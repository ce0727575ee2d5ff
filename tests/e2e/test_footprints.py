"""What the system says that a real process holds, as its pool and its model come and go."""

import msgspec
import pytest
from conftest import require_engine
from support.models import DEMO, plan_for
from support.serving import ask, collect, request, serving, text_of

from brim.core.memory import MemoryTerms
from brim.core.plan import Plan
from brim.ledger.account import Account

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_blocking")]

KV_TOKENS = 131072
KV_BYTES = KV_TOKENS * 6 * 2 * 2 * 64 * 34 // 32
"""Six layers with two heads of 64, keys and values, in q8_0: 34 bytes for 32 numbers."""


@pytest.fixture
def wide() -> Plan:
    """The demo model with a pool that is most of its process; made here, because files block."""
    require_engine("llamacpp")
    plan = plan_for("llamacpp", path=DEMO, context_tokens=2048, kv_tokens=KV_TOKENS)
    memory = MemoryTerms(
        weights_bytes=2_000_000, kv_bytes=KV_BYTES, compute_bytes=0, overhead_bytes=10**8
    )
    return msgspec.structs.replace(plan, memory=memory)


async def test_a_pool_that_shrinks_gives_its_memory_back_and_the_answer_goes_on(wide: Plan) -> None:
    """The process holds less by the bytes of the cells that went, and the account follows."""
    name, account = wide.model.name, Account()
    asked = request(prompt="def f(x):", model=name, max_tokens=800)
    async with serving(wide, account=account) as gateway:
        alone = await ask(gateway, asked)
        hands = gateway.actuator
        before = await hands.measure(name)
        stream = aiter(await gateway.submit(asked))
        text = text_of(await anext(stream))
        await hands.drop_idle_kv(name)
        [reading] = hands.models()
        freed_bytes = KV_BYTES * (KV_TOKENS - reading.kv_pool_tokens) // KV_TOKENS
        after = await hands.measure(name)
        assert reading.kv_pool_tokens <= 2048
        assert before - after > 0.8 * freed_bytes > 0.7 * KV_BYTES
        assert account.charged_bytes == max(
            wide.memory.total_bytes - freed_bytes, account.entry(name).measured_bytes or 0
        )
        async for deltas in stream:
            text += text_of(deltas)
        assert text == alone
        await hands.grow_kv(name)
        assert gateway.models()[0].kv_pool_tokens == KV_TOKENS
        assert account.charged_bytes >= wide.memory.total_bytes
        assert await ask(gateway, asked) == alone


async def test_an_unload_gives_everything_back(wide: Plan) -> None:
    """Nothing is measured, and nothing charged, where the process was."""
    name, account = wide.model.name, Account()
    async with serving(wide, account=account) as gateway:
        assert await gateway.actuator.measure(name) > KV_BYTES
        assert await gateway.actuator.unload(name, "a test")
        assert await gateway.actuator.measure(name) == 0
        assert account.charged_bytes == 0
        choices = await collect(await gateway.submit(request(prompt="def f(", model=name)))
        assert text_of(choices[0])
