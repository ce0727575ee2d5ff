"""Without a GPU, MLX would run a C++ compiler in the worker; the planned environment forbids it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import require_engine
from support.mlx_models import make_model_dir

from brim.planner.mlx_limits import mlx_environment

CHILD = """
import sys
from pathlib import Path
from types import SimpleNamespace
import mlx.core as mx
import numpy as np
from brim.engine.mlx import loading

model_dir, out = map(Path, sys.argv[1:])
paths = tuple(str(path) for path in model_dir.glob("model*.safetensors"))
model = loading.load(SimpleNamespace(model=SimpleNamespace(paths=paths))).model
tokens = mx.array([[(7919 * i + 13) % 500 for i in range(40)]])
np.save(out, np.array(model(tokens).astype(mx.float32)))
"""


def logits_file(model_dir: Path, tmp_path: Path, environment: dict[str, str]) -> Path:
    """Runs a model over 40 tokens in a process whose files for the moment go to `tmp_path`."""
    tmp_path.mkdir()
    out = tmp_path / "logits.npy"
    without = {key: text for key, text in os.environ.items() if not key.startswith("MLX_")}
    subprocess.run(
        [sys.executable, "-c", CHILD, str(model_dir), str(out)], check=True, capture_output=True,
        env=without | {"TMPDIR": str(tmp_path)} | environment,
    )  # fmt: skip
    return out


@pytest.mark.skipif(sys.platform == "darwin", reason="compiles for its GPU, in its own process")
def test_a_worker_compiles_nothing_and_computes_the_same(tmp_path: Path) -> None:
    """Logits are equal to the bit with MLX's compiler and without; the latter leaves no kernels."""
    require_engine("mlx")
    model_dir = make_model_dir(tmp_path / "m", "llama", dtype="bfloat16", vocab_size=512)
    planned, _ = mlx_environment(on_gpu=False)
    free = logits_file(model_dir, tmp_path / "free", {})
    ours = logits_file(model_dir, tmp_path / "ours", planned)
    assert free.read_bytes() == ours.read_bytes()
    assert list(ours.parent.rglob("*.so")) == []
    if shutil.which("g++"):
        assert list(free.parent.rglob("*.so")) != []
