"""`brim convert` as a real process: a checkpoint becomes a model that answers."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support.models import PYSTD_1M


def brim(*arguments: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BRIM_")}
    return subprocess.run(
        [sys.executable, "-m", "brim", *arguments], stdin=subprocess.DEVNULL, capture_output=True,
        env=kept, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(("option", "quant"), [((), "F16"), (("--quant", "q8_0"), "Q8_0")])
def test_a_checkpoint_becomes_a_model(tmp_path: Path, option: tuple[str, ...], quant: str) -> None:
    """The file is described on stdout, has the quant that was asked for, and answers."""
    out = tmp_path / "small.gguf"
    done = brim("convert", str(PYSTD_1M), str(out), "--json", *option)
    assert (done.returncode, done.stderr) == (0, "")
    described = json.loads(done.stdout)
    assert described["paths"] == [str(out)]
    assert described["quant"] == quant
    answer = brim("run", "-m", str(out), "--raw", "--temp", "0", "-n", "8", "import os")
    assert answer.returncode == 0, answer.stderr
    assert len(answer.stdout) > 3


def test_the_command_that_is_advised_works(tmp_path: Path) -> None:
    """What `run` says of a checkpoint where llama.cpp is asked for can be typed as it stands."""
    model = tmp_path / "my model"
    model.symlink_to(PYSTD_1M)
    refused = brim("run", "-m", str(model), "--engine", "llamacpp", "hi")
    assert refused.returncode == 1
    command = refused.stderr.rpartition("brim convert")[2]
    done = subprocess.run(
        f"{shlex.quote(sys.executable)} -m brim convert {command}",
        shell=True,
        cwd=tmp_path,
        timeout=60,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "try it: brim run -m pystd-1m.gguf" in done.stderr
    assert (tmp_path / "pystd-1m.gguf").is_file()


def test_what_cannot_be_converted_leaves_nothing(tmp_path: Path) -> None:
    """A directory without a checkpoint is one sentence and no file."""
    done = brim("convert", str(tmp_path), str(tmp_path / "x.gguf"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert "has no config.json; name the directory of a checkpoint" in done.stderr
    assert list(tmp_path.iterdir()) == []
