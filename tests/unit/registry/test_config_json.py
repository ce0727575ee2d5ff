"""Descriptions from a config.json alone."""

from typing import Any

import msgspec
import pytest
from support.models import PYSTD_1M, pystd_1m_gguf

from brim.core.model import KvLayer, ModelSpec
from brim.errors import InvalidRequest, ModelFileError
from brim.planner.overhead import llamacpp_overhead_bytes
from brim.registry.config_json import spec_from_config
from brim.registry.describe import describe_gguf
from brim.registry.gguf_keys import MERGES
from brim.registry.safetensors_header import read_json

QWEN3: dict[str, Any] = {
    "model_type": "qwen3", "hidden_size": 4096, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 12288, "vocab_size": 151936, "max_position_embeddings": 40960,
}  # fmt: skip

MIXTURE = QWEN3 | {
    "model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8,
    "moe_intermediate_size": 768, "num_hidden_layers": 48, "hidden_size": 2048,
    "num_key_value_heads": 4,
}  # fmt: skip


def spec(config: dict[str, Any], quant: str = "Q4_K_M") -> ModelSpec:
    """The description of a config."""
    return spec_from_config(config, quant=quant, name="m")


def llamacpp_bytes(model: ModelSpec) -> int:
    """What llama.cpp allocates for it beside logged buffers, on a GPU."""
    return llamacpp_overhead_bytes(
        model,
        kv_tokens=1024,
        max_sequences=1,
        kv_type_v="f16",
        micro_batch_tokens=512,
        flash_attention=True,
        on_gpu=True,
    )


class TestFields:
    def test_dense(self) -> None:
        """A dense model's dimensions are its config's, and it is marked as estimated."""
        found = spec(QWEN3)
        assert (found.architecture, found.format, found.quant) == ("qwen3", "gguf", "Q4_K_M")
        assert (found.num_layers, found.hidden_size, found.feed_forward_size) == (36, 4096, 12288)
        assert found.kv_layers == (KvLayer(key_width=1024, value_width=1024),) * 36
        assert (found.vocab_size, found.trained_context_tokens) == (151936, 40960)
        assert found.is_estimated
        assert found.paths == ()

    def test_mixture(self) -> None:
        """Of a mixture's 30 billion weights three are read; its experts' width stands for all."""
        found = spec(MIXTURE)
        assert (found.num_experts, found.num_active_experts) == (128, 8)
        assert found.num_parameters == pytest.approx(30.53e9, rel=0.001)
        assert found.active_parameters == pytest.approx(3.04e9, rel=0.001)
        assert found.feed_forward_size == 768
        assert found.widths["expert_feed_forward_length"] == 768

    @pytest.mark.parametrize(
        ("changes", "num_mixtures"),
        [
            ({"decoder_sparse_step": 2}, 24),
            ({"mlp_only_layers": [0, 1, 47]}, 45),
            ({"first_k_dense_replace": 3}, 45),
            ({"moe_layer_freq": [0] + [1] * 47}, 47),
        ],
    )
    def test_layers_without_experts(self, changes: dict[str, Any], num_mixtures: int) -> None:
        """A config says in several ways which layers of a mixture are dense."""
        router = 2048 * 128
        experts, dense = 3 * 2048 * 768 * 128 + router, 3 * 2048 * 12288
        saved = (48 - num_mixtures) * (experts - dense)
        all_mixtures = spec(MIXTURE).num_parameters
        assert spec(MIXTURE | changes).num_parameters == all_mixtures - saved

    def test_mlx(self) -> None:
        """MLX's four bits in groups of 64 are four and a half a weight."""
        found = spec(QWEN3, "MLX 4bit")
        assert (found.format, found.quant) == ("safetensors", "MLX 4bit")
        assert found.weights_bytes * 8 / found.num_parameters == pytest.approx(4.5, rel=0.001)
        assert spec(QWEN3, "MLX 8bit g32").weights_bytes > spec(QWEN3, "MLX 8bit").weights_bytes

    def test_same_config_same_fingerprint(self) -> None:
        """It follows the config and the quant, not the order of keys."""
        turned = dict(reversed(QWEN3.items()))
        assert spec(QWEN3).fingerprint == spec(turned).fingerprint
        assert spec(QWEN3).fingerprint != spec(QWEN3, "Q8_0").fingerprint

    def test_better_quants_are_larger(self) -> None:
        """From two bits to sixteen every step costs bytes."""
        words = "IQ1_S IQ2_XXS Q2_K Q3_K_M IQ4_XS Q4_K_M Q5_K_M Q6_K Q8_0 F16 F32"
        sizes = [spec(QWEN3, quant).weights_bytes for quant in words.split()]
        assert sizes == sorted(set(sizes))

    def test_agrees_with_the_file(self) -> None:
        """A config and the file converted from its checkpoint describe the same model."""
        ours = spec(read_json(PYSTD_1M / "config.json"), "Q8_0")
        theirs = describe_gguf(pystd_1m_gguf("Q8_0"))
        for field in (
            "architecture", "num_parameters", "weights_bytes", "active_bytes", "num_layers",
            "kv_layers", "num_kv_heads", "feed_forward_size", "vocab_size", "embedding_bytes",
            "matrix_bytes", "trained_context_tokens", "quant",
        ):  # fmt: skip
            assert getattr(ours, field) == getattr(theirs, field), field


class TestVocabulary:
    def test_an_unknown_number_of_merges_is_not_none(self) -> None:
        """A byte-pair vocabulary's merges are left to the planner, which counts one for a token."""
        assert MERGES not in spec(QWEN3).widths
        assert llamacpp_bytes(spec(QWEN3)) == llamacpp_bytes(
            msgspec.structs.replace(spec(QWEN3), widths={MERGES: 151_936})
        )

    @pytest.mark.parametrize(
        ("model_type", "vocab_size"), [("gemma3_text", 262_208), ("llama", 32_000)]
    )
    def test_vocabularies_without_merges(self, model_type: str, vocab_size: int) -> None:
        """Gemma's and Llama 2's SentencePiece have none, as their files say too."""
        changes = {"model_type": model_type, "vocab_size": vocab_size}
        assert spec(QWEN3 | changes).widths[MERGES] == 0


class TestLayers:
    def test_compressed(self) -> None:
        """DeepSeek's layers store 512 + 64 values a token."""
        found = spec(
            QWEN3 | {
                "model_type": "deepseek_v3", "kv_lora_rank": 512, "q_lora_rank": 1536,
                "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
            }
        )  # fmt: skip
        assert set(found.kv_layers) == {KvLayer(key_width=576, value_width=0)}
        assert found.widths["attention.kv_lora_rank"] == 512

    def test_windows_by_name(self) -> None:
        """`layer_types` says which layers look back a window only."""
        types = ["sliding_attention", "sliding_attention", "full_attention"]
        found = spec(
            QWEN3 | {"model_type": "gemma3_text", "num_hidden_layers": 3, "layer_types": types,
                     "sliding_window": 512}
        )  # fmt: skip
        assert [layer.window_tokens for layer in found.kv_layers] == [512, 512, None]

    def test_hybrid(self) -> None:
        """Of Qwen3.5's layers every fourth attends; the others keep states."""
        found = spec(
            QWEN3 | {
                "model_type": "qwen3_5", "linear_num_key_heads": 16, "linear_num_value_heads": 32,
                "linear_key_head_dim": 128, "linear_value_head_dim": 128,
            }
        )  # fmt: skip
        assert [layer.key_width for layer in found.kv_layers[:4]] == [0, 0, 0, 1024]
        assert found.num_recurrent_layers == 27
        convolved = 32 * 128 + 2 * 16 * 128
        assert found.recurrent_state_bytes == 27 * 4 * (3 * convolved + 128 * 32 * 128)

    def test_language_part(self) -> None:
        """Of a model that also sees the language model's part is described."""
        other = {"model_type": "qwen3_vl", "vision_config": {"hidden_size": 1}}
        nested = other | {"text_config": QWEN3}
        assert spec(nested).num_parameters == spec(QWEN3).num_parameters

    def test_unlisted_architecture(self) -> None:
        """An unknown model_type is described by its generic keys."""
        found = spec(QWEN3 | {"model_type": "brand_new"})
        assert found.num_parameters == spec(QWEN3).num_parameters


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"model_type": None}, "has no model_type"),
            ({"hidden_size": None}, "has no hidden_size"),
            ({"vocab_size": None}, "has no vocab_size"),
            ({"num_hidden_layers": 0}, "has no num_hidden_layers"),
            ({"num_hidden_layers": 10**6}, "has no num_hidden_layers"),
            ({"hidden_size": "wide"}, "hidden_size is 'wide'"),
            ({"hidden_size": 10**30}, "hidden_size is 1000"),
            ({"hidden_size": float("inf")}, "hidden_size is inf"),
            ({"hidden_size": True}, "hidden_size is True"),
            ({"layer_types": ["new_kind"] * 36}, "kind that is known"),
            ({"num_experts": 8, "model_type": "qwen3_moe"}, "has no num_experts_per_tok"),
        ],
    )
    def test_what_is_missing_is_named(self, changes: dict[str, Any], says: str) -> None:
        """A config that lacks a key, or says something impossible, is refused by the key."""
        with pytest.raises(ModelFileError, match="the config of m") as caught:
            spec(QWEN3 | changes)
        assert says in caught.value.message

    @pytest.mark.parametrize("quant", ["Q9_K", "MLX 7bit", "", "4", "MLX 4bit g48"])
    def test_unknown_quants(self, quant: str) -> None:
        """A quant that nobody makes gives the list of those that are made."""
        with pytest.raises(InvalidRequest, match="Q4_K_M"):
            spec(QWEN3, quant)
