"""From the settings to how a worker works: its stall target, and where it keeps KV on disk."""

from pathlib import Path

import msgspec

from brim.config.tree import CacheSettings, Settings
from brim.core.cache import CacheOptions
from brim.worker.protocol import WorkerOptions


def cache_directory(settings: CacheSettings) -> Path:
    """Where KV is kept on disk; whoever writes there makes it.

    The platform's directory for caches: what is lost with it is time, and backups leave it out.
    """
    if settings.directory:
        return Path(settings.directory).expanduser()
    import platformdirs

    return platformdirs.user_cache_path("brim", appauthor=False) / "prefixes"


def cache_options(settings: CacheSettings) -> CacheOptions | None:
    """What workers are told to keep on disk; None where that is nothing."""
    if not settings.enabled or not settings.budget_bytes:
        return None
    return CacheOptions(
        directory=str(cache_directory(settings)),
        budget_bytes=settings.budget_bytes,
        daily_write_bytes=settings.daily_write_bytes,
        free_disk_floor_bytes=settings.free_disk_floor_bytes,
        max_inflight_bytes=settings.max_inflight_bytes,
        min_tokens=settings.min_tokens,
    )


def worker_options(settings: Settings, *, max_inflight_bytes: int | None = None) -> WorkerOptions:
    """What a worker is told beside its plan.

    Args:
        settings: The settings.
        max_inflight_bytes: What the account has set aside for KV on its way to the disk, in place
            of the setting; 0 lets the worker read what is there and write nothing.
    """
    cache = cache_options(settings.cache)
    if cache is not None and max_inflight_bytes is not None:
        cache = msgspec.structs.replace(cache, max_inflight_bytes=max_inflight_bytes)
    return WorkerOptions(stall_target_s=settings.models.stall_target_s, cache=cache)
