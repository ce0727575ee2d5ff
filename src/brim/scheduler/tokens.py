"""Tokens as arrays that grow."""

import numpy as np

from brim.prefix_cache.format import Tokens


class TokenArray:
    """Tokens of one sequence; grows without copying at each token."""

    __slots__ = ("_array", "_length")

    def __init__(self) -> None:
        self._array = np.empty(256, np.int32)
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def append(self, token: int) -> None:
        """Add one token."""
        if self._length == len(self._array):
            self._reserve(2 * self._length)
        self._array[self._length] = token
        self._length += 1

    def extend(self, tokens: Tokens) -> None:
        """Add tokens."""
        end = self._length + len(tokens)
        if end > len(self._array):
            self._reserve(max(end, 2 * self._length))
        self._array[self._length : end] = tokens
        self._length = end

    def truncate(self, num_tokens: int) -> None:
        """Keep the first ones."""
        self._length = min(self._length, num_tokens)

    def view(self) -> Tokens:
        """The tokens, valid until the next change."""
        return self._array[: self._length]

    def _reserve(self, capacity: int) -> None:
        grown = np.empty(capacity, np.int32)
        grown[: self._length] = self._array[: self._length]
        self._array = grown
