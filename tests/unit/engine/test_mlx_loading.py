"""Model directories that mlx-lm loads, and those that get one sentence instead."""

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.mlx_models import make_model_dir

from brim.errors import ModelFileError

mx: Any = pytest.importorskip("mlx.core")

from mlx.utils import tree_flatten

from brim.engine.mlx import loading

Break = Callable[[Path], object]


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of 1 MB."""
    return make_model_dir(tmp_path_factory.mktemp("mlx") / "tiny", "llama", vocab_size=512)


@pytest.fixture
def model_dir(intact: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(intact, tmp_path / "tiny"))


def load(directory: Path, paths: tuple[Path, ...] | None = None) -> loading.LoadedModel:
    """Loads by paths alone, as if a plan had been made before the directory was broken."""
    paths = paths or (directory / "model.safetensors",)
    model = SimpleNamespace(paths=tuple(map(str, paths)))
    return loading.load(SimpleNamespace(model=model))  # type: ignore[arg-type]


def with_config(**changes: Any) -> Break:
    """Changes values of config.json; None removes one."""

    def apply(directory: Path) -> None:
        path = directory / "config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return apply


def with_weights(change: Callable[[dict[str, Any]], None]) -> Break:
    """Changes the tensors of model.safetensors."""

    def apply(directory: Path) -> None:
        path = str(directory / "model.safetensors")
        weights = mx.load(path)
        mx.eval(weights)
        change(weights)
        mx.save_safetensors(path, weights)

    return apply


def cut(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def pack(weights: dict[str, Any]) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = weights[name].astype(mx.uint8)


def write(name: str, text: str) -> Break:
    return lambda directory: (directory / name).write_text(text)


UP = "model.layers.1.mlp.up_proj.weight"

BROKEN: dict[str, tuple[Break, str]] = {
    "no model_type": (with_config(model_type=None), "no usable model_type"),
    "a path as model_type": (with_config(model_type="../llama"), "no usable model_type"),
    "an unknown model_type": (with_config(model_type="nosuch"), "no class for model_type 'nosuch'"),
    "a module without a model": (with_config(model_type="cache"), "no class for model_type"),
    "no hidden_size": (with_config(hidden_size=None), "hidden_size"),
    "a text where a number belongs": (with_config(hidden_size="big"), "cannot load it"),
    "no heads": (with_config(num_attention_heads=0, head_dim=None), "cannot load it"),
    "a config of another size": (with_config(intermediate_size=96), "mlp"),
    "more layers than weights": (with_config(num_hidden_layers=3), "model.layers.2."),
    "fewer layers than weights": (with_config(num_hidden_layers=1), "model.layers.1."),
    "an unknown quantisation": (
        with_config(quantization_config={"quant_method": "bitsandbytes"}),
        "quantised by bitsandbytes",
    ),
    "a quantisation without numbers": (with_config(quantization={"bits": 4}), "'group_size'"),
    "bits that no kernel has": (
        with_config(quantization={"bits": 77, "group_size": 64, UP.removesuffix(".weight"): True}),
        "cannot load it",
    ),
    "a quantisation without a method": (with_config(quantization_config={"bits": 4}), "is missing"),
    "a missing tensor": (with_weights(lambda weights: weights.pop(UP)), UP),
    "a tensor too many": (with_weights(lambda w: w.update(extra=w[UP])), "extra"),
    "a tensor of another shape": (with_weights(lambda w: w.update({UP: w[UP].T})), UP),
    "packed weights": (with_weights(pack), "does not say how to unpack"),
    "a file cut short": (cut, "incomplete download"),
    "a file of something else": (write("model.safetensors", "<html>" * 9), "cannot load it"),
    "an empty file": (write("model.safetensors", ""), "cannot load it"),
    "a missing file": (lambda d: (d / "model.safetensors").unlink(), "lacks model.safetensors"),
    "weights of another model": (
        lambda d: shutil.copy(d / "model.safetensors", d / "model-old.safetensors"),
        "model-old.safetensors",
    ),
    "a config that is no JSON": (write("config.json", "{"), "config.json is damaged"),
    "quantisation data that is no JSON": (write("hf_quant_config.json", "{"), "cannot load it"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_gets_one_sentence(name: str, model_dir: Path) -> None:
    """Whatever mlx-lm raises, the error is the file's, names the directory and fits on a line."""
    break_it, words = BROKEN[name]
    break_it(model_dir)
    with pytest.raises(ModelFileError) as caught:
        load(model_dir)
    message = caught.value.message
    assert words in message
    assert message.startswith(str(model_dir))
    assert "\n" not in message
    assert len(message) < len(str(model_dir)) + 400


def test_a_models_own_code_is_never_run(model_dir: Path) -> None:
    """A config that names a Python file is refused, and the file stays unread."""
    mark = model_dir / "it-ran"
    (model_dir / "mine.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    with_config(model_file="mine.py")(model_dir)
    with pytest.raises(ModelFileError, match="never runs"):
        load(model_dir)
    assert not mark.exists()


def test_a_config_may_name_code_of_other_programs(model_dir: Path) -> None:
    """`auto_map` is for another library, and a model that has a class here loads all the same."""
    with_config(auto_map={"AutoModel": "mine.Model"})(model_dir)
    assert load(model_dir).weights_bytes > 0


def test_a_damaged_generation_config_does_not_matter(model_dir: Path) -> None:
    """What only holds defaults for sampling keeps no model from loading."""
    write("generation_config.json", "{")(model_dir)
    assert load(model_dir).weights_bytes > 0


def test_a_directory_that_mlx_lm_cannot_search_says_so(intact: Path, tmp_path: Path) -> None:
    """A name with brackets, which mlx-lm takes for a pattern, is to be changed."""
    directory = Path(shutil.copytree(intact, tmp_path / "tiny [bf16]"))
    with pytest.raises(ModelFileError, match="rename it"):
        load(directory)


def test_files_of_two_directories_are_no_model(model_dir: Path, tmp_path: Path) -> None:
    """All files of a plan lie in one directory."""
    elsewhere = tmp_path / "model-00002.safetensors"
    with pytest.raises(ModelFileError, match="lacks some of the model's files"):
        load(model_dir, (model_dir / "model.safetensors", elsewhere))


def test_weights_are_in_memory_and_nothing_else(model_dir: Path) -> None:
    """After a load the bytes of all parameters are active, and none wait to be read."""
    gc.collect()  # models of earlier tests, which would go between the two readings
    before = mx.get_active_memory()
    loaded = load(model_dir)
    taken = mx.get_active_memory() - before
    on_file = (model_dir / "model.safetensors").stat().st_size
    assert on_file - 4096 < loaded.weights_bytes <= on_file
    assert loaded.weights_bytes <= taken <= 1.01 * loaded.weights_bytes
    assert loaded.config["eos_token_id"]


def test_a_load_leaves_the_cache_limit_as_it_was(model_dir: Path) -> None:
    """Freed arrays are kept up to the plan's limit again, after a failure too."""
    before = mx.set_cache_limit(7 << 20)
    try:
        load(model_dir)
        cut(model_dir)
        with pytest.raises(ModelFileError):
            load(model_dir)
        assert mx.set_cache_limit(before) == 7 << 20
    finally:
        mx.set_cache_limit(before)


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="a GPU has the kernels")
def test_experts_that_a_processor_cannot_compute_are_refused_before_they_are_read(
    tmp_path: Path,
) -> None:
    """MLX's CPU backend multiplies experts in float32 alone, and a half-width one says so."""
    directory = make_model_dir(
        tmp_path / "moe", "qwen3_moe", dtype="bfloat16", vocab_size=64, num_hidden_layers=1
    )
    with pytest.raises(ModelFileError, match="mixtures of experts in float32"):
        load(directory)


def test_reading_is_told_by_bytes(intact: Path) -> None:
    """Rising shares of the weights' bytes, the largest tensors the largest steps."""
    model = SimpleNamespace(paths=(str(intact / "model.safetensors"),))
    told: list[float] = []
    plan: Any = SimpleNamespace(model=model)
    loaded = loading.load(plan, told.append)
    weights: Any = tree_flatten(loaded.model.parameters())
    sizes = [weight.nbytes for _, weight in weights]
    assert len(told) == len(sizes) - 1
    done = [sum(sizes[: number + 1]) / loaded.weights_bytes for number in range(len(told))]
    assert told == pytest.approx(done)
