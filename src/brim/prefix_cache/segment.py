"""What the scheduler and the store say to each other."""

from enum import StrEnum

import msgspec

from brim.core.cache import MissReason
from brim.prefix_cache.format import Tokens


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """Of whom the entries are."""

    name: str
    paths: tuple[str, ...]
    """Its files; entries of a model whose files are gone are the first to go."""
    identity: str
    """`kv_identity` of the engine."""


class Segment(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """One entry: KV of tokens [start, end) of a prefix."""

    path: str
    key: str
    """The file's name without its suffix."""
    parent: str
    """Key of the segment that holds the token before `start`; empty where that is 0."""
    namespace: str
    start: int
    end: int
    tokens: Tokens
    """Shape (end - start,)."""
    num_bytes: int
    """Of the whole file."""


class Lookup(msgspec.Struct, frozen=True, kw_only=True):
    """What of a prompt can be restored."""

    segments: tuple[Segment, ...]
    """Import them in order; one may start before what is held by then: truncate to its start."""
    num_tokens: int
    """Length of the prefix that is then there; the last segment may be cut to it."""
    miss: MissReason | None
    """Why no more of the prompt; None where that is all of it."""
    diverges_at: int = 0
    """With DIVERGES: the first differing token, counted from 0."""


class Skip(StrEnum):
    """Why a prefix was not kept; each is counted."""

    TOO_SHORT = "too short"
    ALREADY_STORED = "already stored"
    NO_PARENT = "no parent"
    """What it continues is not there, or went while it was written."""
    BUDGET = "budget"
    DAILY_WRITES = "daily writes"
    DISK_FLOOR = "disk floor"
    IN_FLIGHT = "in flight"
    """Too much is on its way to the disk already."""
    ENGINE_BUSY = "engine busy"
    """The engine needed a free sequence to export, and all were open."""
    EXPORT_FAILED = "export failed"
    NO_SPACE = "no space"
    READ_ONLY = "read only"
    WRITE_FAILED = "write failed"
    REFUSED = "refused"
    """The directory is not safe to use."""
    PAUSED = "paused"
    """Writing failed repeatedly, and is tried again later."""
    CLOSED = "closed"
