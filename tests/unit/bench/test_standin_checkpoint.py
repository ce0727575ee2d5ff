"""Stand-ins as checkpoints: what is written is what MLX's loaders and brim's readers expect."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from brim.bench.standin import tiny
from brim.bench.standin.checkpoint import ARCHITECTURES, checkpoint, write_checkpoint
from brim.bench.standin.vocabulary import MIN_VOCAB_SIZE, tokenizer_json
from brim.errors import InvalidRequest, Unsupported
from brim.registry.convert import convert_to_gguf
from brim.registry.describe_safetensors import describe_directory
from brim.registry.safetensors_file import load_values
from brim.registry.safetensors_header import SafeTensor, read_headers

SMALL = tiny("llama", num_layers=1, vocab_size=300)


def stored(tensor: SafeTensor, dtype: str) -> np.ndarray:
    number = tensor.size_bytes // np.dtype(dtype).itemsize
    return np.fromfile(tensor.path, dtype, number, offset=tensor.offset)


def packed(directory: Path, module: str, bits: int, group: int) -> np.ndarray:
    """A packed matrix's values, by MLX's own rule: number times scale plus offset."""
    tensors = read_headers(directory)
    words = stored(tensors[f"{module}.weight"], "<u4")
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    numbers = (words[:, None] >> shifts & np.uint32(2**bits - 1)).reshape(-1, group)
    scales, offsets = (load_values(tensors[f"{module}.{part}"]) for part in ("scales", "biases"))
    return numbers * scales.reshape(-1, 1) + offsets.reshape(-1, 1)


@pytest.mark.parametrize("quant", ["MLX bf16", "MLX 4bit"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_directory_is_described_as_its_dimensions(
    tmp_path: Path, architecture: str, quant: str
) -> None:
    """Architecture, sizes, quant and bytes come back from the files alone."""
    dimensions = tiny(architecture, num_layers=2)
    model = checkpoint(dimensions, quant)
    spec = describe_directory(write_checkpoint(tmp_path / "m", model, with_data=False))
    assert (spec.architecture, spec.num_layers) == (architecture, 2)
    assert spec.num_kv_heads == (dimensions.num_kv_heads,) * 2
    assert (spec.num_experts, spec.vocab_size) == (dimensions.num_experts, 512)
    assert spec.weights_bytes == model.weights_bytes
    assert spec.quant == ("BF16" if quant == "MLX bf16" else quant)


def test_a_sparse_file_has_the_size_of_a_whole_one(tmp_path: Path) -> None:
    """A dry run reads its header and never its weights."""
    model = checkpoint(SMALL, "MLX bf16")
    sparse = write_checkpoint(tmp_path / "sparse", model, with_data=False) / "model.safetensors"
    whole = write_checkpoint(tmp_path / "whole", model) / "model.safetensors"
    assert sparse.stat().st_size == whole.stat().st_size
    assert sparse.read_bytes() != whole.read_bytes()


def test_a_seed_gives_the_same_weights_and_another_one_others(tmp_path: Path) -> None:
    """Runs can be repeated."""
    model = checkpoint(SMALL, "MLX 4bit")
    data = [
        (write_checkpoint(tmp_path / name, model, seed=seed) / "model.safetensors").read_bytes()
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert data[0] == data[1] != data[2]


def test_rows_never_repeat(tmp_path: Path) -> None:
    """No two tokens have the same logits."""
    tensors = read_headers(write_checkpoint(tmp_path / "m", checkpoint(SMALL, "MLX bf16")))
    rows = load_values(tensors["model.embed_tokens.weight"])
    assert len({row.tobytes() for row in rows}) == len(rows) == 300


@pytest.mark.parametrize(("quant", "bits", "group"), [("MLX 4bit", 4, 64), ("MLX 8bit g32", 8, 32)])
def test_packed_values_have_no_mean_and_keep_an_operand_s_size(
    tmp_path: Path, quant: str, bits: int, group: int
) -> None:
    """Activations stay finite through any number of layers."""
    directory = write_checkpoint(tmp_path / "m", checkpoint(SMALL, quant))
    values = packed(directory, "model.layers.0.mlp.gate_proj", bits, group)
    assert values.shape == (512 * 256 // group, group)
    assert abs(values.mean()) < 0.02 * values.std()
    assert values.std() == pytest.approx(1 / 16, rel=0.05)


def test_the_router_of_experts_is_packed_as_mlx_packs_it() -> None:
    """Its eight bits stand in the config, or loaders would take it for four."""
    model = checkpoint(tiny("qwen3moe", num_layers=1), "MLX 4bit")
    gate = next(t for t in model.tensors if t.name == "model.layers.0.mlp.gate.weight")
    assert gate.shape == (8, 256 * 8 // 32)
    packing = model.config["quantization"]
    assert packing["model.layers.0.mlp.gate"] == {"group_size": 64, "bits": 8}


def test_text_comes_back_from_the_tokenizer() -> None:
    """Every id is one token, letters are merged into words, and any text is kept."""
    found = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(1000)))
    assert found.get_vocab_size() == 1000
    text = "read the first line \u00e9\u4e2d"
    encoded = found.encode(text)
    assert found.decode(encoded.ids) == text
    assert len(encoded.ids) < len(text.encode())


def test_a_checkpoint_becomes_a_gguf_file(tmp_path: Path) -> None:
    """So that both engines can be compared on one stand-in."""
    directory = write_checkpoint(tmp_path / "m", checkpoint(SMALL, "MLX bf16"))
    spec = convert_to_gguf(directory, tmp_path / "m.gguf", "F16")
    assert spec.num_parameters == describe_directory(directory).num_parameters


def test_what_has_no_checkpoint_form_is_refused() -> None:
    """The message says what to choose instead."""
    with pytest.raises(Unsupported, match="no checkpoint form for 'mamba'; choose a GGUF quant"):
        checkpoint(tiny("mamba"), "MLX 4bit")
    with pytest.raises(Unsupported, match="not as Q4_K_M"):
        checkpoint(SMALL, "Q4_K_M")
    with pytest.raises(InvalidRequest, match="groups of 64 do not divide; choose MLX bf16"):
        checkpoint(tiny("llama", hidden_size=96), "MLX 4bit")
    with pytest.raises(InvalidRequest, match=f"at least {MIN_VOCAB_SIZE} tokens"):
        tokenizer_json(100)
