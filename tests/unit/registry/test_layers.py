"""What each layer keeps, by the keys of a GGUF file; expected figures are llama.cpp's rules."""

from typing import Any

import pytest

from brim.core.model import KvLayer, ModelSpec
from brim.errors import ModelFileError
from brim.registry.describe import GgufModel
from brim.registry.gguf_header import GgufArray, TensorInfo
from brim.registry.gguf_keys import GgufKeys


def spec_of(
    architecture: str, keys: dict[str, Any], *, layers: int = 6, recurrent: str = ""
) -> ModelSpec:
    """The description of a model with 4 heads of 16 that share 2 keys, and with these keys."""
    base: dict[str, Any] = {
        "context_length": 1024, "embedding_length": 64, "block_count": layers,
        "attention.head_count": 4, "attention.head_count_kv": 2,
    }  # fmt: skip
    metadata: dict[str, Any] = {"general.architecture": architecture}
    for key, value in (base | keys).items():
        if isinstance(value, list):
            value = GgufArray(len(value), tuple(value))
        metadata[f"{architecture}.{key}"] = value
    names = ["token_embd.weight", *(f"blk.{i}.x.weight" for i in range(layers))]
    names += [f"blk.{digit}.ssm_in.weight" for digit in recurrent]
    tensors = [TensorInfo(name, (64, 8), "F16", 0, 1024) for name in names]
    return GgufModel(GgufKeys("m.gguf", metadata), tensors).spec("m", paths=(), fingerprint="")


def windows_of(architecture: str, keys: dict[str, Any], *, layers: int = 6) -> list[int]:
    """Tokens that each layer looks back; 0 for all."""
    spec = spec_of(architecture, keys, layers=layers)
    return [layer.window_tokens or 0 for layer in spec.kv_layers]


WINDOW = {"attention.sliding_window": 64}


class TestWindows:
    @pytest.mark.parametrize(
        ("architecture", "keys", "expected"),
        [
            ("llama", WINDOW, [0] * 6),
            ("qwen2", WINDOW, [0] * 6),
            ("phi3", WINDOW, [0] * 6),
            ("gemma2", {}, [4096, 0] * 3),
            ("gemma2", WINDOW, [64, 0] * 3),
            ("gemma3", WINDOW, [64] * 5 + [0]),
            ("gemma3", {}, [0] * 6),
            ("gpt-oss", WINDOW, [64, 0] * 3),
            ("cohere2", WINDOW, [64, 64, 64, 0, 64, 64]),
            ("cohere2moe", WINDOW, [0, 64, 64, 64, 0, 64]),
            ("smallthinker", WINDOW, [0, 4096, 4096, 4096, 0, 4096]),
            ("llama4", {}, [8192] * 3 + [0] + [8192] * 2),
            ("llama4", {"attention.sliding_window": 0}, [0] * 6),
            ("llama4", WINDOW, [8192] * 3 + [0] + [8192] * 2),
            ("exaone4", WINDOW, [0] * 6),
            ("gemma3", WINDOW | {"attention.sliding_window_pattern": 2}, [64, 0] * 3),
            (
                "gemma3",
                WINDOW | {"attention.sliding_window_pattern": [True, True, False] * 2},
                [64, 64, 0] * 2,
            ),
            ("mimo2", WINDOW, [0] * 6),
            ("lfm2", WINDOW, [64] * 6),
        ],
    )
    def test_pattern(self, architecture: str, keys: dict[str, Any], expected: list[int]) -> None:
        """Each architecture has windows where llama.cpp makes smaller caches, and only there."""
        assert windows_of(architecture, keys) == expected

    def test_one_size_only(self) -> None:
        """Of EXAONE 4 only the model with 64 layers has windows."""
        assert windows_of("exaone4", {}, layers=64)[:4] == [4096, 4096, 4096, 0]

    def test_a_pattern_that_is_too_short(self) -> None:
        """An array that does not reach all layers is refused by name."""
        with pytest.raises(ModelFileError, match=r"gemma3\.attention\.sliding_window_pattern"):
            windows_of("gemma3", WINDOW | {"attention.sliding_window_pattern": [True] * 5})


class TestStored:
    def test_grouped_queries(self) -> None:
        """A layer stores its KV heads, not its query heads."""
        assert spec_of("llama", {}).kv_layers == (KvLayer(key_width=32, value_width=32),) * 6

    def test_compressed(self) -> None:
        """With MLA a layer stores one vector and its rope part, and no values."""
        keys = {
            "attention.head_count_kv": 1, "attention.key_length": 576,
            "attention.value_length": 512, "attention.key_length_mla": 192,
            "attention.value_length_mla": 128,
        }  # fmt: skip
        spec = spec_of("deepseek2", keys)
        assert set(spec.kv_layers) == {KvLayer(key_width=576, value_width=0)}
        index = keys | {"attention.indexer.key_length": 128}
        assert spec_of("deepseek32", index).kv_layers[0].key_width == 576 + 128

    def test_without_the_keys_of_mla(self) -> None:
        """An early DeepSeek file has no such keys, and llama.cpp stores whole heads."""
        keys = {"attention.key_length": 192, "attention.value_length": 128}
        assert spec_of("deepseek2", keys).kv_layers[0] == KvLayer(key_width=384, value_width=256)

    def test_smaller_heads_in_windows(self) -> None:
        """Gemma 4 has other heads where it looks back a window, and its last layers share."""
        keys = WINDOW | {
            "attention.sliding_window_pattern": [True, False] * 3, "attention.key_length": 32,
            "attention.value_length": 32, "attention.key_length_swa": 16,
            "attention.value_length_swa": 16, "attention.shared_kv_layers": 3,
            "attention.head_count_kv": [2, 1] * 3,
        }  # fmt: skip
        assert [(k.key_width, k.window_tokens) for k in spec_of("gemma4", keys).kv_layers] == [
            (32, 64), (32, None), (32, 64), (0, None), (0, 64), (0, None),
        ]  # fmt: skip

    def test_gemma_3n_shares(self) -> None:
        """Of Gemma 3n the first twenty layers store keys and values."""
        stored = [layer.key_width for layer in spec_of("gemma3n", WINDOW, layers=30).kv_layers]
        assert stored == [32] * 20 + [0] * 10

    def test_embedders_store_nothing(self) -> None:
        """llama.cpp makes no cache for a BERT."""
        assert set(spec_of("bert", {}).kv_layers) == {KvLayer(key_width=0, value_width=0)}

    def test_recurrent_layers_store_no_tokens(self) -> None:
        """A hybrid's recurrent layers keep states instead; those of Falcon-H1 keep both."""
        state = {"ssm.conv_kernel": 4, "ssm.inner_size": 8, "ssm.state_size": 4}
        spec = spec_of("jamba", state, recurrent="0134")
        assert [layer.key_width for layer in spec.kv_layers] == [0, 0, 32, 0, 0, 32]
        assert spec.num_recurrent_layers == 4
        assert spec.recurrent_state_bytes == 4 * 4 * (3 * 8 + 4 * 8)
        both = spec_of("falcon-h1", state, recurrent="012345")
        assert both.kv_layers[0].key_width == 32
        assert both.num_recurrent_layers == 6

    def test_delta_attention(self) -> None:
        """Kimi's delta attention keeps a square for each head and three convolutions."""
        keys = {"kda.head_dim": 16, "ssm.conv_kernel": 4, "attention.head_count_kv": [0, 2] * 3}
        spec = spec_of("kimi-linear", keys, recurrent="024")
        assert spec.recurrent_state_bytes == 3 * 4 * (3 * 3 * 4 * 16 + 16 * 16 * 4)

    def test_linear_attention(self) -> None:
        """MiniMax's linear attention is told from its keys: all layers but every eighth."""
        spec = spec_of("minimax-01", {"attention.key_length": 16}, layers=8)
        assert [layer.key_width for layer in spec.kv_layers] == [0] * 7 + [32]
        assert spec.recurrent_state_bytes == 7 * 4 * 16 * 16 * 4


def test_layers_that_predict_several_tokens_do_not_decode() -> None:
    """The last blocks of a file with such heads are no layers, and nothing of them is read."""
    spec = spec_of("glm4moe", {"nextn_predict_layers": 1})
    assert spec.num_layers == len(spec.kv_layers) == len(spec.num_kv_heads) == 5
    assert spec.weights_bytes == 7 * 1024
    assert spec.active_bytes == 6 * 1024


def test_whole_numbers_of_the_header() -> None:
    """Keys that only some architectures have are handed on by their own names."""
    spec = spec_of("deepseek2", {"attention.kv_lora_rank": 512, "rope.freq_base": 1e4})
    assert spec.widths["attention.kv_lora_rank"] == 512
    assert "rope.freq_base" not in spec.widths
