"""Which entries go first."""

from typing import Any

import msgspec

from brim.prefix_cache.eviction import HALF_LIFE_S, Kept, choose, orphans, value

NOW_S = 1_800_000_000.0


def kept(key: str, **changes: Any) -> Kept:
    entry = Kept(
        directory="m", key=key, parent="", namespace="", model_name="demo", model_paths=(),
        model_bytes=10**9, start=0, end=1000, num_bytes=1000, used_unix_s=NOW_S,
    )  # fmt: skip
    return msgspec.structs.replace(entry, **changes)


def keys(entries: list[Kept]) -> str:
    return "".join(entry.key for entry in entries)


def test_nothing_goes_for_nothing() -> None:
    """Where no byte is wanted, every entry stays; where more is wanted than there is, all go."""
    entries = [kept("a"), kept("b")]
    assert choose(entries, 0, NOW_S) == []
    assert len(choose(entries, 10**9, NOW_S)) == 2


def test_the_longest_unused_goes_first() -> None:
    """Of equal entries the one that was used longest ago goes, and only as many as are needed."""
    entries = [kept("a", used_unix_s=NOW_S - 9), kept("b", used_unix_s=NOW_S - 10), kept("c")]
    assert keys(choose(entries, 1000, NOW_S)) == "b"
    assert keys(choose(entries, 1001, NOW_S)) == "ba"


def test_worth_is_prefill_saved_for_each_byte() -> None:
    """Deep tokens, dense entries and slow models are worth more, age halves it, use renews it."""
    plain = value(kept("a"), NOW_S)
    assert value(kept("a", start=9000, end=10_000), NOW_S) > 3 * plain
    assert value(kept("a", num_bytes=4000), NOW_S) == plain / 4
    assert value(kept("a", model_bytes=8 * 10**9), NOW_S) == plain * 8
    assert value(kept("a", used_unix_s=NOW_S - HALF_LIFE_S), NOW_S) == plain / 2
    assert value(kept("a", used_unix_s=NOW_S + 60), NOW_S) == plain


def test_leaves_go_before_what_they_continue() -> None:
    """However old, a segment stays until those that build upon it have gone."""
    entries = [
        kept("a", used_unix_s=0.0),
        kept("b", parent="a", start=1000, end=2000, used_unix_s=NOW_S - 5),
        kept("c", parent="b", start=2000, end=3000),
        kept("d", parent="b", start=2000, end=3000),
    ]
    assert keys(choose(entries, 10**9, NOW_S)) in ("cdba", "dcba")
    assert set(keys(choose(entries, 2000, NOW_S))) == {"c", "d"}


def test_what_is_protected_stays_with_all_before_it() -> None:
    """The chain that a new entry continues is not touched, even where room stays short."""
    entries = [
        kept("a"),
        kept("b", parent="a", start=1000, end=2000),
        kept("c", parent="b", start=2000, end=3000),
        kept("x"),
    ]
    assert set(keys(choose(entries, 10**9, NOW_S, protected=[("m", "b")]))) == {"c", "x"}
    assert keys(choose(entries, 10**9, NOW_S, protected=[("m", "gone")]))[0] in "cx"


def test_stale_and_broken_entries_go_first() -> None:
    """What can hardly be used again goes before any entry that can, whatever it is worth."""
    entries = [
        kept("a", used_unix_s=NOW_S - 10 * HALF_LIFE_S),
        kept("s", model_name="removed", model_bytes=10**12),
        kept("o", parent="gone", start=1000, end=9000),
    ]
    chosen = choose(entries, 2000, NOW_S, is_stale=lambda each: each.model_name == "removed")
    assert set(keys(chosen)) == {"s", "o"}


def test_models_do_not_mix() -> None:
    """An entry of one model is no parent of another's, even under the same key."""
    entries = [kept("a"), kept("b", directory="n", parent="a", start=1000, end=2000)]
    assert keys(orphans(entries)) == "b"
    assert keys(choose(entries, 1000, NOW_S)) == "b"


def test_broken_chains_are_found_whole() -> None:
    """Everything behind a missing segment is an orphan, and nothing else is."""
    entries = [
        kept("c", parent="b", start=2000, end=3000),
        kept("b", parent="gone", start=1000, end=2000),
        kept("x"),
        kept("y", parent="x", start=500, end=600),
    ]
    assert keys(orphans(entries)) == "bc"
