"""A slice of benches/fuzz_headers.py: damaged headers end in a description or in a sentence."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]

NUM_CASES = 1_800
"""Three hundred of each kind; the bench runs 100,000."""


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    """The bench as a module."""
    path = ROOT / "benches" / "fuzz_headers.py"
    spec = importlib.util.spec_from_file_location("fuzz_headers", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_undamaged_files_are_described(fuzz: ModuleType, tmp_path: Path) -> None:
    """The files that are damaged are good ones, so that damage is what is tested."""
    for kind, files in fuzz.kinds().items():
        if kind != "config.json":
            assert fuzz.read(kind, files, tmp_path).num_layers > 0, kind


def test_damaged_headers(fuzz: ModuleType, tmp_path: Path) -> None:
    """Each is described or refused with a BrimError, and both happen to every kind."""
    seen = {(kind, result) for kind, result, _ in fuzz.run(range(NUM_CASES), tmp_path)}
    assert seen == {(kind, result) for kind in fuzz.kinds() for result in ("described", "refused")}
