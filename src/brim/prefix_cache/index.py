"""The segments of one model in memory: which of them restore the longest prefix of a prompt.

Made from the files' headers and owned by one thread; nothing here touches the disk.
"""

import itertools

import numpy as np

from brim.core.cache import MissReason, owner_of
from brim.prefix_cache.format import Header, Tokens, prefix_hash
from brim.prefix_cache.segment import Lookup, Segment
from brim.prefix_cache.tree import Match, PrefixTree

MIN_GAIN_TOKENS = 16
"""One tile of prefill rows, as cheap as one row: reading a file for less is dearer."""

MIN_SHARED_TOKENS = 8
"""A begin token and the head of a first turn are common to unrelated prompts: not a divergence."""

MAX_COMPARED = 16
"""Entries that cover one place, of which the chain with the fewest bytes is taken: one program
makes one or two of them, and a look-up must not grow with what many programs did."""

MAX_DAMAGED = 256
"""Prefixes remembered as damaged; each was an event, and they explain misses and nothing else."""


class Entry:
    """A segment with its place in the chain."""

    __slots__ = ("children", "is_pending", "parent", "segment")

    def __init__(self, segment: Segment, parent: "Entry | None", is_pending: bool) -> None:
        self.segment, self.parent, self.is_pending = segment, parent, is_pending
        """A pending segment is still on its way to the disk."""
        self.children: set[Entry] = set()

    def chain(self) -> "list[Entry]":
        """The entries that make up the prefix, from its start."""
        found: list[Entry] = [self]
        while (parent := found[-1].parent) is not None:
            found.append(parent)
        return found[::-1]

    def prefix(self) -> Tokens:
        """All tokens up to the segment's end."""
        chain = self.chain()
        parts = [
            each.segment.tokens[: following.segment.start - each.segment.start]
            for each, following in itertools.pairwise(chain)
        ]
        return np.concatenate([*parts, self.segment.tokens])


class Index:
    """Segments by their prefixes, one tree for each namespace.

    Args:
        can_cut: A segment can be cut to any length once it is restored.
        min_gain_tokens: Look-ups that would restore fewer tokens find nothing.
    """

    def __init__(self, *, can_cut: bool, min_gain_tokens: int = MIN_GAIN_TOKENS) -> None:
        self._can_cut = can_cut
        self._min_gain_tokens = min_gain_tokens
        self._entries: dict[str, Entry] = {}
        self._trees: dict[str, PrefixTree[Entry]] = {}
        self._changed: dict[str, PrefixTree[str]] = {}
        self._damaged: dict[str, PrefixTree[str]] = {}
        self._num_damaged = 0
        self.num_bytes = 0
        """Of all files that are on the disk."""
        self.num_entries = 0

    # --- entries -------------------------------------------------------------------------------

    def keys(self) -> set[str]:
        """Keys of the entries that are on the disk."""
        return {key for key, entry in self._entries.items() if not entry.is_pending}

    def add(self, header: Header, path: str, *, is_pending: bool = False) -> bool:
        """Take a segment in; False where it does not continue what its header says it does."""
        key = header.key
        if known := self._entries.get(key):
            if not is_pending:
                self._set_on_disk(known)
            return True
        parent = self._entries.get(header.parent) if header.parent else None
        if not _continues(header, parent):
            return False
        segment = Segment(
            path=path,
            key=key,
            parent=header.parent,
            namespace=header.namespace,
            start=header.start,
            end=header.end,
            tokens=header.tokens,
            num_bytes=header.num_bytes,
        )
        entry = Entry(segment, parent, is_pending=True)
        prefix = entry.prefix()
        if prefix_hash(prefix) != header.end_hash:
            return False
        self._entries[key] = entry
        if parent is not None:
            parent.children.add(entry)
        tree = self._trees.setdefault(header.namespace, PrefixTree())
        tree.insert(prefix, header.start, entry)
        if not is_pending:
            self._set_on_disk(entry)
        return True

    def add_other(self, header: Header) -> None:
        """Note a segment of the same model in another form: it explains misses."""
        if header.start == 0:
            tree = self._changed.setdefault(header.namespace, PrefixTree())
            tree.insert(header.tokens, 0, header.key)

    def set_on_disk(self, key: str) -> bool:
        """A pending segment has arrived; False where it is not known any more."""
        if entry := self._entries.get(key):
            self._set_on_disk(entry)
        return entry is not None

    def is_pending(self, key: str) -> bool:
        """Whether a segment is still on its way to the disk."""
        entry = self._entries.get(key)
        return entry is not None and entry.is_pending

    def remove(self, key: str, *, is_damaged: bool = False) -> list[Segment]:
        """Take a segment out, with all that continue it; gives what was taken out."""
        entry = self._entries.get(key)
        if entry is None:
            return []
        if is_damaged:
            self._remember_damaged(entry)
        removed, waiting = [], [entry]
        while waiting:
            each = waiting.pop()
            waiting += each.children
            removed.append(each)
        # Deepest first: the prefix of a segment is found through its parents.
        for each in reversed(removed):
            self._take_out(each)
        return [each.segment for each in removed]

    def _set_on_disk(self, entry: Entry) -> None:
        if entry.is_pending:
            entry.is_pending = False
            self.num_bytes += entry.segment.num_bytes
            self.num_entries += 1

    def _take_out(self, entry: Entry) -> None:
        segment = entry.segment
        self._trees[segment.namespace].remove(entry.prefix(), entry)
        del self._entries[segment.key]
        if entry.parent is not None:
            entry.parent.children.discard(entry)
        if not entry.is_pending:
            self.num_bytes -= segment.num_bytes
            self.num_entries -= 1

    def _remember_damaged(self, entry: Entry) -> None:
        if self._num_damaged >= MAX_DAMAGED:
            self._damaged.clear()
            self._num_damaged = 0
        tree = self._damaged.setdefault(entry.segment.namespace, PrefixTree())
        tree.insert(entry.prefix(), 0, entry.segment.key)
        self._num_damaged += 1

    # --- look-ups ------------------------------------------------------------------------------

    def find(self, namespace: str, tokens: Tokens, num_held: int) -> Lookup:
        """The longest prefix that can be restored, given what is in memory already."""
        match = self._match(namespace, tokens)
        best, num_tokens = self._deepest(match)
        least = num_held + min(self._min_gain_tokens, len(tokens) - num_held)
        if best is None or num_tokens < max(least, num_held + 1):
            best, num_tokens = None, num_held
        miss, diverges_at = self._miss(namespace, tokens, match, num_tokens)
        return Lookup(
            segments=() if best is None else _needed(best, num_held),
            num_tokens=num_tokens,
            miss=miss,
            diverges_at=diverges_at,
        )

    def stored(self, namespace: str, tokens: Tokens) -> tuple[int, Entry | None]:
        """Length of the longest prefix that is or is about to be on the disk, and whose it is."""
        match = self._match(namespace, tokens)
        best, num_tokens = self._deepest(match, with_pending=True)
        return num_tokens, best

    def prefixes_of(self, namespace: str, tokens: Tokens) -> list[str]:
        """Keys of whole entries that one of `tokens` makes superfluous: it can be cut to them."""
        if not self._can_cut:
            return []
        match = self._match(namespace, tokens)
        return [
            entry.segment.key
            for depth, node in match.path
            if depth <= match.num_tokens
            for entry in node.ends
            if entry.segment.start == 0 and not entry.children and not entry.is_pending
        ]

    def _match(self, namespace: str, tokens: Tokens) -> Match[Entry]:
        tree = self._trees.get(namespace)
        return Match(0, [], False) if tree is None else tree.match(tokens)

    def _deepest(
        self, match: Match[Entry], *, with_pending: bool = False
    ) -> tuple[Entry | None, int]:
        """The entry that restores most of a match, and how much."""
        for depth, node in reversed(match.path):
            is_whole = depth <= match.num_tokens
            if not self._can_cut and not is_whole:
                continue
            candidates = node.covers if self._can_cut else node.ends
            usable = (each for each in candidates if with_pending or not each.is_pending)
            compared = list(itertools.islice(usable, MAX_COMPARED))
            if compared:
                best = min(compared, key=_chain_bytes)
                return best, min(depth, match.num_tokens)
        return None, 0

    def _miss(
        self, namespace: str, tokens: Tokens, match: Match[Entry], num_there: int
    ) -> tuple[MissReason | None, int]:
        """Why no more than `num_there` tokens, and where the next entry differs."""
        if num_there >= len(tokens):
            return None, 0
        more = max(num_there, match.num_tokens) + MIN_SHARED_TOKENS
        if _shared(self._damaged.get(namespace), tokens) > num_there:
            return MissReason.DAMAGED, 0
        # Of other owners nothing is said: who extends a guess until the reason changes would read
        # their prompts token by token.
        if any(
            tree.match(tokens).num_tokens >= more
            for name, tree in self._trees.items()
            if name != namespace and owner_of(name) == owner_of(namespace)
        ):
            return MissReason.NOT_SHAREABLE, 0
        if _shared(self._changed.get(namespace), tokens) >= more:
            return MissReason.MODEL_CHANGED, 0
        differs = match.goes_on and match.num_tokens < len(tokens)
        if differs and match.num_tokens >= max(num_there, MIN_SHARED_TOKENS):
            return MissReason.DIVERGES, match.num_tokens
        return MissReason.NO_ENTRY, 0


def _continues(header: Header, parent: Entry | None) -> bool:
    """Whether a segment stands where its header says: behind its parent's first tokens."""
    if header.start == 0:
        return True
    if parent is None or parent.segment.namespace != header.namespace:
        return False
    if not parent.segment.start < header.start <= parent.segment.end:
        return False
    before = parent.prefix()[: header.start]
    return prefix_hash(before) == header.start_hash


def _needed(entry: Entry, num_held: int) -> tuple[Segment, ...]:
    """Those of a chain that add to what is held: each counts up to where the next one starts."""
    chain = [each.segment for each in entry.chain()]
    ends = [following.start for following in chain[1:]] + [entry.segment.end]
    return tuple(segment for segment, end in zip(chain, ends, strict=True) if end > num_held)


def _chain_bytes(entry: Entry) -> int:
    return sum(each.segment.num_bytes for each in entry.chain())


def _shared(tree: PrefixTree[str] | None, tokens: Tokens) -> int:
    return 0 if tree is None else tree.match(tokens).num_tokens
