"""The store against a plain list of prefixes, over any order of writes, finds, losses and restarts.

On the toy engine's real blocks: what is restored must go on as if it had been read anew.
"""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support.prefixes import Clock, Filler, ids, options_at

from brim.core.cache import MissReason
from brim.prefix_cache.index import MIN_SHARED_TOKENS
from brim.prefix_cache.store import Model, PrefixCache
from brim.prefix_cache.tree import PrefixTree

TURNS = st.lists(st.integers(0, 3), min_size=1, max_size=5)
"""A prompt is a list of turns of 24 tokens, so that random ones share prefixes."""

NAMESPACES = st.sampled_from(["", "app"])
MODEL = Model(name="toy", paths=(), identity="toy")
ENTRY_BYTES = 18_000
"""A little more than one of the entries here takes."""


def prompt(turns: list[int], cut: int = 0) -> list[int]:
    """Tokens of some turns, without the last `cut`."""
    tokens = [(turn * 31 + i * (turn + 2)) % 250 for turn in turns for i in range(24)]
    return tokens[: max(1, len(tokens) - cut)]


def common(left: list[int], right: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b),
                min(len(left), len(right)))  # fmt: skip


class StoreMachine(RuleBasedStateMachine):
    """Nothing that was not written is found, and all that was is, unless bounds or damage took it.

    The model knows every prefix that was ever kept; `may_lack` says whether some may be gone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="brim-test-cache-"))
        self.toy, self.clock = Filler(), Clock()
        self.kept: dict[str, list[list[int]]] = {"": [], "app": []}
        self.may_lack = self.was_damaged = False
        self.budget_bytes = 10**9

    @initialize(can_cut=st.booleans(), can_export_range=st.booleans())
    def begin(self, can_cut: bool, can_export_range: bool) -> None:
        self.can_cut, self.can_export_range = can_cut, can_export_range
        self.cache = self.open()

    def open(self) -> PrefixCache:
        return PrefixCache(
            options_at(self.root / "c", budget_bytes=self.budget_bytes),
            MODEL,
            can_cut=self.can_cut,
            can_export_range=self.can_export_range,
            clock=self.clock,
        )

    def restorable(self, namespace: str, tokens: list[int]) -> int:
        """What the list of kept prefixes says can be restored."""
        if self.can_cut:
            return max((common(each, tokens) for each in self.kept[namespace]), default=0)
        return max(
            (len(each) for each in self.kept[namespace] if each == tokens[: len(each)]), default=0
        )

    @rule(turns=TURNS, cut=st.integers(0, 23), namespace=NAMESPACES)
    def write(self, turns: list[int], cut: int, namespace: str) -> None:
        tokens = prompt(turns, cut)
        self.clock.now_s += 1
        num_stored = self.cache.stored(namespace, ids(tokens))
        if not self.may_lack:
            known = self.restorable(namespace, tokens)
            is_whole = not (self.can_cut and self.can_export_range)
            assert num_stored == (known if known == len(tokens) or not is_whole else 0)
        is_kept = self.toy.keep(self.cache, tokens, namespace=namespace)
        assert is_kept == (num_stored < len(tokens) and len(tokens) >= 4)
        if is_kept:
            self.kept[namespace].append(tokens)
        if self.budget_bytes < 10**9:
            self.cache.flush()
            self.may_lack = True

    @rule(turns=TURNS, cut=st.integers(0, 23), namespace=NAMESPACES)
    def find(self, turns: list[int], cut: int, namespace: str) -> None:
        tokens = prompt(turns, cut)
        self.cache.flush()
        known = self.restorable(namespace, tokens)
        num_tokens = self.toy.assert_restores(self.cache, tokens, namespace)
        found = self.cache.find(namespace, ids(tokens))
        assert num_tokens <= known
        if not self.may_lack:
            # Fewer than four tokens are less than the store was told to restore.
            assert num_tokens == (known if known >= min(4, len(tokens)) else 0)
        assert (found.miss is None) == (found.num_tokens == len(tokens))
        if found.miss is MissReason.DIVERGES:
            assert MIN_SHARED_TOKENS <= found.diverges_at < len(tokens)
            assert any(common(each, tokens) == found.diverges_at for each in self.kept[namespace])

    @rule(turns=TURNS, held=st.integers(0, 60), namespace=NAMESPACES)
    def find_beside_memory(self, turns: list[int], held: int, namespace: str) -> None:
        """Segments join: each begins within what is there before it."""
        tokens = prompt(turns)
        held = min(held, len(tokens)) if self.can_cut else 0
        self.cache.flush()
        found = self.cache.find(namespace, ids(tokens), held)
        assert found.num_tokens >= held
        there = held
        for segment in found.segments:
            assert segment.start <= there
            there = segment.end
        if found.segments:
            assert held < found.num_tokens <= there

    @rule()
    def restart(self) -> None:
        self.cache.close()
        self.cache = self.open()

    @rule(num_entries=st.integers(1, 6))
    def restart_with_a_budget(self, num_entries: int) -> None:
        self.cache.close()
        self.budget_bytes = num_entries * ENTRY_BYTES
        self.may_lack = True
        self.cache = self.open()

    @rule(which=st.integers(0, 10**6), at=st.integers(0, 10**6), is_cut=st.booleans())
    def damage(self, which: int, at: int, is_cut: bool) -> None:
        self.cache.flush()
        paths = [path for path in (self.root / "c").glob("*/*.kv") if path.stat().st_size]
        if not paths:
            return
        paths.sort()
        path = paths[which % len(paths)]
        data = bytearray(path.read_bytes())
        if is_cut:
            os.truncate(path, at % len(data))
        else:
            data[at % len(data)] ^= 1 << (which % 8)
            path.write_bytes(data)
        self.may_lack = self.was_damaged = True

    @invariant()
    def bounds_hold(self) -> None:
        if not hasattr(self, "cache"):
            return
        sizes = []
        for path in (self.root / "c").glob("*/*.kv"):
            # The other thread removes what was damaged, or what a longer entry replaced.
            with contextlib.suppress(FileNotFoundError):
                sizes.append(path.stat().st_size)
        assert sum(sizes) <= self.budget_bytes
        # A file that was damaged from outside counts until it is looked at.
        assert self.was_damaged or self.cache.stats().entry_bytes <= self.budget_bytes

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            self.cache.close()
        shutil.rmtree(self.root)


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)

PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), max_size=12)


@given(prompts=PROMPTS, asked=st.lists(st.integers(0, 2), max_size=9), data=st.data())
def test_a_tree_is_the_longest_common_prefix(
    prompts: list[list[int]], asked: list[int], data: st.DataObject
) -> None:
    """Over any insertions and removals a match is what comparing with every prompt gives."""
    tree: PrefixTree[int] = PrefixTree()
    for number, tokens in enumerate(prompts):
        tree.insert(ids(tokens), 0, number)
    gone = data.draw(st.sets(st.sampled_from(range(len(prompts))))) if prompts else set()
    for number in gone:
        tree.remove(ids(prompts[number]), number)
    left = {number: each for number, each in enumerate(prompts) if number not in gone}
    match = tree.match(ids(asked))
    assert match.num_tokens == max((common(each, asked) for each in left.values()), default=0)
    for depth, node in match.path:
        reached = min(depth, match.num_tokens)
        covering = {n for n, each in left.items() if each[:reached] == asked[:reached]
                    and len(each) >= depth}  # fmt: skip
        assert set(node.covers) <= covering
        if depth <= match.num_tokens:
            assert set(node.covers) == covering
            assert set(node.ends) == {n for n in covering if len(left[n]) == depth}
