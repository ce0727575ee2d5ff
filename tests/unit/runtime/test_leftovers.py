"""Writes that were cut off: old ones of ours go, and nothing else."""

import os
from pathlib import Path

import pytest

from brim.config.tree import ServerSettings, Settings
from brim.runtime.leftovers import OLD_S, leftovers, remove_leftovers


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    runtime = tmp_path / "run"
    monkeypatch.setattr("brim.config.places.runtime_directory", lambda: runtime)
    for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    return Settings(server=ServerSettings(state_directory=str(tmp_path / "state")))


def made(path: Path, *, age_s: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    now = path.stat().st_mtime
    os.utime(path, (now - age_s, now - age_s))
    return path


def test_what_is_a_day_old_goes(tmp_path: Path, settings: Settings) -> None:
    """Files of servers and workers, calibrations and their scratch; the rest stays."""
    old = [
        made(tmp_path / "state" / "x.new", age_s=2 * OLD_S),
        made(tmp_path / "run" / "server-1.new", age_s=2 * OLD_S),
        made(tmp_path / "run" / "workers" / "1.new", age_s=2 * OLD_S),
    ]
    kept = [
        made(tmp_path / "state" / "fresh.new", age_s=60),
        made(tmp_path / "state" / "apps.sqlite", age_s=2 * OLD_S),
        made(tmp_path / "run" / "server-1.json", age_s=2 * OLD_S),
    ]
    assert sorted(leftovers(settings)) == sorted(old)
    assert remove_leftovers(settings) == len(old)
    assert not [path for path in old if path.exists()]
    assert all(path.exists() for path in kept)
    assert leftovers(settings) == []


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="directories are set as on Linux")
def test_scratch_of_a_killed_calibration_goes(tmp_path: Path, settings: Settings) -> None:
    """Directories with all that is in them, and calibrations that were never renamed."""
    scratch = made(tmp_path / "XDG_CACHE_HOME/brim/calibrate-x/f", age_s=0).parent
    file = made(tmp_path / "XDG_STATE_HOME/brim/calibrations/.new-1", age_s=2 * OLD_S)
    os.utime(scratch, (1.0, 1.0))
    assert remove_leftovers(settings) == 2
    assert not scratch.exists()
    assert not file.exists()
