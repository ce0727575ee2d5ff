"""Pools that are made smaller and larger, as the account sees them."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brim.core.machine import MachineSpec
from brim.core.memory import MemoryTerms
from brim.core.plan import Verdict
from brim.ledger.account import Account, pool_bytes
from brim.ledger.budget import Budget, Limit
from brim.ledger.kv import KvAccount

TERMS = MemoryTerms(weights_bytes=20, kv_bytes=80, compute_bytes=0, overhead_bytes=0)


@pytest.fixture
def account(machine: MachineSpec) -> Account:
    """One model of 100 bytes, most of it a pool of 8 tokens, where 120 are allowed."""
    limit = Limit(120, "a test")
    account = Account(lambda machine: Budget(comfortable=limit, tight=limit, reserve_bytes=0))
    account.grant("a", TERMS, machine, pool=KvAccount(8))
    return account


def test_a_smaller_pool_costs_less_and_the_whole_one_what_was_granted(account: Account) -> None:
    """Other terms stay, and what was planned is still known."""
    account.resize_pool("a", 2, 8)
    assert account.charged_bytes == 40
    assert account.entry("a").planned.kv_bytes == 80
    account.resize_pool("a", 8, 8)
    assert account.charged_bytes == 100


def test_what_was_measured_of_another_pool_no_longer_counts(account: Account) -> None:
    """Until the process is measured again it is charged what it was granted."""
    account.reconcile("a", 115)
    account.resize_pool("a", 4, 8)
    assert account.charged_bytes == 60


def test_a_trial_with_smaller_pools_changes_nothing(account: Account, machine: MachineSpec) -> None:
    """It says what would fit beside what is left, of an overrun too."""
    wish = msgspec.structs.replace(TERMS, kv_bytes=40)
    assert account.ask(wish, machine).verdict is Verdict.NO
    trial = account.trial_copy(kv_bytes={"a": 40, "gone": 1})
    assert trial.ask(wish, machine).verdict is Verdict.COMFORTABLE
    assert account.charged_bytes == 100
    account.reconcile("a", 110)
    assert account.trial_copy(kv_bytes={"a": 40}).charged_bytes == 70


@settings(max_examples=30)
@given(st.integers(0, 10**12), st.integers(1, 10**6), st.integers(1, 10**6))
def test_a_pool_is_never_charged_less_than_its_share(
    full_bytes: int, kv_tokens: int, plan_tokens: int
) -> None:
    """And by less than a byte more."""
    charged = pool_bytes(full_bytes, kv_tokens, plan_tokens) * plan_tokens
    assert 0 <= charged - full_bytes * kv_tokens < plan_tokens


def test_a_pool_knows_the_largest_request_in_it() -> None:
    """It may be made that small, and grow again."""
    pool = KvAccount(100)
    assert pool.largest_bound == 0
    pool.reserve("short", 10)
    pool.reserve("long", 60)
    pool.resize(60)
    assert (pool.largest_bound, pool.reserved_tokens) == (60, 60)
    pool.release("long")
    assert pool.largest_bound == 10
    pool.resize(100)
    assert pool.has_room_for(90)
