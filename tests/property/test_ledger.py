"""The ledger under any order of grants and releases."""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from brim.core.machine import MachineSpec
from brim.core.memory import MemoryTerms
from brim.core.plan import Verdict
from brim.errors import DoesNotFit
from brim.ledger.account import Account
from brim.ledger.budget import budget_of
from brim.ledger.kv import KvAccount

NAMES = st.sampled_from("abcdef")
BYTES = st.integers(0, 12 * 10**9)
TOKENS = st.integers(0, 1000)


class AccountMachine(RuleBasedStateMachine):
    """Grants never exceed the budget, and a release gives back exactly its grant."""

    def __init__(self) -> None:
        super().__init__()
        self.account = Account()
        self.granted: dict[str, int] = {}
        self.machine = MachineSpec(
            name="m", system="linux", ram_bytes=20 * 10**9, others_bytes=4 * 10**9,
            gpu_limit_bytes=14 * 10**9,
        )  # fmt: skip

    @rule(name=NAMES, kv=BYTES, weights=BYTES)
    def grant(self, name: str, kv: int, weights: int) -> None:
        if name in self.granted:
            return
        terms = MemoryTerms(weights_bytes=weights, kv_bytes=kv, compute_bytes=1, overhead_bytes=1)
        asked = self.account.ask(terms, self.machine)
        try:
            assert self.account.grant(name, terms, self.machine) == asked
        except DoesNotFit:
            assert asked.verdict is Verdict.NO
            assert asked.short_bytes > 0
        else:
            assert asked.verdict is not Verdict.NO
            self.granted[name] = terms.total_bytes

    @rule(name=NAMES)
    def release(self, name: str) -> None:
        before = self.account.charged_bytes
        self.account.release(name)
        assert before - self.account.charged_bytes == self.granted.pop(name, 0)

    @invariant()
    def within_budget(self) -> None:
        assert self.account.charged_bytes == sum(self.granted.values())
        assert self.account.charged_bytes <= budget_of(self.machine).tight.num_bytes


class KvMachine(RuleBasedStateMachine):
    """Reservations never exceed the pool, and refusals change nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.account = KvAccount(1000)
        self.reserved: dict[str, int] = {}

    @rule(name=NAMES, num_tokens=TOKENS)
    def reserve(self, name: str, num_tokens: int) -> None:
        if name in self.reserved:
            return
        room = 1000 - sum(self.reserved.values())
        granted = self.account.reserve(name, num_tokens)
        assert granted == (num_tokens <= room)
        if granted:
            self.reserved[name] = num_tokens

    @rule(name=NAMES)
    def release(self, name: str) -> None:
        self.account.release(name)
        self.reserved.pop(name, None)

    @invariant()
    def within_pool(self) -> None:
        assert self.account.reserved_tokens == sum(self.reserved.values()) <= 1000
        assert self.account.free_tokens == 1000 - self.account.reserved_tokens


TestAccount = AccountMachine.TestCase
TestKv = KvMachine.TestCase
