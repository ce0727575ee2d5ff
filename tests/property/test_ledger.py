"""The ledger under any order of grants, loads, requests, transients and releases."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from brim.core.machine import MachineSpec
from brim.core.memory import MemoryTerms
from brim.core.plan import Grant, Verdict
from brim.errors import DoesNotFit
from brim.ledger.account import Account
from brim.ledger.budget import budget_of
from brim.ledger.correction import MAX_CORRECTION, PastErrors, corrected, correction
from brim.ledger.entry import TransientKind
from brim.ledger.kv import KvAccount

NAMES = st.sampled_from("abcdef")
BYTES = st.integers(0, 12 * 10**9)
TOKENS = st.integers(0, 1000)
POOL_TOKENS = 1000
RATIOS = st.lists(st.floats(0.001, 1000), max_size=20)
PAST = st.builds(
    PastErrors,
    ratios=st.dictionaries(
        st.sampled_from(["weights_bytes", "kv_bytes", "compute_bytes", "total_bytes"]),
        RATIOS.map(tuple),
    ),
    num_refused=st.integers(0, 100),
)
TERMS = st.builds(
    MemoryTerms,
    weights_bytes=BYTES,
    kv_bytes=BYTES,
    compute_bytes=BYTES,
    overhead_bytes=BYTES,
    repacked_bytes=BYTES,
    load_peak_bytes=BYTES,
)
MACHINE = MachineSpec(
    name="m", system="linux", ram_bytes=20 * 10**9, others_bytes=4 * 10**9,
    gpu_limit_bytes=14 * 10**9,
)  # fmt: skip


class AccountMachine(RuleBasedStateMachine):
    """Grants never exceed the budget, and a release gives back exactly its grant."""

    def __init__(self) -> None:
        super().__init__()
        self.account = Account()
        self.granted: dict[str, int] = {}
        self.transients: dict[tuple[str, TransientKind], int] = {}
        self.pools: dict[str, KvAccount] = {}
        self.requests: dict[tuple[str, str], int] = {}

    @rule(name=NAMES, kv=BYTES, weights=BYTES, peak=BYTES, past=PAST)
    def grant(self, name: str, kv: int, weights: int, peak: int, past: PastErrors) -> None:
        if name in self.granted:
            return
        terms = MemoryTerms(
            weights_bytes=weights, kv_bytes=kv, compute_bytes=1, overhead_bytes=1,
            load_peak_bytes=peak,
        )  # fmt: skip
        asked = self.account.ask(terms, MACHINE, past=past)
        pool = KvAccount(POOL_TOKENS)
        try:
            answer = self.account.grant(name, terms, MACHINE, past=past, pool=pool)
            assert answer == asked
        except DoesNotFit:
            assert asked.verdict is Verdict.NO
            assert asked.short_bytes > 0
        else:
            assert asked.verdict is not Verdict.NO
            self.granted[name] = corrected(terms, past).total_bytes
            self.pools[name] = pool

    @rule(name=NAMES)
    def load(self, name: str) -> None:
        if name in self.granted:
            self.account.begin_load(name)
            self.account.end_load(name)

    @rule(name=NAMES)
    def release(self, name: str) -> None:
        before = self.account.charged_bytes
        self.account.release(name)
        self.requests = {k: v for k, v in self.requests.items() if k[0] != name}
        self.pools.pop(name, None)
        ended = [key for key in self.transients if key[0] == name]
        freed = self.granted.pop(name, 0) + sum(self.transients.pop(key) for key in ended)
        assert before - self.account.charged_bytes == freed

    @rule(name=NAMES, kind=st.sampled_from(TransientKind), num_bytes=BYTES)
    def reserve(self, name: str, kind: TransientKind, num_bytes: int) -> None:
        if name not in self.granted or (name, kind) in self.transients:
            return
        room = budget_of(MACHINE).tight.num_bytes - self.account.charged_bytes
        has_room = self.account.reserve(name, kind, num_bytes, MACHINE)
        assert has_room == (num_bytes <= room)
        if has_room:
            self.transients[name, kind] = num_bytes

    @rule(name=NAMES, kind=st.sampled_from(TransientKind))
    def release_transient(self, name: str, kind: TransientKind) -> None:
        self.account.release_transient(name, kind)
        self.transients.pop((name, kind), None)

    @rule(name=NAMES, request=NAMES, num_tokens=TOKENS)
    def admit(self, name: str, request: str, num_tokens: int) -> None:
        if name not in self.pools or (name, request) in self.requests:
            return
        self.pools[name].reserve(request, num_tokens)
        self.requests[name, request] = num_tokens

    @rule(name=NAMES, request=NAMES)
    def end(self, name: str, request: str) -> None:
        if name in self.pools:
            self.pools[name].release(request)
            self.requests.pop((name, request), None)

    @invariant()
    def within_budget(self) -> None:
        charged = sum(self.granted.values()) + sum(self.transients.values())
        assert self.account.charged_bytes == charged
        assert charged <= budget_of(MACHINE).tight.num_bytes
        assert sum(size for _, size in self.account.promises()) == charged

    @invariant()
    def requests_stay_within_their_pools(self) -> None:
        said = self.account.statement(MACHINE)
        assert said.kv_reserved_bytes <= said.kv_committed_bytes
        for line in said.entries:
            reserved = sum(v for (name, _), v in self.requests.items() if name == line.name)
            assert line.kv_reserved_tokens == min(reserved, line.kv_pool_tokens)


class AdmissionMachine(RuleBasedStateMachine):
    """However much other programs take and give back, what is admitted has its memory.

    A model's process grows by what its requests touch; it starts with its weights alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.others_bytes = 2 * 10**9
        self.account, self.pool = Account(), KvAccount(POOL_TOKENS)
        self.terms = MemoryTerms(
            weights_bytes=4 * 10**9, kv_bytes=8 * 10**9, compute_bytes=0, overhead_bytes=0
        )
        self.account.grant("a", self.terms, self.machine(), pool=self.pool)
        self.held_bytes = self.terms.weights_bytes
        self.account.reconcile("a", self.held_bytes)
        self.num_admitted = 0

    def machine(self) -> MachineSpec:
        return msgspec.structs.replace(MACHINE, others_bytes=self.others_bytes)

    @rule(others_bytes=st.integers(0, 20 * 10**9))
    def others_change(self, others_bytes: int) -> None:
        self.others_bytes = others_bytes

    @precondition(lambda self: self.pool.reserved_tokens < POOL_TOKENS)
    @rule(num_tokens=st.integers(1, POOL_TOKENS))
    def admit(self, num_tokens: int) -> None:
        if self.account.short_of_growth("a", num_tokens, self.machine()):
            return
        num_free = POOL_TOKENS - self.pool.reserved_tokens
        self.pool.reserve(str(self.num_admitted), num_tokens)
        self.num_admitted += 1
        # One that finds too few cells waits for others to end, and grows no further meanwhile.
        wanted = self.terms.kv_bytes * min(num_tokens, num_free) // POOL_TOKENS
        grown = min(self.terms.total_bytes, self.held_bytes + wanted)
        # It takes what it was admitted for, at once: that much was there, or it held it already.
        assert grown == self.held_bytes or grown <= budget_of(self.machine()).tight.num_bytes
        assert grown <= self.account.entry("a").charged_bytes
        self.held_bytes = grown
        self.account.reconcile("a", grown)

    @rule()
    def all_end(self) -> None:
        for number in range(self.num_admitted):
            self.pool.release(str(number))


class KvMachine(RuleBasedStateMachine):
    """However much is asked for, what counts as held is what was asked, and at most the pool."""

    def __init__(self) -> None:
        super().__init__()
        self.account = KvAccount(POOL_TOKENS)
        self.reserved: dict[str, int] = {}

    @rule(name=NAMES, num_tokens=TOKENS)
    def reserve(self, name: str, num_tokens: int) -> None:
        if name in self.reserved:
            return
        num_asked = sum(self.reserved.values())
        assert self.account.has_room_for(num_tokens) == (num_asked + num_tokens <= POOL_TOKENS)
        self.account.reserve(name, num_tokens)
        self.reserved[name] = num_tokens

    @rule(name=NAMES)
    def release(self, name: str) -> None:
        self.account.release(name)
        self.reserved.pop(name, None)

    @invariant()
    def within_pool(self) -> None:
        num_asked = sum(self.reserved.values())
        assert self.account.reserved_tokens == min(num_asked, POOL_TOKENS)


TestAccount = AccountMachine.TestCase
TestAdmission = AdmissionMachine.TestCase
TestKv = KvMachine.TestCase

ORDER = {Verdict.COMFORTABLE: 0, Verdict.TIGHT: 1, Verdict.NO: 2}


@given(
    terms=TERMS,
    name=st.sampled_from(MemoryTerms.__struct_fields__),
    more=BYTES,
    past=PAST,
    others=TERMS,
)
def test_more_asked_never_turns_no_into_yes(
    terms: MemoryTerms, name: str, more: int, past: PastErrors, others: MemoryTerms
) -> None:
    """Whatever term grows, whatever is known of past errors, the verdict gets no better."""
    account = Account()
    account.grant("other", others, MACHINE, force=True)
    larger = msgspec.structs.replace(terms, **{name: getattr(terms, name) + more})

    def ask(wanted: MemoryTerms) -> Grant:
        return account.ask(wanted, MACHINE, past=past)

    assert ORDER[ask(terms).verdict] <= ORDER[ask(larger).verdict]


@given(wishes=st.lists(st.tuples(NAMES, TERMS), max_size=6))
def test_what_several_wishes_are_promised_can_be_granted_in_that_order(
    wishes: list[tuple[str, MemoryTerms]],
) -> None:
    """A dry run of several says of each what granting them one by one does, and changes nothing."""
    account = Account()
    for (name, terms), (said_name, said) in zip(
        wishes, Account().ask_all(wishes, MACHINE), strict=True
    ):
        assert name == said_name
        if account.ask(terms, MACHINE, without=[name]).verdict is Verdict.NO:
            assert said.verdict is Verdict.NO
        else:
            account.release(name)
            assert account.grant(name, terms, MACHINE) == said
    assert account.charged_bytes <= budget_of(MACHINE).tight.num_bytes


@given(ratios=RATIOS, num_refused=st.integers(0, 1000))
def test_a_correction_is_bounded_and_fades(ratios: list[float], num_refused: int) -> None:
    """No history moves a term by more than the bound, and refusals only bring it nearer to one."""
    now, later = correction(ratios), correction(ratios, num_refused)
    assert 1 / MAX_CORRECTION <= now <= MAX_CORRECTION
    assert min(now, 1.0) <= later <= max(now, 1.0)
