"""The value that every system's reader of one process's memory gives."""

import msgspec


class ProcessMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of one process; pages shared with others count in proportion on Linux."""

    dirty_bytes: int
    """Anonymous memory, swapped or not: what would have to be swapped to be taken away."""
    resident_bytes: int
    """What is in RAM, mapped files included."""
    file_bytes: int = 0
    """The part of `resident_bytes` that is file pages."""
