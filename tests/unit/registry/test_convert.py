import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.models import SHARED

from brim.errors import BrimError, ModelFileError, NotFound, Unsupported
from brim.registry.convert import convert_to_gguf, rope_rows_interleaved
from brim.registry.gguf_header import GgufArray, read_gguf_header

Tensors = dict[str, tuple[str, list[int], bytes]]


def tensors_of(path: Path) -> Tensors:
    """Name -> (type, shape, bytes) of all tensors of a GGUF file."""
    data = path.read_bytes()
    return {
        t.name: (t.type_name, list(t.shape), data[t.offset : t.offset + t.size_bytes])
        for t in read_gguf_header(path).tensors
    }


def field(path: Path, key: str) -> Any:
    """One metadata value; arrays as lists."""
    found = read_gguf_header(path, keep=frozenset({key})).metadata.get(key)
    return list(found.items or ()) if isinstance(found, GgufArray) else found


def change_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite a JSON file after `change` was applied to it."""
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


@pytest.mark.parametrize("name", ["pystd-1m", "pystd-6m"])
def test_same_as_the_reference_conversion(tmp_path: Path, name: str) -> None:
    """All tensors are those of another converter's F16 file, bit for bit, and so are the tokens."""
    reference = SHARED / name / "model-f16.gguf"
    if not reference.is_file():
        pytest.skip(f"there is no {reference}; set BRIM_TEST_MODELS to where the models are")
    ours = tmp_path / "f16.gguf"
    convert_to_gguf(reference.parent, ours, "F16")
    assert tensors_of(ours) == tensors_of(reference)
    for key in ("tokens", "token_type", "merges", "bos_token_id", "eos_token_id", "eot_token_id"):
        assert field(ours, f"tokenizer.ggml.{key}") == field(reference, f"tokenizer.ggml.{key}")
    for key in ("tokenizer.chat_template", "tokenizer.ggml.pre", "llama.rope.freq_base"):
        assert field(ours, key) == field(reference, key)


class TestResult:
    def test_f16(self, checkpoint: Path, tmp_path: Path) -> None:
        """Matrices keep their F16 bits, norms become F32, and the description fits."""
        spec = convert_to_gguf(checkpoint, tmp_path / "m.gguf", "F16")
        source = load_file(checkpoint / "model.safetensors")
        found = tensors_of(tmp_path / "m.gguf")
        down = source["model.layers.1.mlp.down_proj.weight"]
        assert found["blk.1.ffn_down.weight"] == ("F16", [384, 128], down.tobytes())
        norm = source["model.norm.weight"].astype(np.float32)
        assert found["output_norm.weight"] == ("F32", [128], norm.tobytes())
        assert "output.weight" not in found  # tied
        assert spec.num_parameters == sum(values.size for values in source.values())
        assert (spec.num_layers, spec.num_kv_heads, spec.quant) == (2, (1, 1), "F16")
        assert (spec.vocab_size, spec.trained_context_tokens) == (4096, 8192)

    def test_q8_0(self, checkpoint: Path, tmp_path: Path) -> None:
        """Each weight is within half a step of its block's scale, and norms stay F32."""
        spec = convert_to_gguf(checkpoint, tmp_path / "m.gguf", "Q8_0")
        assert spec.quant == "Q8_0"
        found = tensors_of(tmp_path / "m.gguf")
        assert found["output_norm.weight"][0] == "F32"
        kind, shape, data = found["blk.0.attn_v.weight"]
        assert (kind, shape) == ("Q8_0", [128, 64])
        rows = np.frombuffer(data, np.uint8).reshape(64, -1)
        values = gguf.dequantize(rows, gguf.GGMLQuantizationType.Q8_0).reshape(-1, 32)
        source = load_file(checkpoint / "model.safetensors")
        exact = source["model.layers.0.self_attn.v_proj.weight"].astype(np.float32).reshape(-1, 32)
        steps = np.abs(exact).max(axis=1, keepdims=True) / 127
        # Half a step, and what an F16 scale is off by (2^-11) at 127 steps.
        assert (np.abs(values - exact) <= steps * (0.5 + 127 / 2**11)).all()

    def test_q8_0_leaves_odd_rows(self, checkpoint: Path, tmp_path: Path) -> None:
        """Matrices whose rows are no multiple of 32 long stay F16."""
        source = load_file(checkpoint / "model.safetensors")
        for name, values in source.items():
            if "mlp" in name:
                source[name] = values[:, :376] if "down" in name else values[:376]
        source = {name: np.ascontiguousarray(values) for name, values in source.items()}
        save_file(source, checkpoint / "model.safetensors")
        change_json(checkpoint / "config.json", lambda c: c.update(intermediate_size=376))
        convert_to_gguf(checkpoint, tmp_path / "m.gguf", "Q8_0")
        found = tensors_of(tmp_path / "m.gguf")
        assert found["blk.0.ffn_down.weight"][:2] == ("F16", [376, 128])
        assert found["blk.0.ffn_up.weight"][:2] == ("Q8_0", [128, 376])

    def test_text(self, checkpoint: Path, tmp_path: Path) -> None:
        """Control tokens, the end of a turn, the template, name and license are written."""
        path = tmp_path / "m.gguf"
        convert_to_gguf(checkpoint, path, "Q8_0", name="A name", license="MIT")
        assert field(path, "tokenizer.ggml.token_type")[:4] == [3, 3, 3, 1]
        assert field(path, "tokenizer.ggml.eot_token_id") == 2
        assert field(path, "tokenizer.ggml.add_bos_token") is False
        assert (field(path, "general.name"), field(path, "general.license")) == ("A name", "MIT")

    def test_template_from_its_own_file(self, checkpoint: Path, tmp_path: Path) -> None:
        """A chat_template.jinja comes before the one in the tokenizer's settings."""
        (checkpoint / "chat_template.jinja").write_text("{{ messages }}")
        spec = convert_to_gguf(checkpoint, tmp_path / "m.gguf", "Q8_0")
        assert spec.chat_template == "{{ messages }}"
        assert field(tmp_path / "m.gguf", "tokenizer.ggml.eot_token_id") is None

    def test_untied_embeddings(self, checkpoint: Path, tmp_path: Path) -> None:
        """An output matrix of its own is written as such."""
        source = load_file(checkpoint / "model.safetensors")
        source["lm_head.weight"] = -source["model.embed_tokens.weight"]
        save_file(source, checkpoint / "model.safetensors")
        with pytest.raises(ModelFileError, match="they differ"):
            convert_to_gguf(checkpoint, tmp_path / "m.gguf", "F16")
        change_json(checkpoint / "config.json", lambda c: c.update(tie_word_embeddings=False))
        convert_to_gguf(checkpoint, tmp_path / "m.gguf", "F16")
        head = tensors_of(tmp_path / "m.gguf")["output.weight"]
        assert head == ("F16", [128, 4096], source["lm_head.weight"].tobytes())

    def test_unused_rows_of_the_embeddings(self, checkpoint: Path, tmp_path: Path) -> None:
        """A vocabulary smaller than its embeddings is filled up with unused tokens."""
        tokenizer = checkpoint / "tokenizer.json"

        def drop_last(found: dict[str, Any]) -> None:
            model = found["model"]
            last = max(model["vocab"], key=model["vocab"].__getitem__)
            del model["vocab"][last]
            model["merges"] = [pair for pair in model["merges"] if "".join(pair) != last]

        change_json(tokenizer, drop_last)
        spec = convert_to_gguf(checkpoint, tmp_path / "m.gguf", "Q8_0")
        assert spec.vocab_size == 4096
        assert field(tmp_path / "m.gguf", "tokenizer.ggml.tokens")[-1] == "[PAD4095]"
        assert field(tmp_path / "m.gguf", "tokenizer.ggml.token_type")[-1] == 5

    def test_rotary_order(self) -> None:
        """Element i and i + half of each head become neighbours."""
        rows = np.arange(8, dtype=np.float32).reshape(8, 1)
        assert rope_rows_interleaved(rows, 2).ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def set_config(**changes: Any) -> Callable[[Path], None]:
    """Changes settings of config.json."""
    return lambda model: change_json(model / "config.json", lambda c: c.update(changes))


def set_tokenizer(*keys: str, value: Any) -> Callable[[Path], None]:
    """Changes one value inside tokenizer.json."""

    def change(found: dict[str, Any]) -> None:
        for key in keys[:-1]:
            found = found[key]
        found[keys[-1]] = value

    return lambda model: change_json(model / "tokenizer.json", change)


def set_tensor(name: str, values: Any) -> Callable[[Path], None]:
    """Adds, replaces or (with None) drops a tensor."""

    def change(model: Path) -> None:
        source = load_file(model / "model.safetensors")
        source.pop(name, None)
        if values is not None:
            source[name] = values
        save_file(source, model / "model.safetensors")

    return change


def remove(name: str) -> Callable[[Path], None]:
    """Deletes a file."""
    return lambda model: (model / name).unlink()


class TestRefusals:
    @pytest.mark.parametrize(
        ("spoil", "error", "says"),
        [
            (set_config(architectures=["MambaForCausalLM"]), Unsupported, "says MambaForCausalLM"),
            (set_config(architectures=None), Unsupported, "says none"),
            (set_config(hidden_act="gelu"), Unsupported, "activation gelu"),
            (set_config(rope_scaling={"rope_type": "llama3"}), Unsupported, "llama3 rope"),
            (set_config(rope_scaling={"type": "linear"}), Unsupported, "linear rope"),
            (set_config(hidden_size="wide"), ModelFileError, "hidden_size"),
            (set_config(num_attention_heads=0), ModelFileError, "0 is no size"),
            (set_config(num_hidden_layers=3), ModelFileError, "lacks model.layers.2."),
            (set_config(num_hidden_layers=10**9), ModelFileError, "lacks model.layers."),
            (set_config(num_hidden_layers=1), Unsupported, "the tensor model.layers.1."),
            (set_config(intermediate_size=400), ModelFileError, "different models"),
            (set_config(vocab_size=4095), ModelFileError, "different models"),
            (remove("config.json"), NotFound, "has no config.json"),
            (remove("model.safetensors"), NotFound, "has no model.safetensors"),
            (remove("tokenizer.json"), ModelFileError, "tokenizer.json cannot be read"),
            (
                set_tensor("model.layers.0.self_attn.q_proj.bias", np.zeros(128, np.float16)),
                Unsupported,
                "q_proj.bias",
            ),
            (set_tensor("model.norm.weight", None), ModelFileError, "lacks model.norm.weight"),
            (
                set_tensor("model.norm.weight", np.full(128, np.nan, np.float16)),
                ModelFileError,
                "model.norm.weight holds values that are not finite",
            ),
            (
                set_tensor("model.embed_tokens.weight", np.full((4096, 128), 1e6, np.float32)),
                ModelFileError,
                "not finite in F16",
            ),
            (set_tokenizer("model", "type", value="Unigram"), Unsupported, "this one is Unigram"),
            (set_tokenizer("model", value=7), Unsupported, "this one is None"),
            (set_tokenizer("model", "byte_fallback", value=True), Unsupported, "byte_fallback"),
            (set_tokenizer("model", "vocab", value=[]), ModelFileError, "is damaged"),
            (set_tokenizer("model", "vocab", value={"a": 9000}), ModelFileError, "up to 9000"),
            (set_tokenizer("model", "merges", value=["a b c"]), Unsupported, "the merge 'a b c'"),
            (set_tokenizer("normalizer", value={"type": "NFC"}), Unsupported, "normalizer NFC"),
            (
                set_tokenizer("pre_tokenizer", "add_prefix_space", value=True),
                Unsupported,
                "as GPT-2 does",
            ),
            (
                set_tokenizer("pre_tokenizer", value={"type": "Sequence", "pretokenizers": []}),
                Unsupported,
                "not Sequence",
            ),
            (set_tokenizer("pre_tokenizer", value=None), Unsupported, "as GPT-2 does"),
            (
                set_tokenizer("post_processor", value={"type": "TemplateProcessing"}),
                Unsupported,
                "TemplateProcessing",
            ),
        ],
    )
    def test_what_cannot_be_converted_is_named(
        self,
        checkpoint: Path,
        tmp_path: Path,
        spoil: Callable[[Path], None],
        error: type[BrimError],
        says: str,
    ) -> None:
        """A setting, tensor or tokenizer that is not understood stops the conversion by name."""
        spoil(checkpoint)
        with pytest.raises(error) as caught:
            convert_to_gguf(checkpoint, tmp_path / "m.gguf", "F16")
        assert says in caught.value.message
        assert list(tmp_path.glob("m.gguf*")) == []

    def test_an_existing_file_survives_a_failure(self, checkpoint: Path, tmp_path: Path) -> None:
        """What stood under the name stays until the new file is complete."""
        out = tmp_path / "m.gguf"
        out.write_text("old")
        set_tensor("model.norm.weight", np.full(128, np.inf, np.float16))(checkpoint)
        with pytest.raises(ModelFileError):
            convert_to_gguf(checkpoint, out, "F16")
        assert out.read_text() == "old"

    @pytest.mark.parametrize("quant", ["F16", "Q8_0"])
    def test_no_directory_to_write_to(
        self, checkpoint: Path, tmp_path: Path, quant: Literal["F16", "Q8_0"]
    ) -> None:
        """A place that does not exist is named."""
        with pytest.raises(NotFound, match="there is no directory"):
            convert_to_gguf(checkpoint, tmp_path / "none" / "m.gguf", quant)
