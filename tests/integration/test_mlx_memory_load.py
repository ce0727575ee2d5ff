"""What a process takes while it loads a model with MLX, measured in a process of its own."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import require_engine
from support.mlx_models import make_model_dir
from support.models import TESTS, plan_for

MOST_OF_WEIGHTS = 1.15
"""The most that a load may take at its peak, in sizes of the weights."""

DENSE = {
    "hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8,
    "num_key_value_heads": 4, "num_hidden_layers": 9,
}  # fmt: skip

MIXTURE = {
    "hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 6, "num_experts": 16,
    "moe_intermediate_size": 192,
}  # fmt: skip
"""Three arrays of experts a layer, each a twentieth of the model."""

CHILD = """
import json, resource, sys
import msgspec
import mlx.core as mx
from brim.core.plan import Plan
from brim.engine.mlx import library, limits, loading

def most_resident_bytes():
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # On Linux that figure starts at the parent's.
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

resource.setrlimit(
    resource.RLIMIT_NOFILE, (1000, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
)
plan = msgspec.json.decode(sys.argv[1], type=Plan)
limits.set_limits(plan)
library.utils()
before = most_resident_bytes()
files = resource.getrlimit(resource.RLIMIT_NOFILE)
loaded = loading.load(plan)
print(json.dumps({
    "weights_bytes": loaded.weights_bytes,
    "peak_bytes": limits.peak_bytes(),
    "growth_bytes": most_resident_bytes() - before,
    "active_bytes": mx.get_active_memory(),
    "files": files,
    "files_after": resource.getrlimit(resource.RLIMIT_NOFILE),
    "modules": sorted(sys.modules),
}))
"""


@pytest.fixture(scope="module", params=["dense", "experts one by one"])
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of at least 60 MB in one file."""
    require_engine("mlx")
    path = tmp_path_factory.mktemp("mlx") / "model"
    if request.param == "dense":
        return make_model_dir(path, "llama", dtype="bfloat16", **DENSE)
    return split_experts(make_model_dir(path, "qwen3_moe", dtype="float32", **MIXTURE))


def split_experts(directory: Path) -> Path:
    """Rewrite experts that MLX holds in one array as the many that checkpoints are published in."""
    tensors: dict[str, Any] = {}
    for name, value in read(directory).items():
        if match := re.fullmatch(r"(.*\.mlp)\.switch_mlp\.(\w+)\.weight", name):
            for index in range(value.shape[0]):
                tensors[f"{match[1]}.experts.{index}.{match[2]}.weight"] = value[index]
        else:
            tensors[name] = value
    return write(directory, tensors, 1)


def read(directory: Path) -> dict[str, Any]:
    import mlx.core as mx

    tensors: dict[str, Any] = {}
    for path in directory.glob("model*.safetensors"):
        held: Any = mx.load(str(path))
        tensors |= held
    mx.eval(tensors)
    return tensors


def write(directory: Path, tensors: dict[str, Any], num_files: int) -> Path:
    """All tensors, dealt out to files one after another, so that each layer lies in all of them."""
    import mlx.core as mx

    names = sorted(tensors)
    if num_files == 1:
        mx.save_safetensors(str(directory / "model.safetensors"), tensors, {"format": "pt"})
        return directory
    weight_map: dict[str, str] = {}
    for part in range(num_files):
        file = f"model-{part + 1:05}-of-{num_files:05}.safetensors"
        held = {name: tensors[name] for name in names[part::num_files]}
        mx.save_safetensors(str(directory / file), held, {"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return directory


def loaded_in_child(directory: Path) -> dict[str, Any]:
    plan = msgspec.json.encode(plan_for("mlx", path=directory)).decode()
    result = subprocess.run(
        [sys.executable, "-c", CHILD, plan], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize("num_files", [1, 3])
def test_a_load_takes_little_more_than_the_weights(
    model_dir: Path, num_files: int, tmp_path: Path
) -> None:
    """MLX's own peak and the process's growth are within 1.15 of the weights, stacked or not."""
    directory = model_dir
    if num_files > 1:
        for name in ("config.json", "tokenizer.json"):
            (tmp_path / name).write_bytes((model_dir / name).read_bytes())
        directory = write(tmp_path, read(model_dir), num_files)
    found = loaded_in_child(directory)
    weights_bytes = found["weights_bytes"]
    assert weights_bytes >= 60e6
    assert found["peak_bytes"] <= MOST_OF_WEIGHTS * weights_bytes
    assert weights_bytes * 0.99 <= found["growth_bytes"] <= MOST_OF_WEIGHTS * weights_bytes
    assert found["active_bytes"] == pytest.approx(weights_bytes, rel=0.01)


def test_a_load_leaves_the_process_alone(model_dir: Path) -> None:
    """Nothing of other libraries is imported, and as many files may be open as before."""
    found = loaded_in_child(model_dir)
    assert found["files"][0] == 1000
    assert found["files"] == found["files_after"]
    assert (
        "mlx_lm.models.llama" in found["modules"] or "mlx_lm.models.qwen3_moe" in found["modules"]
    )
    assert not {"transformers", "torch", "huggingface_hub"} & set(found["modules"])


def test_the_rest_of_mlx_lm_is_there_for_whoever_asks() -> None:
    """A process that has loaded a model can import the whole package, with the same models."""
    require_engine("mlx")
    code = (
        "from brim.engine.mlx import library; library.utils()\n"
        "from mlx_lm.models.cache import KVCache\n"
        "from mlx_lm.generate import generate_step\n"
        "import mlx_lm, mlx_lm.models.cache\n"
        "assert callable(mlx_lm.generate) and callable(mlx_lm.load)\n"
        "assert mlx_lm.utils.TokenizerWrapper is not None\n"
        "assert mlx_lm.models.cache.KVCache is KVCache\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=TESTS)
