"""`brim models`: what is in the cache, in which form."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants
from support.models import DEMO, PYSTD_1M

from brim.cli.app import main


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of Hugging Face with one model in each form."""
    checkpoint = tmp_path / "models--org--pystd" / "snapshots" / "c1"
    shutil.copytree(PYSTD_1M, checkpoint)
    gguf = tmp_path / "models--org--demo-GGUF" / "snapshots" / "c1"
    gguf.mkdir(parents=True)
    shutil.copy(DEMO, gguf / "Demo-Q8_0.gguf")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_every_form_is_listed(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each model has a line with the reference that loads it, its form and its quant."""
    assert main(["models"]) == 0
    lines = [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["model", "form", "quant"]
    assert ["demo", "gguf", "Q8_0"] in lines
    assert ["hf:org/demo-GGUF:Demo-Q8_0", "gguf", "Q8_0"] in lines
    assert ["hf:org/pystd", "safetensors", "F16"] in lines


def test_what_is_damaged_says_so(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint that is cut short is listed with the reason, and does not hide the others."""
    path = cache / "models--org--pystd" / "snapshots" / "c1" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert main(["models", "--json"]) == 0
    found = {each["reference"]: each for each in json.loads(capsys.readouterr().out)}
    assert found["hf:org/pystd"]["spec"] is None
    assert "is damaged" in found["hf:org/pystd"]["problem"]
    assert found["demo"]["problem"] == ""
