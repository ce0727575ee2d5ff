"""Models in safetensors, with true bytes and a config's dimensions."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from support.models import PYSTD_1M, pystd_1m_gguf

from brim.errors import InvalidRequest, ModelFileError
from brim.registry.describe import describe_gguf
from brim.registry.mlx_names import gguf_name
from brim.registry.sources import describe

Write = Callable[..., Path]

CONFIG: dict[str, Any] = {
    "model_type": "qwen3_moe", "hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 128,
    "moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 1,
    "quantization": {"bits": 4, "group_size": 64, "lm_head": {"bits": 8, "group_size": 32}},
}  # fmt: skip


def packed(rows: tuple[int, ...], columns: int, bits: int, group: int) -> dict[str, Any]:
    """The three arrays of a matrix as MLX packs it."""
    return {
        "weight": np.zeros((*rows, columns * bits // 32), np.uint32),
        "scales": np.zeros((*rows, columns // group), np.float16),
        "biases": np.zeros((*rows, columns // group), np.float16),
    }


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a mixture as MLX does: 4 bits, the output matrix in 8 bits and smaller groups."""

    def write(**changes: Any) -> Path:
        matrices = {
            "model.embed_tokens": packed((128,), 64, 4, 64),
            "lm_head": packed((128,), 64, 8, 32),
            "model.layers.0.mlp.switch_mlp.down_proj": packed((4, 64), 64, 4, 64),
        } | changes
        arrays = {f"{m}.{part}": a for m, parts in matrices.items() for part, a in parts.items()}
        arrays["model.layers.0.input_layernorm.weight"] = np.zeros(64, np.float16)
        save_file(arrays, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(CONFIG))
        return tmp_path

    return write


def test_packed_matrices(write: Write) -> None:
    """Weights are counted unpacked, bytes with their scales, and each packing by its name."""
    spec = describe(str(write()))
    expert = 4 * 64 * 64
    assert (spec.format, spec.quant, spec.is_estimated) == ("safetensors", "MLX 4bit", False)
    assert spec.num_parameters == 128 * 64 * 2 + expert + 64
    embedding, head, experts = 128 * 36, 128 * 2 * 36, expert // 64 * 36
    assert spec.weights_bytes == embedding + head + experts + 128
    assert spec.active_bytes == head + experts // 4 + 128
    assert spec.embedding_bytes == embedding
    assert spec.matrix_bytes == {"MLX 8bit g32": head, "MLX 4bit": experts}
    assert [layer.key_width for layer in spec.kv_layers] == [32]


def test_scales_that_do_not_belong(write: Write) -> None:
    """A packed matrix whose scales say another width is refused by name."""
    wrong = packed((128,), 64, 4, 64) | {"scales": np.zeros((128, 5), np.float16)}
    with pytest.raises(ModelFileError, match=r"embed_tokens\.weight.*and its scales"):
        describe(str(write(**{"model.embed_tokens": wrong})))


def test_the_parts_of_a_packed_model(write: Write) -> None:
    """Cut into parts with an index, an MLX model is described as in one file."""
    whole = describe(str(write()))
    folder = write()
    arrays = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = {f"model-0000{n}-of-00002.safetensors": sorted(arrays)[n - 1 :: 2] for n in (1, 2)}
    for part, names in parts.items():
        save_file({name: arrays[name] for name in names}, folder / part)
    weight_map = {name: part for part, names in parts.items() for name in names}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    cut = describe(str(folder))
    assert len(cut.paths) == 2
    assert msgspec.structs.replace(cut, paths=whole.paths) == whole
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelFileError, match="model-00002-of-00002"):
        describe(str(folder))


def test_scales_of_another_packing_count(tmp_path: Path) -> None:
    """GPTQ's scales are in the bytes, and its parameters are the config's, not its words'."""
    name = "model.layers.0.self_attn.q_proj"
    arrays: dict[str, NDArray[Any]] = {
        "model.embed_tokens.weight": np.zeros((128, 64), np.float16),
        f"{name}.qweight": np.zeros((8, 64), np.int32),
        f"{name}.qzeros": np.zeros((1, 8), np.int32),
        f"{name}.scales": np.zeros((1, 64), np.float16),
    }
    save_file(arrays, tmp_path / "model.safetensors")
    config = {key: value for key, value in CONFIG.items() if key != "quantization"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = describe(str(tmp_path))
    assert spec.weights_bytes == sum(array.nbytes for array in arrays.values())
    assert spec.num_parameters == describe(str(tmp_path), quant="F16").num_parameters


def test_a_checkpoint_and_its_conversion() -> None:
    """A Hugging Face checkpoint and the GGUF file made of it are the same model."""
    ours, theirs = describe(str(PYSTD_1M)), describe_gguf(pystd_1m_gguf("F16"))
    assert ours.quant == theirs.quant == "F16"
    for field in ("architecture", "num_parameters", "kv_layers", "num_layers", "feed_forward_size"):
        assert getattr(ours, field) == getattr(theirs, field), field
    # Norms are written in four bytes by the conversion.
    assert 0 <= theirs.weights_bytes - ours.weights_bytes < 0.01 * ours.weights_bytes


def test_a_quant_for_a_checkpoint() -> None:
    """With a quant a checkpoint is described as it would be after conversion."""
    spec = describe(str(PYSTD_1M), quant="Q8_0")
    assert (spec.format, spec.quant, spec.is_estimated) == ("gguf", "Q8_0", True)
    assert spec.weights_bytes == describe_gguf(pystd_1m_gguf("Q8_0")).weights_bytes


def test_a_config_alone_needs_a_quant() -> None:
    """A config.json is described in the quant that is named, and refused without."""
    path = str(PYSTD_1M / "config.json")
    assert describe(path, quant="Q8_0").name == "pystd-1m"
    with pytest.raises(InvalidRequest, match="--quant Q4_K_M"):
        describe(path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("language_model.lm_head.weight", "output.weight"),
        ("model.language_model.embed_tokens_per_layer.weight", "per_layer_token_embd.weight"),
        ("model.layers.7.self_attn.q_proj.weight", "blk.7.self_attn.q_proj.weight"),
        ("model.layers.7.mlp.experts.3.up_proj.weight", "blk.7.ffn_up_exps.weight"),
        ("model.layers.7.block_sparse_moe.experts.3.w2.weight", "blk.7.ffn_down_exps.weight"),
        (
            "model.layers.7.mlp.shared_experts.up_proj.weight",
            "blk.7.mlp.shared_experts.up_proj.weight",
        ),
        ("vision_tower.blocks.0.attn.qkv.weight", "v.vision_tower.blocks.0.attn.qkv.weight"),
    ],
)
def test_names(name: str, expected: str) -> None:
    """Each part of a checkpoint is known by its name."""
    assert gguf_name(name) == expected
