"""Stores of prefixes for the teaching engine."""

from pathlib import Path

from brim.core.cache import CacheOptions

GIB = 1024**3


def options(directory: Path) -> CacheOptions:
    """A store whose bounds nothing here reaches."""
    return CacheOptions(
        directory=str(directory),
        budget_bytes=GIB,
        daily_write_bytes=GIB,
        free_disk_floor_bytes=0,
        max_inflight_bytes=GIB,
        min_tokens=32,
    )
