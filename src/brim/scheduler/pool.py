"""The engine's sequences: those that run, and idle ones that stay because a prompt may go on there.

Owns every open sequence, its tokens and its cells.  Idle sequences give way, least valuable first,
to whoever needs a sequence or cells; running ones never do, because each was promised the cells
that it may still come to need.
"""

from collections.abc import Callable, Iterable

from brim.core.plan import Plan
from brim.core.sampling import SamplingParams
from brim.engine.base import Engine
from brim.errors import BrimError
from brim.prefix_cache.format import Tokens
from brim.prefix_cache.tree import common_length
from brim.scheduler.cells import CellAccount, CellPath
from brim.scheduler.tokens import TokenArray

MIN_KEPT_TOKENS = 16
"""A shorter sequence is read again as fast as it is looked for."""

MAX_LOST_TOKENS = 64
"""Where a fork is a copy, an idle sequence that goes on is cut by up to so many tokens rather than
copied: the ends of two prompts differ by the few words that open the model's turn."""


class Held:
    """One open sequence of the engine and what is in it."""

    __slots__ = (
        "bound",
        "idle_since_rows",
        "is_idle",
        "is_open",
        "is_pure",
        "may_shift",
        "namespace",
        "num_lent",
        "num_promised",
        "num_uses",
        "path",
        "seq_id",
        "tokens",
        "used_s",
    )

    def __init__(self, seq_id: int, namespace: str | None, bound: int) -> None:
        self.seq_id = seq_id
        self.namespace = namespace
        """Whose it is; None keeps it from being shared."""
        self.bound = bound
        """Most tokens that it will hold."""
        self.num_promised = 0
        """Cells that it may still come to need."""
        self.tokens = TokenArray()
        self.path = CellPath()
        self.is_open = True
        """Whether `seq_id` is still its own; the engine gives ids out again."""
        self.is_idle = False
        self.is_pure = True
        """Whether its KV is what its tokens alone make; not so once it was shifted."""
        self.may_shift = False
        """Whether it may need cells of its own for all its tokens some day."""
        self.num_lent = 0
        """Of those that may shift: tokens whose cells others hold too, and which are therefore
        promised to it once more."""
        self.num_uses = 0
        """Later prompts that went on from it."""
        self.used_s = 0.0
        self.idle_since_rows = 0
        """`Pool.num_rows` when it went idle."""


class Match:
    """The sequence that shares most of a prompt's beginning."""

    __slots__ = ("held", "num_common", "num_tokens")

    def __init__(self, held: Held, num_tokens: int, num_common: int) -> None:
        self.held = held
        self.num_tokens = num_tokens
        """That can be taken over."""
        self.num_common = num_common
        """That are the same; more than can be taken where a state cannot be cut."""


class Pool:
    """Opens, fills, shares and retires sequences within the plan's sequences and cells.

    Args:
        engine: The engine; nobody else opens or closes its sequences.
        plan: Its limits.
        clock: Seconds.
    """

    def __init__(self, engine: Engine, plan: Plan, clock: Callable[[], float]) -> None:
        self._engine = engine
        self._plan = plan
        self._clock = clock
        capabilities = engine.capabilities
        self._forks_prefix = capabilities.can_fork_prefix
        self._forks_share = capabilities.forks_share_kv
        self._can_truncate = capabilities.can_truncate
        self._cells = CellAccount(forks_share=capabilities.forks_share_kv)
        self._kv_tokens = plan.kv_tokens
        self._open: dict[int, Held] = {}
        self._num_promised = 0
        self.num_idle = 0
        self.num_evicted = 0
        self.num_rows = 0
        """That were fed in all steps so far; restored tokens are none."""
        self.version = 0
        """Changes whenever there may be more room than before."""

    @property
    def num_running(self) -> int:
        """Sequences that belong to a request."""
        return len(self._open) - self.num_idle

    @property
    def kv_tokens(self) -> int:
        """Cells of the pool."""
        return self._kv_tokens

    @property
    def num_idle_cells(self) -> int:
        """Cells that no running sequence holds."""
        return self._cells.num_used - self._num_running_cells()

    @property
    def num_needed_cells(self) -> int:
        """Cells that running sequences hold and were promised: no pool may have fewer."""
        return self._num_running_cells() + self._num_promised

    def has_room(
        self,
        num_sequences: int,
        num_cells: int,
        shared: Match | None = None,
    ) -> bool:
        """Whether so much is there for a new request once every idle sequence is gone.

        Args:
            num_sequences: That it needs.
            num_cells: That it may come to need, those of `shared` included.
            shared: What it will share, which takes no cells of its own where forks share.
        """
        if self.num_running + num_sequences > self._plan.max_sequences:
            return False
        held = self._num_running_cells()
        if shared is not None and self._forks_share:
            num_cells -= shared.num_tokens
            num_cells += sum(num for _, num in self._to_promise(shared.held, shared.num_tokens))
            held = self._num_running_cells((shared.held.path, shared.num_tokens))
        return held + self._num_promised + num_cells <= self._kv_tokens

    def can_begin_with(self, match: Match) -> bool:
        """Whether a new sequence can be opened while the one that was found is still there."""
        return not match.held.is_idle or self.num_running + 2 <= self._plan.max_sequences

    def open(
        self,
        sampling: SamplingParams,
        bound: int,
        namespace: str | None,
        match: Match | None = None,
        *,
        num_awaited: int = 0,
        may_shift: bool = False,
    ) -> Held:
        """A sequence that is promised the cells that it may come to need.

        Args:
            sampling: How its tokens are drawn.
            bound: Most tokens that it will hold.
            namespace: Who may go on from it later; None: nobody.
            match: What it begins with; `can_begin_with` it.
            num_awaited: Tokens that it will fork from a running sequence before anything else.
            may_shift: `shift` may be asked for.

        Raises:
            BrimError: The engine refuses; nothing is open then.
        """
        self.spare_sequence(keep=None if match is None else match.held)
        held = Held(self._engine.open(sampling, bound), namespace, bound)
        held.may_shift = may_shift
        self._open[held.seq_id] = held
        shares = self._forks_share and not may_shift
        self._promise(held, bound - (num_awaited if shares else 0))
        held.used_s = self._clock()
        try:
            if match is not None:
                self._take_over(match, held)
        except BrimError:
            self.close(held)
            raise
        self.make_room()
        return held

    def spare_sequence(self, *, keep: Held | None = None) -> bool:
        """Have one more sequence free, if an idle one can go for it; whether there is one.

        Args:
            keep: Does not go.
        """
        if len(self._open) < self._plan.max_sequences:
            return True
        return self._evict_one(by_cells=False, keep=keep)

    def feed(self, held: Held, tokens: Tokens) -> None:
        """Note that the engine has taken prompt tokens."""
        held.tokens.extend(tokens)
        self._took(held, len(tokens))

    def feed_one(self, held: Held, token: int) -> None:
        """Note that the engine has taken a drawn token."""
        held.tokens.append(token)
        self._took(held, 1)

    def fork(self, source: Held, target: Held, num_tokens: int) -> None:
        """Give the empty `target` the first tokens of `source`.

        Raises:
            BrimError: The engine refuses; the target is still empty.
        """
        self._engine.fork(source.seq_id, target.seq_id, num_tokens)
        if self._forks_share and not target.may_shift:
            for held, num_more in self._to_promise(source, num_tokens):
                held.num_lent += num_more
                self._promise(held, held.num_promised + num_more)
        self._cells.fork(source.path, target.path, num_tokens)
        self._fill(source, target, num_tokens)

    def truncate(self, held: Held, num_tokens: int) -> None:
        """Keep the first tokens of a running sequence.

        Raises:
            BrimError: The engine refuses.
        """
        self._engine.truncate(held.seq_id, num_tokens)
        num_cut = len(held.tokens) - num_tokens
        held.tokens.truncate(num_tokens)
        self._cells.truncate(held.path, num_tokens)
        self._promise(held, held.num_promised + num_cut)

    def shift(self, held: Held, num_kept: int, num_dropped: int) -> None:
        """Make room in a sequence that fills the window; it is nobody's prefix afterwards.

        Raises:
            BrimError: The engine refuses.
        """
        self._make_room_to_detach(held)
        self._engine.shift(held.seq_id, num_kept, num_dropped)
        held.is_pure = False
        self._cells.detach(held.path)
        self._cells.truncate(held.path, len(held.tokens) - num_dropped)
        rest = held.tokens.view()[num_kept + num_dropped :].copy()
        held.tokens.truncate(num_kept)
        held.tokens.extend(rest)
        held.num_lent = 0
        self._promise(held, held.bound - len(held.tokens))
        self._settle_lent()
        self.make_room()

    def retire(self, held: Held) -> None:
        """Let a sequence go idle that a later prompt may continue, and close any other."""
        self.version += 1
        self._promise(held, 0)
        if held.namespace is None or not held.is_pure or len(held.tokens) < MIN_KEPT_TOKENS:
            self._forget(held)
            return
        held.is_idle = True
        held.used_s = self._clock()
        held.idle_since_rows = self.num_rows
        self.num_idle += 1

    def checkpoint(self, held: Held) -> None:
        """Keep a copy of a running sequence as it is now, where one more sequence is free for it.

        Raises:
            BrimError: The engine refuses.
        """
        num_cells = 0 if self._forks_share else len(held.tokens)
        if held.namespace is None or not self.make_room(num_cells):
            return
        if self.spare_sequence():
            copy = self.open(SamplingParams(), len(held.tokens), held.namespace)
            try:
                self.fork(held, copy, len(held.tokens))
            except BrimError:
                self.close(copy)
                raise
            self.retire(copy)

    def close(self, held: Held) -> None:
        """Close a running sequence of which the engine's state is not to be trusted."""
        self.version += 1
        self._promise(held, 0)
        self._forget(held)

    def find(self, namespace: str, tokens: Tokens) -> Match | None:
        """The sequence from which most of a prompt can be taken; idle ones first where equal."""
        best: Match | None = None
        for held in self._open.values():
            if held.namespace != namespace or not held.is_pure:
                continue
            num_common = common_length(held.tokens.view(), tokens)
            can_take = self._forks_prefix or self._engine.can_keep(held.seq_id, num_common)
            num_tokens = num_common if can_take else 0
            key = (num_tokens, num_common, held.is_idle)
            if num_common and (
                best is None or key > (best.num_tokens, best.num_common, best.held.is_idle)
            ):
                best = Match(held, num_tokens, num_common)
        return best

    def idle(self) -> list[Held]:
        """The idle sequences."""
        return [held for held in self._open.values() if held.is_idle]

    def num_own_cells(self, held: Held) -> int:
        """Cells that closing a sequence would free."""
        return self._cells.num_own(held.path)

    def evict(self, held: Held) -> None:
        """Let an idle sequence go."""
        self.num_idle -= 1
        self.num_evicted += 1
        self._forget(held)

    def make_room(self, num_cells: int = 0, *, keep: Held | None = None) -> bool:
        """Let idle sequences go until every promise can be kept, and `num_cells` more are free.

        Args:
            num_cells: Beyond the promises.
            keep: Does not go.

        Returns:
            Whether so much is free.
        """
        while self._cells.num_used + self._num_promised + num_cells > self._kv_tokens:
            if not self._evict_one(by_cells=True, keep=keep):
                return False
        return True

    def resize(self, kv_tokens: int) -> None:
        """Have another number of cells; idle sequences go until what is left fits into them.

        Args:
            kv_tokens: No fewer than `num_needed_cells`.

        Raises:
            BrimError: The engine did not; the pool has its cells, but for the sequences that went.
        """
        before, self._kv_tokens = self._kv_tokens, kv_tokens
        self.make_room()
        self.version += 1
        if kv_tokens == before:
            return
        try:
            self._engine.resize_kv(kv_tokens)
        except BrimError:
            self._kv_tokens = before
            raise

    def _take_over(self, match: Match, target: Held) -> None:
        """Give the empty `target` what was found, as cheaply as the engine can."""
        source, num_tokens = match.held, match.num_tokens
        source.num_uses += 1
        source.used_s = self._clock()
        if self._should_consume(source, num_tokens):
            self._consume(source, target, num_tokens)
        else:
            if not self._forks_share:
                self.make_room(keep=source)
            self.fork(source, target, num_tokens)

    def _should_consume(self, source: Held, num_tokens: int) -> bool:
        """Whether an idle sequence itself becomes the new one, rather than being copied."""
        num_lost = len(source.tokens) - num_tokens
        if not source.is_idle or (num_lost and not self._can_truncate):
            return False
        if num_lost == 0:
            return True
        if self._forks_share:
            return False
        return num_lost <= MAX_LOST_TOKENS or not self.make_room(keep=source)

    def _consume(self, source: Held, target: Held, num_tokens: int) -> None:
        self._engine.move(source.seq_id, target.seq_id)
        del self._open[source.seq_id]
        source.is_open = False
        self.num_idle -= 1
        target.path, target.num_uses = source.path, source.num_uses
        self._fill(source, target, len(source.tokens))
        self._settle_lent()
        if num_tokens < len(source.tokens):
            self.truncate(target, num_tokens)

    def _fill(self, source: Held, target: Held, num_tokens: int) -> None:
        target.tokens.extend(source.tokens.view()[:num_tokens])
        target.is_pure = source.is_pure
        if target.may_shift and self._forks_share:
            target.num_lent = num_tokens
        else:
            self._promise(target, target.bound - num_tokens)

    def _took(self, held: Held, num_tokens: int) -> None:
        self._cells.extend(held.path, num_tokens)
        held.num_promised -= num_tokens
        self._num_promised -= num_tokens

    def _promise(self, held: Held, num_cells: int) -> None:
        self._num_promised += num_cells - held.num_promised
        held.num_promised = num_cells

    def _make_room_to_detach(self, held: Held) -> None:
        """Let idle sequences go until there is room for a copy of what a sequence shares."""
        num_shared = len(held.tokens) - self._cells.num_own(held.path)
        while self._cells.num_used + num_shared > self._kv_tokens:
            if not self._evict_one(by_cells=True, keep=None):
                return
            num_shared = len(held.tokens) - self._cells.num_own(held.path)

    def _shifting(self) -> list[Held]:
        """Running sequences that may come to need cells of their own for what they share."""
        return [held for held in self._open.values() if held.may_shift and not held.is_idle]

    def _to_promise(self, source: Held, num_tokens: int) -> list[tuple[Held, int]]:
        """Who must be promised how much more before another takes tokens of `source`.

        Where those who hold a cell all may shift, it stays with the last one; once another holds it
        too, each of them needs one of its own.
        """
        return [
            (held, min(num_tokens, num_shared) - held.num_lent)
            for held in self._shifting()
            if min(num_tokens, num_shared := self._cells.num_shared(held.path, source.path))
            > held.num_lent
        ]

    def _settle_lent(self) -> None:
        """Take promises back that were made for cells which nobody else holds any more."""
        for held in self._shifting():
            num_shared = len(held.tokens) - self._cells.num_own(held.path)
            num_back = held.num_lent - num_shared
            if num_back > 0:
                held.num_lent = num_shared
                self._promise(held, held.num_promised - num_back)

    def _num_running_cells(self, *others: tuple[CellPath, int]) -> int:
        paths: Iterable[tuple[CellPath, int]] = [
            (held.path, len(held.tokens)) for held in self._open.values() if not held.is_idle
        ]
        return self._cells.num_held([*paths, *others])

    def _evict_one(self, *, by_cells: bool, keep: Held | None) -> bool:
        """Close the least valuable idle sequence; False where there is none.

        Args:
            by_cells: It must free cells; else a free sequence is what is wanted.
            keep: Does not go.
        """
        idle = [held for held in self.idle() if held is not keep]
        if by_cells:
            # One whose cells all belong to others gives none back.
            idle = [held for held in idle if self._cells.num_own(held.path)] or idle
        if not idle:
            return False
        now_s = self._clock()
        self.evict(min(idle, key=lambda held: self._value(held, now_s, by_cells=by_cells)))
        return True

    def _value(self, held: Held, now_s: float, *, by_cells: bool) -> float:
        """Tokens that it would save, by what it costs to keep, and by its age.

        Cells that others hold as well are neither saved nor freed by it; a state that cannot be
        cut is worth all its tokens and costs one sequence.
        """
        num_saved = self._cells.num_own(held.path) if self._forks_prefix else len(held.tokens)
        cost = max(1, self._cells.num_own(held.path)) if by_cells else 1
        age_s = max(0.0, now_s - held.used_s) + 1.0
        return num_saved * (1 + held.num_uses) / cost / age_s

    def _forget(self, held: Held) -> None:
        self._engine.close(held.seq_id)
        self._cells.truncate(held.path, 0)
        del self._open[held.seq_id]
        held.is_open = False
        self._settle_lent()
