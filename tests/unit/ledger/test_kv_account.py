"""A model's KV pool, granted by the token."""

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
