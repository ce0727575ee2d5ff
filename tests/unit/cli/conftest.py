"""An environment of its own for each test of the command line."""

import os
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No settings, servers or past loads of whoever runs the tests; gives the runtime directory."""
    for name in list(os.environ):
        if name.startswith("BRIM_"):
            monkeypatch.delenv(name)
    config = tmp_path / "brim.toml"
    config.write_text("")
    monkeypatch.setenv("BRIM_CONFIG", str(config))
    runtime = tmp_path / "runtime"
    monkeypatch.setattr("brim.config.places.runtime_directory", lambda: runtime)
    monkeypatch.setattr("brim.cli.neighbours.history_directory", lambda: tmp_path / "history")
    return runtime
