"""From what a user types to a blueprint."""

import json
import math
import re
from pathlib import Path

import msgspec
import pytest

from brim.bench.standin import blueprint, clone_blueprint, tiny, write
from brim.bench.standin.blueprint import UINT32, Blueprint
from brim.bench.standin.checkpoint import CheckpointModel
from brim.bench.standin.clone import clone_remote
from brim.bench.standin.config import dimensions_from_config
from brim.bench.standin.keys import metadata_pairs
from brim.bench.standin.slices import num_layers
from brim.bench.standin.source import standin_of
from brim.bench.standin.templates import shapes
from brim.errors import BrimError, InvalidRequest, ModelFileError, NotFound, Unsupported
from brim.registry import catalogue
from brim.registry.config_json import spec_from_config
from brim.registry.remote import RemoteFiles
from brim.registry.sources import DEMO_PATH

QWEN = {
    "model_type": "qwen3", "hidden_size": 1024, "num_hidden_layers": 28, "vocab_size": 1000,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "rope_theta": 1e6,
    "intermediate_size": 3072, "tie_word_embeddings": True, "max_position_embeddings": 40_960,
}  # fmt: skip


WIDTHS = re.compile(
    r"attention\.(q|kv)_lora_rank|attention\.(key|value)_length_mla|expert_(?!gating)|leading_dense|ssm\."
    r"|shortconv\."
)
"""Keys that the planner reads of latent KV, experts and recurrent layers."""


class OnDisk(RemoteFiles):
    """Files of a directory, read by ranges as if from a server."""

    def __init__(self, directory: Path) -> None:
        self.where = "test"
        self.directory = directory
        self.num_bytes = 0

    def read(self, name: str, start: int, num_bytes: int) -> tuple[bytes, int]:
        data = (self.directory / name).read_bytes()
        piece = data[start : start + num_bytes]
        self.num_bytes += len(piece)
        return piece, len(data)


def test_a_file_is_cloned() -> None:
    """By path or as the built-in model, under the name that the file has."""
    assert standin_of(str(DEMO_PATH)) == standin_of("demo") == ("demo", clone_blueprint(DEMO_PATH))


def test_a_remote_file_is_cloned_from_its_header(tmp_path: Path) -> None:
    """No weight is fetched, and a header longer than the first request is fetched to its end."""
    model = blueprint(tiny("llama", num_layers=2, vocab_size=35_000), "F16")
    write(tmp_path / "m.gguf", model, with_data=False)
    files = OnDisk(tmp_path)
    assert clone_remote(files, ["m.gguf"]) == model
    assert len(model.header()) > 1 << 20
    assert files.num_bytes < len(model.header()) + (1 << 20)


def test_a_directory_or_config_is_laid_out(tmp_path: Path) -> None:
    """The name is the directory's, the quant the one asked for or Q4_K_M."""
    folder = tmp_path / "Qwen3-0.6B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(QWEN))
    expected = blueprint(dimensions_from_config(QWEN, "x"), "Q8_0")
    assert standin_of(str(folder), "Q8_0") == ("Qwen3-0.6B", expected)
    name, default = standin_of(str(folder / "config.json"))
    assert (name, default) == ("Qwen3-0.6B", blueprint(dimensions_from_config(QWEN, "x")))


def test_a_name_of_the_catalogue_is_laid_out() -> None:
    """With the quant that the catalogue means, unless another is asked for."""
    name, model = standin_of("mixtral-8x7b-instruct-v0.1", "Q8_0")
    assert name == "Mixtral-8x7B-Instruct-v0.1"
    assert isinstance(model, Blueprint)
    assert sum(tensor.num_elements for tensor in model.tensors) == 46_702_792_704
    assert {t.type_name for t in model.tensors} == {"Q8_0", "F32"}


def test_templates_of_the_catalogue_have_the_parameters_that_the_registry_counts() -> None:
    """Two ways from a config to tensors agree: biases and small vectors are all that differs."""
    checked = set()
    for entry in catalogue.entries():
        try:
            dimensions = dimensions_from_config(entry.config, entry.name)
        except Unsupported:
            continue
        if dimensions.architecture in checked:
            continue
        checked.add(dimensions.architecture)
        spec = spec_from_config(entry.config, quant="Q4_K_M", name=entry.name)
        elements = sum(math.prod(shape) for _, shape in shapes(dimensions))
        assert elements == pytest.approx(spec.num_parameters, rel=1e-3)
        assert dimensions.num_layers == spec.num_layers
    assert len(checked) >= 8


def test_an_architecture_without_a_template_says_what_to_give() -> None:
    """Any GGUF header will do."""
    with pytest.raises(Unsupported, match="a stand-in of x needs a GGUF file of it"):
        dimensions_from_config({**QWEN, "model_type": "cohere2"}, "x")
    with pytest.raises(Unsupported, match="give hf:gpustack/bge-m3-GGUF:FP16"):
        standin_of("bge-m3")
    with pytest.raises(Unsupported, match="no checkpoint form for 'gemma3'; choose a GGUF quant"):
        standin_of("gemma-3-1b-it", "MLX 4bit")


def test_a_quant_of_mlx_gives_a_checkpoint() -> None:
    """The name of a model and a quant choose the form by themselves."""
    name, found = standin_of("Qwen3-8B-MLX-4bit")
    assert name == "Qwen3-8B"
    assert isinstance(found, CheckpointModel)
    assert (found.dimensions.architecture, found.quant) == ("qwen3", "MLX 4bit")


@pytest.mark.parametrize(
    ("reference", "quant", "kind", "message"),
    [
        ("demo.gguf", "Q8_0", InvalidRequest, "leave --quant out"),
        ("demo", "Q8_0", InvalidRequest, "demo has its quant; leave --quant out"),
        ("nothing-by-this-name", None, NotFound, "no model of the catalogue"),
        ("missing.gguf", None, NotFound, "there is no file"),
        ("~nobody-here/m.gguf", None, NotFound, "there is no file"),
        ("~nobody-here/m", None, NotFound, "no model of the catalogue"),
        ("x" * 5000, None, NotFound, "no model of the catalogue"),
        ("x" * 5000 + ".gguf", None, NotFound, "there is no file"),
        (" ", None, NotFound, "no model was named; give the path"),
        ("https://[x/y.gguf", None, NotFound, "no address of a .gguf file"),
        ("https://host/x-00001-of-00000.gguf", None, ModelFileError, "rename the parts"),
        ("https://host/x.gguf?download=true", "Q8_0", InvalidRequest, "leave --quant out"),
        ("qwen3:8b-q8_0", "Q6_K", InvalidRequest, "names a quant already; leave Q6_K out"),
        ("hf:org/repo:Q8_0", "Q6_K", InvalidRequest, "names a quant already; leave Q6_K out"),
        ("hf:org", None, NotFound, "not of the form hf:ORG/REPO"),
        (".", None, NotFound, "is a directory without models"),
        ("bad.json", None, ModelFileError, "JSON"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(
    reference: str,
    quant: str | None,
    kind: type[BrimError],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The message says what to do."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text("[1, 2")
    with pytest.raises(kind, match=message) as caught:
        standin_of(reference, quant)
    assert len(caught.value.message) < 400


def test_a_directory_of_gguf_files_is_cloned(tmp_path: Path) -> None:
    """The file is chosen as for a plan: by quant, or the usual one."""
    for number, name in enumerate(("m-Q8_0.gguf", "m-Q4_K_M.gguf"), start=2):
        write(tmp_path / name, blueprint(tiny("llama", num_layers=number)), with_data=False)
    assert standin_of(str(tmp_path))[0] == "m-q4_k_m"
    name, model = standin_of(str(tmp_path), "q8_0")
    assert isinstance(model, Blueprint)
    assert (name, num_layers(model)) == ("m-q8_0", 2)
    assert standin_of(f"{tmp_path}:Q8_0") == (name, model)
    with pytest.raises(InvalidRequest, match="leave --quant out"):
        standin_of(f"{tmp_path}/m-Q8_0.gguf:Q4_K_M")


QWEN3_NEXT = next(e.config for e in catalogue.entries() if e.config["model_type"] == "qwen3_next")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_hidden_layers": 1}, "none of the config's layers attends"),
        ({"full_attention_interval": 2**24}, "none of the config's layers attends"),
        ({"linear_key_head_dim": 0}, "keep no state"),
    ],
)
def test_hybrids_that_no_backend_loads_are_refused(changes: dict[str, int], says: str) -> None:
    """A hybrid without attention or without a state ends in a sentence."""
    with pytest.raises(ModelFileError, match=says):
        dimensions_from_config({**QWEN3_NEXT, **changes}, "x")


@pytest.mark.parametrize(
    "name", ["DeepSeek-R1-0528", "Qwen3-Coder-Next", "GLM-4.5-Air", "LFM2.5-1.2B-Instruct"]
)
def test_a_config_has_the_widths_of_a_file(name: str) -> None:
    """What the planner asks about latent KV, experts and states is the same from either."""
    config = catalogue.find(name)[0].config
    found = spec_from_config(config, quant="Q4_K_M", name=name).widths
    dimensions = msgspec.structs.replace(dimensions_from_config(config, name), vocab_size=300)
    prefix = f"{dimensions.architecture}."
    in_file = {
        pair.key.removeprefix(prefix): int.from_bytes(pair.payload, "little")
        for pair in metadata_pairs(dimensions, "Q4_K_M")
        if pair.kind == UINT32 and WIDTHS.match(pair.key.removeprefix(prefix))
    }
    assert in_file
    assert {key: found.get(key) for key in in_file} == in_file
