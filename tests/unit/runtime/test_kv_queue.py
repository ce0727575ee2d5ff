"""Waiting for room in a KV pool."""

import asyncio

import pytest

from brim.errors import Busy
from brim.ledger.kv import KvAccount
from brim.runtime.kv_queue import KvQueue

pytestmark = pytest.mark.anyio


async def waiting(queue: KvQueue, name: str, num_tokens: int) -> "asyncio.Task[None]":
    """A task that has got as far as it can."""
    task = asyncio.ensure_future(queue.acquire(name, num_tokens))
    await asyncio.sleep(0)
    return task


async def test_what_fits_is_granted_at_once() -> None:
    """Nothing waits while there is room."""
    account = KvAccount(100)
    queue = KvQueue(account)
    await queue.acquire("a", 60)
    await queue.acquire("b", 40)
    assert account.free_tokens == 0


async def test_the_first_in_line_goes_first_even_where_the_second_would_fit() -> None:
    """A small request does not pass a large one, and both run when there is room."""
    account = KvAccount(100)
    queue = KvQueue(account)
    await queue.acquire("a", 60)
    large, small = await waiting(queue, "large", 90), await waiting(queue, "small", 10)
    assert len(queue) == 2
    queue.release("a")
    await asyncio.gather(large, small)
    assert account.free_tokens == 0


async def test_a_wait_that_is_cancelled_lets_the_next_one_through() -> None:
    """The one behind it is not held up by a place that nobody wants."""
    account = KvAccount(100)
    queue = KvQueue(account)
    await queue.acquire("a", 60)
    large, small = await waiting(queue, "large", 90), await waiting(queue, "small", 10)
    large.cancel()
    await small
    assert len(queue) == 0
    queue.release("a")
    queue.release("small")
    assert account.free_tokens == 100


async def test_a_wait_that_is_cancelled_in_the_middle_is_forgotten() -> None:
    """Clients that come and go behind a blocked one do not pile up."""
    queue = KvQueue(KvAccount(100))
    await queue.acquire("a", 60)
    blocked, gone = await waiting(queue, "blocked", 90), await waiting(queue, "gone", 90)
    gone.cancel()
    await asyncio.wait([gone])
    assert len(queue) == 1
    blocked.cancel()
    await asyncio.wait([blocked])


async def test_a_grant_that_comes_too_late_is_given_back() -> None:
    """Cancelled between the grant and its news: the tokens are free again."""
    account = KvAccount(100)
    queue = KvQueue(account)
    await queue.acquire("a", 60)
    late = await waiting(queue, "late", 90)
    queue.release("a")
    assert account.free_tokens == 10
    late.cancel()
    await asyncio.wait([late])
    assert account.free_tokens == 100


async def test_every_wait_can_be_refused() -> None:
    """A shutdown ends all of them with its error, and what they waited for stays free."""
    account = KvAccount(100)
    queue = KvQueue(account)
    await queue.acquire("a", 60)
    tasks = [await waiting(queue, name, 90) for name in "bc"]
    queue.refuse_all(Busy("shutting down"))
    for task in tasks:
        with pytest.raises(Busy):
            await task
    queue.release("a")
    assert account.free_tokens == 100
