"""A model's KV pool, granted by the token."""

import pytest

from brim.errors import DoesNotFit
from brim.ledger.kv import KvAccount


def test_reservations_fill_the_pool_and_no_more() -> None:
    """What is free is granted to the last token; one more is not granted now."""
    account = KvAccount(100)
    assert account.reserve("a", 60)
    assert not account.reserve("b", 41)
    assert account.reserve("b", 40)
    assert (account.reserved_tokens, account.free_tokens) == (100, 0)


def test_release_is_exact() -> None:
    """A released request gives back what it reserved, once."""
    account = KvAccount(100)
    account.reserve("a", 60)
    account.reserve("b", 10)
    account.release("a")
    account.release("a")
    assert account.free_tokens == 90


def test_what_never_fits_is_refused_for_good() -> None:
    """More than the whole pool is an error with both numbers, not a 'later'."""
    account = KvAccount(100)
    with pytest.raises(DoesNotFit, match="needs 101 tokens of KV, the model's pool has 100"):
        account.reserve("a", 101)
    assert account.free_tokens == 100
