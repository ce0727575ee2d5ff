"""What a worker is told beside its plan, from the settings."""

from pathlib import Path

import pytest

from brim.config.tree import CacheSettings, ModelSettings, Settings
from brim.runtime.worker_options import cache_directory, worker_options


def test_the_stall_target_and_the_caches_bounds_come_from_the_settings() -> None:
    """Every bound of the cache reaches the worker as it was set."""
    cache = CacheSettings(
        directory="/kv", budget_bytes=1, daily_write_bytes=2, free_disk_floor_bytes=3,
        max_inflight_bytes=4, min_tokens=5,
    )  # fmt: skip
    options = worker_options(Settings(models=ModelSettings(stall_target_s=0.1), cache=cache))
    assert options.stall_target_s == 0.1
    assert options.cache is not None
    told = {name: getattr(options.cache, name) for name in options.cache.__struct_fields__}
    assert told == {
        "directory": "/kv", "budget_bytes": 1, "daily_write_bytes": 2, "free_disk_floor_bytes": 3,
        "max_inflight_bytes": 4, "min_tokens": 5,
    }  # fmt: skip


def test_what_the_account_set_aside_takes_the_place_of_the_setting() -> None:
    """A worker that was granted nothing for writes may still read what is on the disk."""
    options = worker_options(Settings(), max_inflight_bytes=0)
    assert options.cache is not None
    assert options.cache.max_inflight_bytes == 0


@pytest.mark.parametrize("cache", [CacheSettings(enabled=False), CacheSettings(budget_bytes=0)])
def test_a_cache_that_is_off_or_holds_nothing_is_none(cache: CacheSettings) -> None:
    """The worker then opens no directory."""
    assert worker_options(Settings(cache=cache)).cache is None


def test_without_a_directory_the_platforms_own_is_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A directory of the settings may begin at the reader's home."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    default = cache_directory(CacheSettings())
    assert default.parts[-2:] == ("brim", "prefixes")
    assert cache_directory(CacheSettings(directory="~/kv")) == tmp_path / "home" / "kv"
