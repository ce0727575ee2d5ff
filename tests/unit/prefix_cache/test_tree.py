"""The radix tree of prefixes."""

import numpy as np
from support.prefixes import ids

from brim.prefix_cache.tree import PrefixTree, common_length


def depths(tree: PrefixTree[str], tokens: list[int]) -> list[tuple[int, set[str]]]:
    return [(depth, set(node.covers)) for depth, node in tree.match(ids(tokens)).path]


def test_a_match_ends_where_prompts_part() -> None:
    """The match's length is the longest common prefix with anything in the tree."""
    tree: PrefixTree[str] = PrefixTree()
    tree.insert(ids([1, 2, 3, 4]), 0, "a")
    tree.insert(ids([1, 2, 5]), 0, "b")
    assert tree.match(ids([1, 2, 5, 6])).num_tokens == 3
    assert tree.match(ids([1, 2, 3, 9])).num_tokens == 3
    assert tree.match(ids([2])).num_tokens == 0
    assert tree.match(ids([])).num_tokens == 0


def test_a_match_knows_whether_the_tree_goes_on() -> None:
    """Inside an edge and before others' tokens it does, at the last token it does not."""
    tree: PrefixTree[str] = PrefixTree()
    tree.insert(ids([1, 2, 3]), 0, "a")
    tree.insert(ids([1, 2, 4]), 0, "b")
    assert tree.match(ids([1])).goes_on
    assert tree.match(ids([1, 2, 7])).goes_on
    assert not tree.match(ids([1, 2, 3, 4])).goes_on


def test_an_item_covers_its_own_part_alone() -> None:
    """A segment covers the edges from its start to its end, and no edge before."""
    tree: PrefixTree[str] = PrefixTree()
    tree.insert(ids([1, 2, 3, 4]), 0, "system")
    tree.insert(ids([1, 2, 8, 9]), 2, "branch")
    assert depths(tree, [1, 2, 8, 9]) == [(2, {"system"}), (4, {"branch"})]
    assert depths(tree, [1, 2, 3, 4]) == [(2, {"system"}), (4, {"system"})]


def test_what_is_removed_leaves_nothing() -> None:
    """When every item is out, the tree matches nothing, and others are left as they were."""
    tree: PrefixTree[str] = PrefixTree()
    prompts = {"a": [1, 2, 3], "b": [1, 2, 4, 5], "c": [1], "d": [6]}
    for name, tokens in prompts.items():
        tree.insert(ids(tokens), 0, name)
    tree.remove(ids(prompts["a"]), "a")
    assert tree.match(ids([1, 2, 3])).num_tokens == 2
    assert depths(tree, [1, 2, 4, 5])[-1] == (4, {"b"})
    for name in "bcd":
        tree.remove(ids(prompts[name]), name)
    assert tree.match(ids([1, 2, 4])).path == []
    assert tree.match(ids([6])).path == []
    tree.remove(ids([9, 9]), "a")


def test_arrays_of_different_lengths_have_a_common_length() -> None:
    """The shorter one bounds it, also where it is empty."""
    assert common_length(np.empty(0, np.int32), ids([1])) == 0
    assert common_length(ids([1, 2]), ids([1, 2, 3])) == 2
    assert common_length(ids([4, 2]), ids([1, 2, 3])) == 0
