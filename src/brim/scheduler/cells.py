"""Counts the cells of the KV pool exactly: forks share them, so lengths do not add up.

A sequence is a path of spans from the root.  A fork shares the spans of what it copies; a span that
several sequences hold is never grown or cut, only split, so that each path ends where a span does.
"""

from collections.abc import Iterable


class Span:
    """Cells of consecutive tokens that one set of sequences holds."""

    __slots__ = ("end", "num_holders", "parent", "start")

    def __init__(self, parent: "Span | None", start: int, end: int, num_holders: int = 1) -> None:
        self.parent = parent
        self.start = start
        self.end = end
        self.num_holders = num_holders


class CellPath:
    """The cells of one sequence; `CellAccount` alone changes it."""

    __slots__ = ("tail",)

    def __init__(self) -> None:
        self.tail: Span | None = None

    @property
    def num_tokens(self) -> int:
        """Length of the sequence."""
        return self.tail.end if self.tail else 0

    def spans(self) -> Iterable[Span]:
        """From the end to the beginning."""
        span = self.tail
        while span is not None:
            yield span
            span = span.parent


class CellAccount:
    """Cells in use over all paths.

    Args:
        forks_share: Whether a fork takes no cells; False where it is a copy.
    """

    def __init__(self, *, forks_share: bool) -> None:
        self._forks_share = forks_share
        self.num_used = 0

    def extend(self, path: CellPath, num_tokens: int) -> None:
        """Take cells for further tokens of a sequence."""
        self.num_used += num_tokens
        tail = path.tail
        if tail is not None and tail.num_holders == 1:
            tail.end += num_tokens
        else:
            start = path.num_tokens
            path.tail = Span(tail, start, start + num_tokens)

    def truncate(self, path: CellPath, num_tokens: int) -> None:
        """Free the cells behind the first `num_tokens`, so far as nobody else holds them."""
        while path.tail is not None and path.tail.end > num_tokens:
            tail = path.tail
            upper = self._split(tail, num_tokens) if tail.start < num_tokens else tail.parent
            tail.num_holders -= 1
            if tail.num_holders == 0:
                self.num_used -= tail.end - tail.start
            path.tail = upper

    def fork(self, source: CellPath, target: CellPath, num_tokens: int) -> None:
        """Give the empty `target` the first `num_tokens` of `source`."""
        if num_tokens == 0:
            return
        if not self._forks_share:
            self.extend(target, num_tokens)
            return
        for span in source.spans():
            if span.start < num_tokens:
                break
        target.tail = span if span.end == num_tokens else self._split(span, num_tokens)
        for shared in target.spans():
            shared.num_holders += 1

    def detach(self, path: CellPath) -> None:
        """Give a sequence cells of its own, as it needs before any of them are moved."""
        num_tokens = path.num_tokens
        self.truncate(path, 0)
        self.extend(path, num_tokens)

    def num_own(self, path: CellPath) -> int:
        """Cells that nobody else holds: what closing the sequence would free."""
        return sum(span.end - span.start for span in path.spans() if span.num_holders == 1)

    @staticmethod
    def num_shared(one: CellPath, other: CellPath) -> int:
        """Tokens at the beginning of two sequences that lie in the same cells."""
        spans = {id(span) for span in one.spans()}
        return next((span.end for span in other.spans() if id(span) in spans), 0)

    @staticmethod
    def num_held(paths: Iterable[tuple[CellPath, int]]) -> int:
        """Cells that are under the first so many tokens of any of the paths, each counted once.

        Args:
            paths: Each with the number of its tokens that count.
        """
        reach: dict[int, tuple[Span, int]] = {}
        for path, num_tokens in paths:
            for span in path.spans():
                end = min(span.end, num_tokens)
                if end > span.start and end > reach.get(id(span), (span, 0))[1]:
                    reach[id(span)] = (span, end)
        return sum(end - span.start for span, end in reach.values())

    @staticmethod
    def _split(span: Span, num_tokens: int) -> Span:
        """Cut a span in two at a position inside it; returns the upper, earlier part."""
        upper = Span(span.parent, span.start, num_tokens, span.num_holders)
        span.parent, span.start = upper, num_tokens
        return upper
