"""Which of the gateway's models are in memory: who comes, who gives way, and who waits for whom.

One task brings models in, one group at a time, in the order in which their first requests came.
What costs least gives way first (`room`).  Where models that work hold the memory, they get no new
requests once they have had their turn, finish what is in flight, and leave; their new requests wait
for their next turn.  So everybody is answered, and models change places at most once a second.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence

from brim.config.tree import ModelSettings
from brim.core.event import EventKind
from brim.core.plan import Grant
from brim.core.stance import Stance
from brim.errors import BrimError, Busy, DoesNotFit, EngineError
from brim.ledger.account import Account
from brim.runtime.admission import not_admitted, shutting_down
from brim.runtime.elastic_kv import ElasticKv
from brim.runtime.granter import Granter
from brim.runtime.groups import Group, Phase, Waiter, groups_of
from brim.runtime.model_host import ModelHost
from brim.runtime.moves import Moves
from brim.runtime.recorder import Recorder
from brim.runtime.room import Room, names_of

_log = logging.getLogger(__name__)


MIN_TURN_S = 1.0
"""How long a model that works stays before it makes place for others: loading takes about as long,
and a shorter turn would spend the machine on it."""

WAIT_POLL_S = 2.0
"""Between two looks while waiting for memory at the start: programs take longer to close."""

_ASKED_FOR = "it was asked for"
"""Why a model is loaded whose requests have left meanwhile: they were told to come again."""

RETRY_AFTER_S = 5.0
"""When to ask again for a model that waits for another's answers to end: most take seconds."""


class Residency:
    """Loads and evicts the models of one gateway.

    Args:
        hosts: The models by name, in the order in which they are loaded.
        account: Where grants stand.
        granter: The way to it.
        settings: Pairs, pins, and how long requests wait.
        record: Where loads and unloads are recorded.
        pinned_by_apps: Models that apps want kept.
        force: Load even what does not fit.
        say: Told what a person should know.

    Raises:
        ConfigError: A pair or a pin names a model that is not served.
    """

    def __init__(
        self,
        hosts: Mapping[str, ModelHost],
        account: Account,
        granter: Granter,
        *,
        settings: ModelSettings,
        record: Recorder,
        pinned_by_apps: Callable[[], Collection[str]],
        force: bool,
        say: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._record = record
        self._say = say
        self.groups = groups_of(hosts, settings)
        self._group_of = {host.name: group for group in self.groups for host in group.hosts}
        self._granter = granter
        self.elastic = ElasticKv(account, granter)
        self._room = Room(
            self.groups,
            account,
            granter,
            self.elastic,
            settings=settings,
            pinned_by_apps=pinned_by_apps,
            record=record,
        )
        self._moves = Moves(
            account, granter, record=record, on_change=self.note_change, force=force, say=say
        )
        self._stance = Stance()
        self._news = asyncio.Event()
        self._bringing: asyncio.Task[None] | None = None
        self._next_switch_s = 0.0
        self._is_stopped = False

    @property
    def grants(self) -> dict[str, Grant]:
        """What the account answered for each model that is in memory."""
        return self._moves.grants

    # --- what others ask of it -----------------------------------------------------------------

    async def start(self, wait_s: float) -> None:
        """Have every model granted, then load them, one after the other.

        A model that has no room beside those before it, and has it alone, is left for its first
        request.

        Args:
            wait_s: How long to wait for memory that other programs hold.

        Raises:
            DoesNotFit: The account refuses one; nothing was started.
            BrimError: One could not be loaded.
        """
        deadline = time.monotonic() + wait_s
        # Those that are to stay come first: nobody gives way to them later.
        in_order = sorted(self.groups, key=lambda each: not self._room.is_pinned(each))
        for group in in_order:
            await self._grant_at_start(group, deadline)
        for group in self.groups:
            if group.names <= self._room.granted_names():
                await self._load(group, "the server starts")
        self._bringing = asyncio.get_running_loop().create_task(
            self._bring_in(), name="bringing models in"
        )

    async def enter(self, host: ModelHost, *, force: bool) -> None:
        """See `runtime.seat.Seat`."""
        group = self._group_of[host.name]
        if group.is_open:
            host.enter()
            return
        if self._is_stopped:
            raise shutting_down()
        waiter = Waiter(host, force, asyncio.get_running_loop().create_future())
        group.waiters.append(waiter)
        self.note_change()
        try:
            async with asyncio.timeout(self._settings.load_wait_s):
                await waiter.future
        except TimeoutError:
            if not waiter.is_granted:
                self._leave_line(group, waiter)
                raise self._waited_too_long(group, host) from None
        except BaseException:
            if waiter.is_granted:
                host.leave()
            self._leave_line(group, waiter)
            raise

    async def grow(self, host: ModelHost, kv_tokens: int) -> None:
        """Have a pool hold at least so many cells, idle models making room where they have to.

        To the whole plan where nothing is short, else to what is needed.

        Raises:
            Busy: There is no room for that now, or nothing new is admitted.
        """
        stance = self._stance
        if not stance.admits:
            raise not_admitted(stance.reason, stance.retry_after_s)
        if stance.loads and await self.elastic.grow(host, host.plan.kv_tokens):
            return
        while not await self.elastic.grow(host, kv_tokens):
            idle = [each for each in self._room.idle() if host not in each.hosts]
            wanted_bytes = self.elastic.growth_bytes(host, kv_tokens)
            # Where there was room its engine could not, and nobody's leaving would help.
            had_room = self._granter.free_bytes() >= wanted_bytes
            would_help = self._granter.free_bytes(without=names_of(idle)) >= wanted_bytes
            if not idle or had_room or not would_help:
                pool_tokens = host.owed.pool.kv_tokens
                raise Busy(
                    f"the KV pool of model '{host.name}' has {pool_tokens} tokens while memory is "
                    f"short, and the request may need {kv_tokens}; try again in "
                    f"{stance.retry_after_s:.0f} s or ask for less",
                    retry_after_s=stance.retry_after_s,
                )
            await asyncio.sleep(self._next_switch_s - time.monotonic())
            if idle[0].is_idle:
                self._next_switch_s = time.monotonic() + MIN_TURN_S
                await self._moves.evict(idle[0], f"{host.name} needs room for a request")

    def set_stance(self, stance: Stance) -> None:
        """Allow more or less from now on; a load that is under way when nothing may be is ended."""
        self._stance = stance
        if not stance.admits:
            error = not_admitted(stance.reason, stance.retry_after_s)
            for group in self.groups:
                group.refuse_all(error)
            # A start that is cut short would be the end of the server.
            if self._bringing is not None:
                self._moves.cancel_load()
        self.note_change()

    def note_change(self) -> None:
        """Something has changed that may let a model in: a request came or ended, a model left."""
        self._news.set()

    async def unload(self, name: str, cause: str) -> bool:
        """Take a model and its partner out of memory; False where something is in flight by now.

        Nothing is recorded: whoever decided does that.
        """
        group = self._group_of[name]
        if group.phase is not Phase.PRESENT or not group.is_idle:
            return False
        await self._moves.take_out(group, f"{cause}; its next request loads it again")
        return True

    def refuse_waiting(self, error: BrimError) -> None:
        """Tell everybody who waits for a model."""
        for group in self.groups:
            group.refuse_all(error)

    async def stop(self) -> None:
        """End loads that are under way and begin no others; safe more than once."""
        self._is_stopped = True
        self.refuse_waiting(shutting_down())
        if self._bringing is not None:
            self._bringing.cancel()
            await asyncio.wait([self._bringing])
        await self._moves.stop()

    # --- what it tells -------------------------------------------------------------------------

    def group_of(self, name: str) -> Group:
        """A model with its partner, where it has one."""
        return self._group_of[name]

    def pin_of(self, name: str) -> str:
        """Who wants a model kept, or its partner, in words; empty for nobody."""
        return self._room.pin_of(self._group_of[name])

    def num_waiting(self, name: str) -> int:
        """Requests that wait for a model, or for its turn."""
        waiters = self._group_of[name].waiters
        return sum(waiter.host.name == name for waiter in waiters)

    # --- bringing models in --------------------------------------------------------------------

    async def _grant_at_start(self, group: Group, deadline: float) -> None:
        has_said = False
        while True:
            try:
                await self._moves.grant(group)
                return
            except DoesNotFit as error:
                names = self._room.granted_names()
                if names and await self._room.fits(group, without=names):
                    for host in group.hosts:
                        host.defer("it has no room beside the others; its first request loads it")
                    return
                left_s = deadline - time.monotonic()
                if left_s <= 0 or not await self._room.fits(group, without=names, others_bytes=0):
                    raise
                if not has_said:
                    self._say(f"waiting for memory, {left_s:.0f} s at most: {error.message}")
                    has_said = True
            await asyncio.sleep(min(WAIT_POLL_S, left_s))

    async def _bring_in(self) -> None:
        """Serve those who wait, in their order, until the gateway stops."""
        while True:
            self._news.clear()
            wait_s = await self._step()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._news.wait()

    async def _step(self) -> float | None:
        """Bring the next group one step nearer; seconds to the next step, None: when there is news.

        Whatever goes wrong is told to those who wait for it, and nobody else.
        """
        group = self._next_group()
        if group is None:
            self._reopen()
            return None
        if not (self._stance.loads and self._stance.admits):
            self._reopen()
            return None
        was_forced = group.is_forced
        try:
            return await self._bring(group)
        except BrimError as error:
            if was_forced or not group.is_forced:  # one that came meanwhile forces the next try
                group.refuse_all(error)
        except Exception as exc:
            _log.exception("bringing in %s failed", group.name)
            defect = f"model '{group.name}' could not be loaded: {type(exc).__name__}: {exc}"
            group.refuse_all(EngineError(defect))
        return 0.0

    def _next_group(self) -> Group | None:
        """Who is to come: forced ones first, then whose first request has waited longest."""
        waiting = [each for each in self.groups if each.waiters and each.phase is Phase.ABSENT]
        return min(
            waiting, key=lambda each: (not each.is_forced, each.waiting_since_s), default=None
        )

    async def _bring(self, group: Group) -> float | None:
        for host in group.hosts:
            host.check_loadable()
        try:
            await self._moves.grant(group)
        except DoesNotFit as error:
            return await self._make_room(group, error)
        self._reopen()
        cause = f"{_requests_wait(len(group.waiters))} for it" if group.waiters else _ASKED_FOR
        await self._load(group, cause)
        return 0.0

    async def _load(self, group: Group, cause: str) -> None:
        # The stance may have changed while the machine was read.  A start goes on, as above.
        if self._bringing is not None and not self._stance.admits:
            await self._moves.undo(group)
            raise not_admitted(self._stance.reason, self._stance.retry_after_s)
        if not await self._moves.load(group, cause):
            raise not_admitted(self._stance.reason, self._stance.retry_after_s)

    async def _make_room(self, group: Group, error: DoesNotFit) -> float | None:
        """Have as little as possible give way, and as cheap a thing as possible.

        Returns:
            0 where a grant may be tried again, the seconds to wait for that, or None: for news.

        Raises:
            Busy: Other programs hold the memory.
            DoesNotFit: It would not fit in the place of any that may leave.
        """
        if any(each.phase is Phase.LEAVING for each in self.groups):
            return None
        if await self._room.shrink_for(group):
            return 0.0
        victims = await self._room.victims(group)
        if group.is_forced and (victims is None or not all(each.is_idle for each in victims)):
            await self._moves.grant(group, force=True)
            await self._load(group, "a request forced it")
            return 0.0
        if victims is None:
            raise await self._room.no_room(group, error)
        self._reopen(but=victims)
        working = [each for each in victims if not each.is_idle]
        turns_end_s = (each.present_since_s + MIN_TURN_S for each in working)
        wait_s = max(self._next_switch_s, *turns_end_s, 0.0) - time.monotonic()
        if wait_s > 0:
            return wait_s
        if working:
            for victim in victims:
                self._close(victim, group)
            return None
        self._next_switch_s = time.monotonic() + MIN_TURN_S
        for victim in victims:
            await self._moves.evict(victim, f"it gave way to {group.name}")
        return 0.0

    def _close(self, victim: Group, group: Group) -> None:
        """Let no new request in where others wait for its memory."""
        if victim.is_closed:
            return
        victim.is_closed = True
        who = f"{_requests_wait(len(group.waiters))} for {group.name}"
        for host in victim.hosts:
            cause = f"it has had its turn, and {who}"
            self._record(EventKind.MODEL_LEAVING, model=host.name, cause=cause)

    def _reopen(self, *, but: Sequence[Group] = ()) -> None:
        """Let requests in again where nobody waits for the memory any more."""
        for group in self.groups:
            if group.is_closed and group.phase is Phase.PRESENT and group not in but:
                group.admit_all()

    def _leave_line(self, group: Group, waiter: Waiter) -> None:
        if waiter in group.waiters:
            group.waiters.remove(waiter)
            self.note_change()

    def _waited_too_long(self, group: Group, host: ModelHost) -> Busy:
        if not self._stance.loads:
            return not_loaded(host.name, self._stance)
        working = [each.name for each in self._room.present() if not each.is_idle]
        if self._bringing is None or group.phase is Phase.LOADING or not working:
            why = "is being loaded"
        else:
            why = f"has no room while {', '.join(working)} works"
        return Busy(
            f"model '{host.name}' {why}; try again in {RETRY_AFTER_S:.0f} s",
            retry_after_s=RETRY_AFTER_S,
        )


def _requests_wait(number: int) -> str:
    return f"{number} requests wait" if number != 1 else "1 request waits"


def not_loaded(name: str, stance: Stance) -> Busy:
    """What clients are told while no model is loaded."""
    wait_s = math.ceil(stance.retry_after_s)
    return Busy(
        f"model '{name}' is out of memory and is not loaded now: "
        f"{stance.reason or 'memory is short'}; try again in {wait_s} s",
        retry_after_s=wait_s,
    )
