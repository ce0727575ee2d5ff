"""KV pools that are made smaller and larger while their models work, with the account in step.

A pool that shrinks gives its bytes back once it is smaller; one that grows has them set aside
before.  One change of a model at a time; it goes on where whoever wanted it does not.
"""

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Coroutine
from typing import Any, TypeVar

from brim.errors import BrimError
from brim.ledger.account import Account, pool_bytes
from brim.runtime.granter import Granter
from brim.runtime.model_host import ModelHost

T = TypeVar("T")

MIN_POOL_TOKENS = 512
"""What is left of an idle model's pool: a short question needs no growth, and less saves nothing
beside any model's weights."""

POOL_STEP_TOKENS = 256
"""llama.cpp pads pools to this."""


class ElasticKv:
    """Resizes the pools of one gateway's models.

    Args:
        account: Where pools are charged.
        granter: The way to it.
    """

    def __init__(self, account: Account, granter: Granter) -> None:
        self._account = account
        self._granter = granter
        self._changing: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._changes: set[asyncio.Task[Any]] = set()

    def smallest(self, host: ModelHost, floor_tokens: int = MIN_POOL_TOKENS) -> int:
        """The smallest pool that a model can have now, in cells."""
        needed = max(host.needed_tokens, min(floor_tokens, host.plan.kv_tokens))
        stepped = -(-needed // POOL_STEP_TOKENS) * POOL_STEP_TOKENS
        return min(stepped, host.owed.pool.kv_tokens)

    def bytes_at(self, host: ModelHost, kv_tokens: int) -> int:
        """What the account charges for a pool of that size."""
        full_bytes = self._account.entry(host.name).full_kv_bytes
        return pool_bytes(full_bytes, kv_tokens, host.plan.kv_tokens)

    def growth_bytes(self, host: ModelHost, kv_tokens: int) -> int:
        """What must be free for a pool to grow to that size.

        Running sequences are copied out of the old pool before they are in the new one.
        """
        more = self.bytes_at(host, kv_tokens) - self.bytes_at(host, host.owed.pool.kv_tokens)
        return more + self.bytes_at(host, min(host.needed_tokens, host.owed.pool.kv_tokens))

    async def shrink(self, host: ModelHost, floor_tokens: int = MIN_POOL_TOKENS) -> int:
        """Make a pool as small as what runs allows; idle sequences go.

        Args:
            host: A loaded model.
            floor_tokens: Cells that stay in any case.

        Returns:
            Tokens of idle sequences that went.
        """
        return await self._to_its_end(self._shrink(host, floor_tokens))

    async def _shrink(self, host: ModelHost, floor_tokens: int) -> int:
        async with self._changing[host.name]:
            pool = host.owed.pool
            wanted, before = self.smallest(host, floor_tokens), pool.kv_tokens
            if not host.is_loaded or not host.can_resize or wanted >= before:
                return 0
            # At once: what is admitted meanwhile must suit the smaller pool.
            pool.resize(wanted)
            try:
                resized = await host.resize(wanted)
            except BrimError:
                # The worker died; the next one has the pool that was last agreed on.
                pool.resize(before)
                return 0
            await self._settle(host, resized.kv_tokens)
            return resized.num_dropped_tokens

    async def grow(self, host: ModelHost, kv_tokens: int) -> bool:
        """Make a pool larger; False where there is no room for that, or the engine refused.

        Args:
            host: A loaded model.
            kv_tokens: Cells that it is to have, at most those of its plan.

        Raises:
            BrimError: The worker died, or another process keeps the book locked.
        """
        return await self._to_its_end(self._grow(host, kv_tokens))

    async def stop(self) -> None:
        """Wait for changes to end, as they do with their workers; safe more than once."""
        if self._changes:
            await asyncio.wait(tuple(self._changes))

    async def _grow(self, host: ModelHost, kv_tokens: int) -> bool:
        async with self._changing[host.name]:
            pool = host.owed.pool
            stepped = -(-kv_tokens // POOL_STEP_TOKENS) * POOL_STEP_TOKENS
            wanted = min(stepped, host.plan.kv_tokens)
            if wanted <= pool.kv_tokens:
                return True
            if not host.is_loaded or not host.can_resize or host.name not in self._account:
                return False
            growth_bytes = self.growth_bytes(host, wanted)
            if not await self._granter.reserve_growth(host.name, growth_bytes):
                return False
            try:
                resized = await host.resize(wanted)
            except BaseException:
                await self._granter.resized(host.name, pool.kv_tokens, host.plan.kv_tokens)
                raise
            await self._settle(host, resized.kv_tokens)
            return pool.kv_tokens >= kv_tokens

    async def _to_its_end(self, change: Coroutine[Any, Any, T]) -> T:
        task = asyncio.get_running_loop().create_task(change, name="resizing a KV pool")
        self._changes.add(task)
        task.add_done_callback(self._forget)
        return await asyncio.shield(task)

    def _forget(self, task: "asyncio.Task[Any]") -> None:
        self._changes.discard(task)
        if not task.cancelled():
            task.exception()  # whoever wanted it may have left

    async def _settle(self, host: ModelHost, kv_tokens: int) -> None:
        """Have the admission and the account follow the pool that there is."""
        pool = host.owed.pool
        pool.resize(max(kv_tokens, pool.largest_bound))
        await self._granter.resized(host.name, kv_tokens, host.plan.kv_tokens)
        with contextlib.suppress(KeyError):  # unloaded meanwhile
            self._account.reconcile(host.name, await host.measure_resident())
