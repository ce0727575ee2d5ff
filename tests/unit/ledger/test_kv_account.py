"""What admitted requests may need of a model's KV pool, by the token."""

from brim.ledger.kv import KvAccount


def test_bounds_beyond_the_pool_reserve_all_of_it() -> None:
    """Requests that wait in the worker are counted, and the pool is the most that they can hold."""
    account = KvAccount(100)
    account.reserve("a", 60)
    assert account.has_room_for(40)
    assert not account.has_room_for(41)
    account.reserve("b", 70)
    assert account.reserved_tokens == 100
    account.release("a")
    assert account.reserved_tokens == 70


def test_release_is_exact() -> None:
    """A released request gives back what it reserved, once."""
    account = KvAccount(100)
    account.reserve("a", 60)
    account.reserve("b", 10)
    account.release("a")
    account.release("a")
    assert account.reserved_tokens == 10
    assert account.has_room_for(90)
