import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter

from brim.errors import ModelFileError, NotFound
from brim.registry.describe import describe_gguf
from brim.registry.sources import DEMO_PATH

WriteLlama = Callable[..., Path]


@pytest.fixture
def split_model(tmp_path: Path) -> list[Path]:
    """A model that the gguf package wrote in three parts."""
    writer = GGUFWriter(tmp_path / "Big-Q8_0.gguf", "llama", split_max_tensors=1)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_head_count(4)
    for name in ("token_embd.weight", "blk.0.attn_q.weight", "output_norm.weight"):
        writer.add_tensor(name, np.zeros((4, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(tmp_path.glob("*.gguf"))


class TestOneFile:
    def test_demo(self) -> None:
        """The demo model's figures are those of its checkpoint."""
        spec = describe_gguf(DEMO_PATH, name="demo")
        assert (spec.name, spec.format, spec.architecture) == ("demo", "gguf", "llama")
        assert (spec.num_layers, spec.hidden_size, spec.num_heads) == (6, 256, 4)
        assert (spec.num_kv_heads, spec.key_dim, spec.value_dim) == ((2,) * 6, 64, 64)
        assert (spec.vocab_size, spec.trained_context_tokens) == (4096, 8192)
        assert (spec.feed_forward_size, spec.num_parameters) == (768, 5_770_496)
        assert (spec.quant, spec.license) == ("Q8_0", "PSF-2.0")
        # 13 norms of 256 in F32; everything else 34 bytes for each 32 weights.
        norms = 13 * 256
        assert spec.weights_bytes == norms * 4 + (5_770_496 - norms) // 32 * 34
        assert spec.chat_template is not None
        assert "<|im_start|>" in spec.chat_template
        assert spec.paths == (str(DEMO_PATH),)

    def test_name_is_the_lower_cased_stem(self, write_llama: WriteLlama) -> None:
        """A file without another name is called by its stem, lower-cased."""
        assert describe_gguf(write_llama()).name == "small-q8_0"

    def test_relative_paths_become_absolute(
        self, write_llama: WriteLlama, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A worker in another directory finds the file that was named here."""
        path = write_llama()
        monkeypatch.chdir(path.parent)
        assert describe_gguf(path.name).paths == (str(path),)

    def test_defaults(self, write_llama: WriteLlama) -> None:
        """Without KV heads every head has its own; without lengths a head is its share of width."""
        spec = describe_gguf(write_llama({"llama.attention.head_count_kv": None}))
        assert spec.num_kv_heads == (4, 4)
        assert (spec.key_dim, spec.value_dim) == (16, 16)
        assert spec.vocab_size == 8  # rows of the embedding, as there are no tokens
        assert spec.quant == "F32"  # the type of most bytes, as no recipe is named

    @pytest.mark.parametrize(
        ("changes", "field", "value"),
        [
            ({"llama.attention.head_count_kv": [2, 0]}, "num_kv_heads", (2, 0)),
            ({"llama.attention.head_count": [4, 8]}, "num_heads", 8),
            ({"llama.attention.key_length": 192}, "key_dim", 192),
            ({"llama.attention.value_length": 128}, "value_dim", 128),
            ({"llama.feed_forward_length": [256, 512]}, "feed_forward_size", 512),
            ({"llama.full_attention_interval": 2}, "num_kv_heads", (0, 2)),
            ({"tokenizer.ggml.tokens": ["a", "b", "c"]}, "vocab_size", 3),
            ({"general.file_type": 15}, "quant", "Q4_K_M"),
            ({"general.file_type": 1024 + 7}, "quant", "Q8_0"),
            ({"general.file_type": 777}, "quant", "F32"),
            ({"general.license": "apache-2.0"}, "license", "apache-2.0"),
        ],
    )
    def test_keys(
        self, write_llama: WriteLlama, changes: dict[str, Any], field: str, value: object
    ) -> None:
        """Each key that a file may have changes the field that it is about."""
        assert getattr(describe_gguf(write_llama(changes)), field) == value

    @pytest.mark.parametrize(
        ("changes", "weight", "state_values"),
        [
            (
                {
                    "llama.ssm.conv_kernel": 4,
                    "llama.ssm.inner_size": 128,
                    "llama.ssm.state_size": 16,
                    "llama.ssm.group_count": 2,
                },
                "ssm_conv1d.weight",
                3 * (128 + 2 * 2 * 16) + 16 * 128,
            ),
            ({"llama.wkv.head_size": 32}, "time_mix_w1.weight", 2 * 64 + 64 * 32),
            (
                {"llama.wkv.head_size": 32, "llama.token_shift_count": 1},
                "time_mix_w1.weight",
                64 + 64 * 32,
            ),
            ({"llama.shortconv.l_cache": 3}, "shortconv.conv.weight", 64 * 2),
            ({"llama.ssm.conv_kernel": 4, "llama.ssm.inner_size": 128}, "attn_q.weight", 0),
        ],
        ids=["mamba2", "rwkv6", "arwkv7", "lfm2", "no recurrent layer"],
    )
    def test_recurrent_states(
        self,
        tmp_path: Path,
        gguf_bytes: Callable[..., bytes],
        changes: dict[str, Any],
        weight: str,
        state_values: int,
    ) -> None:
        """Layers with recurrent weights keep f32 states of llama.cpp's sizes; others keep none."""
        pairs = {
            "general.architecture": "llama", "llama.context_length": 512,
            "llama.embedding_length": 64, "llama.block_count": 3, "llama.attention.head_count": 0,
        }  # fmt: skip
        names = [f"blk.0.{weight}", "blk.1.attn_q.weight", f"blk.2.{weight}", "blk.2.ffn_up.weight"]
        tensors = [(name, (8, 8), 0, 256 * number) for number, name in enumerate(names)]
        tensors.append(("token_embd.weight", (64, 8), 0, 1024))
        path = tmp_path / "hybrid.gguf"
        path.write_bytes(gguf_bytes(pairs | changes, tensors, data_bytes=1024 + 2048))
        assert describe_gguf(path).recurrent_state_bytes == 2 * 4 * state_values

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"llama.block_count": None}, "llama.block_count is missing"),
            ({"llama.block_count": "six"}, "llama.block_count is 'six'"),
            ({"llama.block_count": 4_000_000_000}, "llama.block_count is 4000000000"),
            ({"llama.embedding_length": 0}, "llama.embedding_length is 0"),
            ({"llama.context_length": 1.5}, "llama.context_length is 1.5"),
            ({"llama.attention.head_count_kv": [2, 2, 2]}, "head_count_kv is"),
            ({"llama.attention.head_count_kv": [2, -2]}, "head_count_kv is"),
            ({"general.architecture": None}, "has no general.architecture"),
            ({"general.architecture": "clip"}, "a vision or audio projector"),
            ({"general.type": "mmproj"}, "a vision or audio projector"),
            ({"general.type": "adapter"}, "a LoRA adapter"),
        ],
    )
    def test_what_is_no_usable_model(
        self, write_llama: WriteLlama, changes: dict[str, Any], says: str
    ) -> None:
        """A missing, absurd or foreign key is named together with the file."""
        path = write_llama(changes)
        with pytest.raises(ModelFileError) as caught:
            describe_gguf(path)
        assert says in caught.value.message
        assert str(path) in caught.value.message

    def test_fingerprint_follows_header_and_size(self, write_llama: WriteLlama) -> None:
        """It stays for the same file elsewhere, and changes with a key or with the length."""
        one = describe_gguf(write_llama(name="a.gguf")).fingerprint
        same = describe_gguf(write_llama(name="b.gguf")).fingerprint
        other = describe_gguf(write_llama({"general.name": "x"}, name="c.gguf")).fingerprint
        longer = write_llama(name="d.gguf")
        os.truncate(longer, longer.stat().st_size + 32)
        assert one == same
        assert len({one, other, describe_gguf(longer).fingerprint}) == 3


class TestSplitFiles:
    @pytest.mark.parametrize("named", [0, 1, 2])
    def test_any_part_names_the_model(self, split_model: list[Path], named: int) -> None:
        """All parts are found in order, whichever one is named, and counted together."""
        spec = describe_gguf(split_model[named])
        assert spec.paths == tuple(map(str, split_model))
        assert spec.name == "big-q8_0"
        assert spec.num_parameters == 3 * 4 * 64
        assert spec.weights_bytes == 3 * 4 * 64 * 4

    def test_missing_part(self, split_model: list[Path]) -> None:
        """The part that is not there is named."""
        split_model[1].unlink()
        with pytest.raises(ModelFileError, match=r"lacks Big-Q8_0-00002-of-00003\.gguf of the 3"):
            describe_gguf(split_model[0])

    def test_first_part_is_not_there(self, split_model: list[Path]) -> None:
        """A part that is named and missing is NotFound, as any file is."""
        split_model[0].unlink()
        with pytest.raises(NotFound):
            describe_gguf(split_model[0])

    def test_swapped_parts(self, split_model: list[Path]) -> None:
        """Parts under each other's names are noticed."""
        a, b = split_model[1].read_bytes(), split_model[2].read_bytes()
        split_model[1].write_bytes(b)
        split_model[2].write_bytes(a)
        with pytest.raises(ModelFileError, match="says that it is part 2"):
            describe_gguf(split_model[0])

    def test_a_lone_part_under_another_name(self, split_model: list[Path]) -> None:
        """The first part alone is not taken for a whole model."""
        lone = split_model[0].rename(split_model[0].with_name("renamed.gguf"))
        with pytest.raises(ModelFileError, match="of 3"):
            describe_gguf(lone)

    def test_impossible_numbers(self, write_llama: WriteLlama) -> None:
        """A name that says part 5 of 2 is refused."""
        with pytest.raises(ModelFileError, match="numbered 5 of 2"):
            describe_gguf(write_llama(name="x-00005-of-00002.gguf"))
