"""The gateway's way to the account: each grant with a fresh reading, and seen by other processes.

Owns the order of a grant: lock the book, read the machine, ask, write what was granted, unlock.
The account itself is touched on the event loop alone; files and readings are off it.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping

import msgspec

from brim.core.machine import MachineSpec
from brim.core.plan import Grant, Plan, Verdict
from brim.errors import Busy, DoesNotFit
from brim.ledger.account import Account
from brim.ledger.book import Book, Page, beside
from brim.ledger.correction import PastErrors, corrected
from brim.ledger.entry import Statement, TransientKind
from brim.ledger.history import ForecastHistory
from brim.ledger.kv import KvAccount
from brim.planner.fit import Room
from brim.runtime.forecast_errors import new_load_id, subject_of
from brim.telemetry.events import log_event

REFUSAL_PERIOD_S = 60.0
"""Between two refusals of a model that count: clients that try again and a start that waits ask
every few seconds, and would wear out in a minute what its loads have taught."""

WRITES_PART = 4
"""At most one part in this many of what is left goes to KV on its way to the disk."""

Fit = Callable[[Plan, MachineSpec, Room], Plan]
"""A plan for the room that is left, at most as large as the one that is wished for."""


class Granter:
    """Asks, grants and releases for one gateway.

    Args:
        account: The gateway's account.
        read_machine: A fresh reading, called outside the event loop.
        book: Where other processes see our grants, and we theirs; None for a machine of our own.
        history: What earlier forecasts got wrong.
        fit: Suits a wish to the room that is left; None takes wishes as they are.
    """

    def __init__(
        self,
        account: Account,
        *,
        read_machine: Callable[[], MachineSpec],
        book: Book | None,
        history: ForecastHistory,
        fit: Fit | None,
    ) -> None:
        self._account = account
        self._read_machine = read_machine
        self._book = book
        self._history = history
        self._fit = fit
        self._machine: MachineSpec | None = None
        self._next_refusal_s: dict[str, float] = {}

    async def grant(self, wish: Plan, *, force: bool) -> tuple[Plan, Grant, KvAccount]:
        """Enter a model into the account.

        Returns:
            How to load it, what the account answered, and the model's KV pool.

        Raises:
            DoesNotFit: There is no room for it.
            Busy: Another process keeps the book locked.
        """
        async with self._page() as page:
            machine = await self._read(page)
            past = await self._past(wish, machine)
            room = self._account.room(machine)
            plan = await asyncio.to_thread(self._suited, wish, machine, past, room)
            pool = KvAccount(plan.kv_tokens)
            try:
                answer = self._account.grant(
                    plan.model.name, plan, machine, past=past, pool=pool, force=force
                )
            except DoesNotFit:
                if self._account.ask(plan, machine).verdict is not Verdict.NO:
                    await self._note_refusal(plan, machine)
                raise
            try:
                await self._write(page)
            except BaseException:
                self._account.release(plan.model.name)
                raise
        return plan, answer, pool

    async def trial(
        self,
        *wishes: Plan,
        without: Collection[str] = (),
        kv_bytes: Mapping[str, int] | None = None,
        others_bytes: int | None = None,
    ) -> Grant:
        """What `grant` would answer by the newest reading to models that come together.

        Changes nothing.

        Args:
            wishes: The models, one after the other.
            without: Entries to leave out.
            kv_bytes: Entry -> what its pool would take after it was made smaller.
            others_bytes: In place of what is read, such as 0 for a machine of our own.

        Returns:
            The first refusal, or what the last one was answered.
        """
        machine = self._machine
        if others_bytes is not None:
            # Anew, without what other brim processes were granted.
            machine = await asyncio.to_thread(self._read_machine)
            machine = msgspec.structs.replace(machine, others_bytes=others_bytes)
        elif machine is None:
            async with self._page() as page:
                machine = await self._read(page)
        account = self._account.trial_copy(without=without, kv_bytes=kv_bytes)
        for wish in wishes:
            past = await self._past(wish, machine)
            plan = await asyncio.to_thread(self._suited, wish, machine, past, account.room(machine))
            answer = account.ask(plan, machine, past=past)
            if answer.verdict is Verdict.NO:
                break
            account.grant(plan.model.name, plan, machine, past=past)
        return answer

    async def reserve_writes(self, name: str, max_bytes: int) -> int:
        """Set memory aside for KV on its way to the disk, as long as the model stands there.

        Out of what is left of the comfortable budget by the newest reading, and a part of that
        alone: it is not worth a model's place, and the next model may need the rest.

        Returns:
            The bytes that were set aside; 0 where there are none to spare.

        Raises:
            Busy: Another process keeps the book locked.
        """
        assert self._machine is not None, "a grant needs a reading"
        left_bytes = self._account.room(self._machine).comfortable_bytes
        num_bytes = min(max_bytes, left_bytes // WRITES_PART)
        kind = TransientKind.PREFIX_CACHE_WRITE
        if not num_bytes or not self._account.reserve(name, kind, num_bytes, self._machine):
            return 0
        async with self._page() as page:
            await self._write(page)
        return num_bytes

    async def reserve_growth(self, name: str, num_bytes: int) -> bool:
        """Set bytes aside for a pool that is to grow, by a fresh reading; False where they are not.

        Raises:
            Busy: Another process keeps the book locked.
        """
        async with self._page() as page:
            machine = await self._read(page)
            if name not in self._account:
                return False
            if not self._account.reserve(name, TransientKind.KV_GROWTH, num_bytes, machine):
                return False
            await self._write(page)
        return True

    def free_bytes(self, *, without: Collection[str] = ()) -> int:
        """What could be granted by the newest reading, without some entries."""
        if self._machine is None:
            return 0
        return self._account.room(self._machine, without=without).tight_bytes

    async def resized(self, name: str, kv_tokens: int, plan_tokens: int) -> None:
        """Charge a model for the pool that it has now; what was set aside for it is free again."""
        self._account.release_transient(name, TransientKind.KV_GROWTH)
        if name in self._account:
            self._account.resize_pool(name, kv_tokens, plan_tokens)
        with contextlib.suppress(Busy):  # the account is right; the book follows with the next
            async with self._page() as page:
                await self._write(page)

    async def release(self, name: str) -> None:
        """Take a model out of the account and out of the book."""
        self._account.release(name)
        async with self._page() as page:
            await self._write(page)

    async def refresh(self) -> None:
        """Read the machine again, for admission and for what is shown, and keep the book true."""
        async with self._page() as page:
            await self._read(page)
            await self._write(page)

    async def close(self) -> None:
        """Leave nothing in the book."""
        if self._book is not None:
            await asyncio.to_thread(self._book.erase)
        await asyncio.to_thread(self._history.close)

    @property
    def machine(self) -> MachineSpec | None:
        """The newest reading; None before the first."""
        return self._machine

    def short_of_growth(self, name: str, num_kv_tokens: int) -> int:
        """See `Account.short_of_growth`; by the newest reading."""
        if self._machine is None or name not in self._account:
            return 0
        return self._account.short_of_growth(name, num_kv_tokens, self._machine)

    def statement(self) -> Statement | None:
        """The whole account by the newest reading; None before the first."""
        return None if self._machine is None else self._account.statement(self._machine)

    def _suited(self, wish: Plan, machine: MachineSpec, past: PastErrors, room: Room) -> Plan:
        if self._fit is None:
            return wish
        # The plan must suit the room with its past errors counted in, and room is plain bytes.
        planned = max(1, wish.memory.total_bytes)
        factor = max(1.0, corrected(wish.memory, past).total_bytes / planned)
        smaller = Room(int(room.comfortable_bytes / factor), int(room.tight_bytes / factor))
        if wish.memory.total_bytes <= smaller.comfortable_bytes:
            return wish
        return self._fit(wish, machine, smaller)

    async def _note_refusal(self, plan: Plan, machine: MachineSpec) -> None:
        """Have the correction that alone stood in the way of a load age."""
        name, now_s = plan.model.name, time.monotonic()
        if now_s < self._next_refusal_s.get(name, now_s):
            return
        self._next_refusal_s[name] = now_s + REFUSAL_PERIOD_S
        subject = subject_of(plan, machine)
        await asyncio.to_thread(self._history.record_refusal, subject, new_load_id())

    async def _past(self, wish: Plan, machine: MachineSpec) -> PastErrors:
        subject = subject_of(wish, machine)
        return await asyncio.to_thread(self._history.past_errors, subject)

    async def _read(self, page: Page | None) -> MachineSpec:
        def read() -> MachineSpec:
            machine = self._read_machine()
            return machine if page is None else beside(machine, page.others())

        self._machine = await asyncio.to_thread(read)
        return self._machine

    async def _write(self, page: Page | None) -> None:
        if page is not None:
            await asyncio.to_thread(page.write, self._account.promises())

    @contextlib.asynccontextmanager
    async def _page(self) -> AsyncIterator[Page | None]:
        """The locked book; None where there is none, or its file cannot be used."""
        if self._book is None:
            yield None
            return
        opening = asyncio.ensure_future(asyncio.to_thread(self._book.open))
        try:
            page = await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close_late)
            raise
        except OSError as exc:
            # Other processes then see only what our workers hold, which is better than no server.
            log_event("ledger_book_unusable", reason=exc)
            yield None
            return
        with page:
            yield page


def _close_late(opening: "asyncio.Future[Page]") -> None:
    """Unlock a book that was opened for somebody who has left."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()
