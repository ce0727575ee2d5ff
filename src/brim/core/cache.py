"""Reuse of KV: what a worker is told to keep, what a request found, and the counters of both."""

from enum import StrEnum

import msgspec


class CacheOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Where KV is kept on disk, and the bounds that hold for all models together."""

    directory: str
    budget_bytes: int
    """Of all entries of all models."""
    daily_write_bytes: int
    """Written in one day, in UTC, by all workers together: what protects the SSD."""
    free_disk_floor_bytes: int
    """Left free on the file system; entries go before it is touched."""
    max_inflight_bytes: int
    """Exported and not yet on the disk: dirty pages that the system cannot drop."""
    min_tokens: int
    """Shorter prefixes are read again sooner than they are kept."""


class CacheSource(StrEnum):
    """Where the reused part of a prompt came from."""

    NONE = "none"
    MEMORY = "memory"
    DISK = "disk"


class MissReason(StrEnum):
    """Why no more of a prompt was reused."""

    NO_ENTRY = "no entry"
    DIVERGES = "diverges"
    MODEL_CHANGED = "model changed"
    NOT_SHAREABLE = "not shareable"
    """It is kept in another namespace of the same owner."""
    DAMAGED = "damaged"
    TURNED_OFF = "turned off"
    """The request asked for none."""


def owner_of(namespace: str) -> str:
    """Whose a namespace is: one owner may have several, `owner` and `owner/part`.

    Example:
        >>> owner_of("key:12ab/mail"), owner_of("key:12ab"), owner_of("/mail")
        ('key:12ab', 'key:12ab', '')
    """
    return namespace.partition("/")[0]


class CacheReport(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one prompt found."""

    source: CacheSource = CacheSource.NONE
    """Of the last of the reused tokens, where both had some."""
    num_tokens: int = 0
    """Prompt tokens that were not computed for this request."""
    miss: MissReason | None = None
    """Why there are no more; None where the rest of the prompt is simply new."""
    diverges_at_token: int = 0
    """With DIVERGES: the first differing token, counted from 1 within its turn."""
    diverges_in_turn: int = 0
    """With DIVERGES: the turn, counted from 1; 0 where the prompt has no turns."""
    restore_s: float = 0.0
    """Time spent on reading KV from disk."""

    @property
    def reason(self) -> str:
        """The miss in words; empty where there is none.

        Example:
            >>> CacheReport(miss=MissReason.DIVERGES, diverges_at_token=7).reason
            'diverges at token 7'
        """
        if self.miss is None:
            return ""
        if self.miss is not MissReason.DIVERGES:
            return str(self.miss)
        turn = f" of turn {self.diverges_in_turn}" if self.diverges_in_turn else ""
        return f"diverges at token {self.diverges_at_token}{turn}"


class StoreStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counters of one worker's side of the store since it was opened, and the store's state."""

    num_entries: int = 0
    """Of this model."""
    entry_bytes: int = 0
    """Of this model."""
    inflight_bytes: int = 0
    written_bytes: int = 0
    written_by_owner: dict[str, int] = {}
    """Whose (see `owner_of`) -> bytes of `written_bytes`."""
    written_bytes_today: int = 0
    """By all workers."""
    num_written: int = 0
    num_read: int = 0
    read_bytes: int = 0
    num_damaged: int = 0
    num_evicted: int = 0
    skipped: dict[str, int] = {}
    """Reason -> prefixes that were not kept for it."""


class PrefixStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counters of reuse since the model was loaded."""

    num_prompt_tokens: int = 0
    """Of all requests that were read."""
    num_memory_tokens: int = 0
    """Of these: found in the memory of live and idle sequences."""
    num_disk_tokens: int = 0
    """Of these: restored from disk."""
    num_memory_hits: int = 0
    """Requests whose reused part came from memory."""
    num_disk_hits: int = 0
    misses: dict[str, int] = {}
    """Reason -> requests of which no more, or nothing, was reused for it."""
    num_idle_sequences: int = 0
    num_idle_tokens: int = 0
    """Cells that idle sequences hold and no running one needs."""
    num_idle_evicted: int = 0
    store: StoreStats | None = None
