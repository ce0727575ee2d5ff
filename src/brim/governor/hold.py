"""A level that rises at once and falls only after lower readings have held: no flapping."""

import math
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

L = TypeVar("L")


@dataclass(frozen=True, slots=True)
class Seen(Generic[L]):
    """What one look says by itself."""

    level: L
    cause: str
    """The reading that decided, in words."""


@dataclass(frozen=True, slots=True)
class Hold(Generic[L]):
    """A level that stands, and what was seen below it since when."""

    order: tuple[L, ...]
    """All levels, the lowest first."""
    hold_s: float
    """How long nothing may be seen at the level before it falls."""
    level: L
    cause: str = ""
    """The reading that led to the level."""
    since_s: float = -math.inf
    """When the level was reached."""
    below: Seen[L] | None = None
    """The highest level seen below it since `below_since_s`: where it falls to."""
    below_since_s: float = 0.0

    def after(self, seen: Seen[L] | None, at_s: float) -> "Hold[L]":
        """How it stands after one more look; a look that saw nothing changes nothing.

        Example:
            >>> hold = Hold(order=("calm", "short"), hold_s=10, level="calm")
            >>> hold = hold.after(Seen("short", "3 % left"), 0.0)
            >>> hold = hold.after(Seen("calm", ""), 1.0).after(Seen("calm", ""), 10.9)
            >>> hold.level, hold.after(Seen("calm", ""), 11.0).level
            ('short', 'calm')
        """
        if seen is None:
            return self
        rank = self.order.index
        if rank(seen.level) > rank(self.level):
            return replace(self, level=seen.level, cause=seen.cause, since_s=at_s, below=None)
        if seen.level == self.level:
            return self if self.below is None else replace(self, below=None)
        if self.below is None:
            return replace(self, below=seen, below_since_s=at_s)
        below = max(self.below, seen, key=lambda each: rank(each.level))
        if at_s - self.below_since_s < self.hold_s:
            return replace(self, below=below)
        # What is lower still has to hold anew: it may be one look old.
        return replace(self, level=below.level, cause=below.cause, since_s=at_s, below=None)
