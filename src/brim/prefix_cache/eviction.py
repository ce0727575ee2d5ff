"""Which entries go first; pure.

An entry is worth the prefill it saves for each byte, halved for every day without use.  One that
another continues stays until that one is gone.
"""

import heapq
import math
from collections.abc import Callable, Collection, Iterable, Sequence

import msgspec

HALF_LIFE_S = 24 * 3600.0
"""Who comes back to a conversation mostly does within a day."""

DOUBLING_TOKENS = 3000
"""Depth at which attention costs as much as the rest of a token, so that deep tokens save more:
from 217 tok/s over 512 tokens and 191 over 1,405 of a 1.24 B model on two CPU cores."""


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """One entry, as far as its worth goes."""

    directory: str
    """Of its model, within the cache's."""
    key: str
    parent: str
    namespace: str
    model_name: str
    model_paths: tuple[str, ...]
    model_bytes: int
    """Of the model's files: what reading a token anew costs grows with them."""
    start: int
    end: int
    num_bytes: int
    used_unix_s: float
    """When it was written or last restored."""

    @property
    def place(self) -> tuple[str, str]:
        """What tells it from all entries of all models."""
        return self.directory, self.key


def saved_cost(kept: Kept) -> float:
    """Cost of reading the entry's tokens anew, in bytes of weights that go through the machine.

    Example:
        >>> deep = Kept(directory="", key="", parent="", namespace="", model_name="", num_bytes=1,
        ...     model_paths=(), model_bytes=10, start=2900, end=3100, used_unix_s=0)
        >>> saved_cost(deep)
        4000.0
    """
    depth = (kept.start + kept.end) / 2
    return max(kept.model_bytes, 1) * (kept.end - kept.start) * (1 + depth / DOUBLING_TOKENS)


def value(kept: Kept, now_s: float) -> float:
    """Worth of an entry's byte."""
    age_s = max(0.0, now_s - kept.used_unix_s)
    return saved_cost(kept) / kept.num_bytes * math.exp2(-age_s / HALF_LIFE_S)


def choose(
    entries: Sequence[Kept],
    num_bytes: int,
    now_s: float,
    *,
    protected: Collection[tuple[str, str]] = (),
    is_stale: Callable[[Kept], bool] = lambda kept: False,
) -> list[Kept]:
    """Entries to remove, in order, so that at least `num_bytes` become free, or all that can go.

    Args:
        entries: All that are there, of all models.
        num_bytes: How much is wanted.
        now_s: Seconds since 1970.
        protected: Places of entries that must stay; those that they continue stay with them.
        is_stale: Whether an entry can hardly be used again: such ones go first.
    """
    by_place = {each.place: each for each in entries}
    num_children = dict.fromkeys(by_place, 0)
    for each in entries:
        if (up := (each.directory, each.parent)) in num_children:
            num_children[up] += 1
    kept_back = _with_ancestors(protected, by_place)

    def ranked(each: Kept) -> tuple[bool, float, tuple[str, str]]:
        return not (is_orphan(each, by_place) or is_stale(each)), value(each, now_s), each.place

    leaves = [
        ranked(each)
        for each in entries
        if not num_children[each.place] and each.place not in kept_back
    ]
    heapq.heapify(leaves)
    chosen, freed = [], 0
    while leaves and freed < num_bytes:
        each = by_place[heapq.heappop(leaves)[2]]
        chosen.append(each)
        freed += each.num_bytes
        if (up := (each.directory, each.parent)) in num_children:
            num_children[up] -= 1
            if not num_children[up] and up not in kept_back:
                heapq.heappush(leaves, ranked(by_place[up]))
    return chosen


def is_orphan(kept: Kept, places: Collection[tuple[str, str]]) -> bool:
    """Whether the entry continues one that is not there: nothing can restore it."""
    return bool(kept.parent) and (kept.directory, kept.parent) not in places


def orphans(entries: Iterable[Kept]) -> list[Kept]:
    """Entries whose chain is broken somewhere, deepest last."""
    alive: dict[tuple[str, str], Kept] = {}
    broken = []
    # A parent starts before its child, so that one pass in that order sees parents first.
    for each in sorted(entries, key=lambda kept: kept.start):
        if is_orphan(each, alive):
            broken.append(each)
        else:
            alive[each.place] = each
    return broken


def _with_ancestors(
    places: Collection[tuple[str, str]], by_place: dict[tuple[str, str], Kept]
) -> set[tuple[str, str]]:
    found: set[tuple[str, str]] = set()
    for place in places:
        at: tuple[str, str] | None = place
        while at is not None and at in by_place and at not in found:
            found.add(at)
            each = by_place[at]
            at = (each.directory, each.parent) if each.parent else None
    return found
