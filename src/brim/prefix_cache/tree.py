"""A radix tree over tokens: which items cover the longest known prefix of a prompt.

An item covers tokens [start, end) of a prefix; its chain's other items cover what stands before.
Edges hold arrays, so that a walk compares tokens in numpy and costs by branches, not by tokens.
"""

from typing import Generic, TypeVar

import msgspec
import numpy as np

from brim.prefix_cache.format import Tokens

T = TypeVar("T")


class Node(Generic[T]):
    """An edge with the tokens on it, and what lies behind."""

    __slots__ = ("children", "covers", "ends", "tokens")

    def __init__(self, tokens: Tokens) -> None:
        self.tokens = tokens
        self.children: dict[int, Node[T]] = {}
        self.covers: dict[T, None] = {}
        """Items that cover all of the edge, in the order in which they came."""
        self.ends: dict[T, None] = {}
        """Those of them that end with it."""


class Match(msgspec.Struct, Generic[T], frozen=True):
    """How far a prompt was followed."""

    num_tokens: int
    """Longest prefix of the prompt that the tree has."""
    path: list[tuple[int, Node[T]]]
    """Nodes that were entered, each with the depth behind its last token; the last node may be
    matched in part only."""
    goes_on: bool
    """Whether the tree goes on behind the match: with other tokens, where the prompt does too."""


class PrefixTree(Generic[T]):
    """Items by the prefixes that they cover."""

    def __init__(self) -> None:
        self._root: Node[T] = Node(np.empty(0, np.int32))

    def match(self, tokens: Tokens) -> Match[T]:
        """Follow a prompt as far as the tree goes."""
        node, depth, path = self._root, 0, []
        while depth < len(tokens):
            child = node.children.get(int(tokens[depth]))
            if child is None:
                break
            shared = common_length(child.tokens, tokens[depth:])
            path.append((depth + len(child.tokens), child))
            node, depth = child, depth + shared
            if shared < len(child.tokens):
                return Match(depth, path, True)
        return Match(depth, path, bool(node.children))

    def insert(self, tokens: Tokens, start: int, item: T) -> None:
        """Let `item` cover tokens [start, len(tokens)) of a prefix.

        Args:
            tokens: The whole prefix, which the tree has up to `start`.
            start: Where the item begins.
            item: Hashed by identity.
        """
        node, depth = self._root, 0
        while depth < len(tokens):
            child = node.children.get(int(tokens[depth]))
            if child is None:
                # A copy: a view would keep the tokens of the whole prefix in memory.
                child = Node(tokens[depth:].copy())
                node.children[int(tokens[depth])] = child
            shared = common_length(child.tokens, tokens[depth:])
            if depth < start:
                shared = min(shared, start - depth)
            if shared < len(child.tokens):
                _split(child, shared)
            node, depth = child, depth + shared
            if depth > start:
                node.covers[item] = None
        node.ends[item] = None

    def remove(self, tokens: Tokens, item: T) -> None:
        """Take `item`, inserted with the same tokens, out; edges that nothing covers go."""
        node, depth, parents = self._root, 0, []
        while depth < len(tokens):
            child = node.children.get(int(tokens[depth]))
            if child is None:
                break
            parents.append((node, int(tokens[depth])))
            node, depth = child, depth + len(child.tokens)
            node.covers.pop(item, None)
            node.ends.pop(item, None)
        for parent, token in reversed(parents):
            child = parent.children[token]
            if child.covers or child.children:
                break
            del parent.children[token]


def common_length(left: Tokens, right: Tokens) -> int:
    """Length of the longest common prefix of two arrays.

    Example:
        >>> common_length(np.array([1, 2, 3], np.int32), np.array([1, 2, 4, 5], np.int32))
        2
    """
    length = min(len(left), len(right))
    differs = left[:length] != right[:length]
    first = int(differs.argmax()) if length else 0
    return first if length and differs[first] else length


def _split(node: Node[T], length: int) -> None:
    """Cut an edge in two; the node keeps the first part."""
    rest: Node[T] = Node(node.tokens[length:])
    rest.children, rest.ends = node.children, node.ends
    rest.covers = dict(node.covers)
    node.tokens = node.tokens[:length]
    node.children, node.ends = {int(rest.tokens[0]): rest}, {}
