"""An entry while the engine writes its block: straight into the mapped file that will be kept."""

from collections.abc import Callable

import msgspec

from brim.errors import Busy, StoreError
from brim.prefix_cache.files import Temporary
from brim.prefix_cache.format import BLOCK_HEAD_BYTES, Header, encode
from brim.prefix_cache.segment import Skip
from brim.prefix_cache.writer import reason_of

Allocate = Callable[[int], memoryview]
"""Makes room for a block: called with its size in bytes, gives a writable view."""


class Skipped(Exception):
    """An entry that a bound does not allow."""

    def __init__(self, reason: Skip) -> None:
        super().__init__()  # the reason says it all
        self.reason = reason


class Filling:
    """One entry before it is complete.

    Args:
        make: Gives the temporary file for a header with all its lengths.
        header: Everything but the block's length and head.
    """

    def __init__(self, make: Callable[[Header], Temporary], header: Header) -> None:
        self._make, self._header = make, header
        self._temporary: Temporary | None = None

    def allocate(self, num_bytes: int) -> memoryview:
        """Room for the block; asked for again, as by an export that is tried twice, anew.

        Raises:
            Skipped: A bound does not allow it.
            OSError: The disk is full or cannot be written.
        """
        self.remove()
        self._header = msgspec.structs.replace(self._header, block_bytes=num_bytes)
        self._temporary = self._make(self._header)
        return self._temporary.view[self._header.header_bytes :]

    def finish(self) -> tuple[Temporary, Header]:
        """Write the header before the block, which is complete.

        Raises:
            StoreError: The engine asked for no room.
        """
        if self._temporary is None:
            raise StoreError("the engine exported nothing")
        size = self._header.header_bytes
        head = bytes(self._temporary.view[size : size + BLOCK_HEAD_BYTES])
        header = msgspec.structs.replace(
            self._header, block_head=head.ljust(BLOCK_HEAD_BYTES, b"\0")
        )
        self._temporary.view[:size] = encode(header)
        return self._temporary, header

    def remove(self) -> None:
        """Give the room back."""
        if self._temporary is not None:
            self._temporary.remove()
            self._temporary = None


def why_unfilled(error: Exception) -> Skip:
    """Why an entry did not come about."""
    if isinstance(error, Skipped):
        return error.reason
    if isinstance(error, Busy):
        return Skip.ENGINE_BUSY
    return reason_of(error) if isinstance(error, OSError) else Skip.EXPORT_FAILED
