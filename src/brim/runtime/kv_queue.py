"""Requests that wait for room in one model's KV pool, first come, first served."""

import asyncio
from collections import deque

from brim.errors import BrimError
from brim.ledger.kv import KvAccount


class KvQueue:
    """A `KvAccount` that can be waited for.

    A request that does not fit holds up those behind it: passing it would starve it.
    """

    def __init__(self, account: KvAccount) -> None:
        self._account = account
        self._waiting: deque[tuple[str, int, asyncio.Future[None]]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    async def acquire(self, request_id: str, num_tokens: int) -> None:
        """Wait until the tokens are reserved; cancelling the wait leaves nothing behind.

        At most the whole pool: `check_fits` refuses more.

        Raises:
            BrimError: What `refuse_all` was given meanwhile.
        """
        if not self._waiting and self._account.reserve(request_id, num_tokens):
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (request_id, num_tokens, future)
        self._waiting.append(entry)
        try:
            await future
        except BaseException:
            # Cancelled while it waited, or in the moment between the grant and its news.
            if entry in self._waiting:
                self._waiting.remove(entry)
            self.release(request_id)
            raise

    def release(self, request_id: str) -> None:
        """Give back what a request holds, if anything, and admit who fits now."""
        self._account.release(request_id)
        while self._waiting:
            waiting_id, num_tokens, future = self._waiting[0]
            if not future.done():
                if not self._account.reserve(waiting_id, num_tokens):
                    return
                future.set_result(None)
            self._waiting.popleft()

    def refuse_all(self, error: BrimError) -> None:
        """End every wait with the error."""
        waiting, self._waiting = self._waiting, deque()
        for _, _, future in waiting:
            if not future.done():
                future.set_exception(error)
