"""What MLX keeps for a sequence: types it can have, bytes, and what stays as it is."""

import msgspec
import pytest

from brim.core.model import KvLayer, ModelSpec
from brim.errors import ConfigError
from brim.planner.mlx_kv import (
    attention_is_fused,
    check_mlx_kv_types,
    float_bytes,
    group_size,
    layer_row_bytes,
    mlx_kv_bytes,
    mlx_kv_types,
    mlx_layers,
    mlx_state_bytes,
    unquantised_share,
)

ALL = {"f16", "q8_0", "q4_0"}
FULL = KvLayer(key_width=512, value_width=512)
WINDOW = KvLayer(key_width=512, value_width=512, window_tokens=1000)


def with_layers(spec: ModelSpec, *layers: KvLayer, **changes: object) -> ModelSpec:
    return msgspec.structs.replace(spec, kv_layers=layers, **changes)


def kv_bytes(spec: ModelSpec, kv_type: str = "f16", tokens: int = 8192, sequences: int = 1) -> int:
    return mlx_kv_bytes(
        spec, kv_tokens=tokens, max_sequences=sequences, kv_type_k=kv_type, kv_type_v=kv_type
    )


@pytest.mark.parametrize(
    ("dims", "group", "types"),
    [((64, 64), 64, ALL), ((192, 128), 64, ALL), ((96, 96), 32, ALL), ((80, 80), None, {"f16"}),
     ((128, 80), None, {"f16"})],
)  # fmt: skip
def test_groups_divide_both_heads(
    llama_1b: ModelSpec, dims: tuple[int, int], group: int | None, types: set[str]
) -> None:
    """Groups are of 64 values, or of 32 where heads ask for it; other heads stay unquantised."""
    spec = msgspec.structs.replace(llama_1b, key_dim=dims[0], value_dim=dims[1])
    assert group_size(spec) == group
    assert mlx_kv_types(spec) == types


@pytest.mark.parametrize(
    ("kv_type", "dim", "matrices", "num_bytes"),
    [("f16", 64, "BF16", 128), ("q8_0", 64, "MLX 4bit", 68), ("q4_0", 64, "F16", 36),
     ("q8_0", 96, "F16", 108), ("f16", 64, "F32", 256), ("q8_0", 64, "F32", 72)],
)  # fmt: skip
def test_a_value_takes_its_bits_and_its_share_of_scale_and_bias(
    llama_1b: ModelSpec, kv_type: str, dim: int, matrices: str, num_bytes: int
) -> None:
    """Scale and bias of a group are of the model's float type: half a bit each in groups of 64."""
    spec = msgspec.structs.replace(
        llama_1b, key_dim=dim, value_dim=dim, matrix_bytes={matrices: 10, "F64": 1}
    )
    one = KvLayer(key_width=dim, value_width=0)
    assert layer_row_bytes(spec, one, kv_type) == num_bytes


def test_f16_is_the_models_own_float_type(llama_1b: ModelSpec) -> None:
    """A checkpoint of F32 keeps its KV in f32, all others in two bytes a value."""
    single = msgspec.structs.replace(llama_1b, matrix_bytes={"F32": 9, "BF16": 1})
    assert (float_bytes(single), float_bytes(llama_1b)) == (4, 2)
    assert kv_bytes(single) == 2 * kv_bytes(llama_1b)


def test_every_sequence_has_buffers_of_its_own(llama_1b: ModelSpec) -> None:
    """A pool shared out by nine sequences takes eight blocks of 64 more than one sequence does."""
    assert kv_bytes(llama_1b) == 8192 * 32_768
    assert kv_bytes(llama_1b, sequences=9) == (8192 + 8 * 64) * 32_768


def test_windows_hold_the_window_and_slack(llama_1b: ModelSpec) -> None:
    """A window of 1,000 takes 1,280 tokens a sequence, never quantised; Gemma 2 has none."""
    spec = with_layers(llama_1b, WINDOW, FULL)
    assert kv_bytes(spec) == (1280 + 8192) * 2048
    assert kv_bytes(spec, "q8_0") == 1280 * 2048 + 8192 * 1088
    assert kv_bytes(spec, sequences=2) == (2560 + 8256) * 2048
    assert kv_bytes(spec, tokens=512) == 2 * 512 * 2048
    gemma2 = msgspec.structs.replace(spec, architecture="gemma2")
    assert kv_bytes(gemma2) == 2 * 8192 * 2048


def test_what_stays_unquantised_is_counted(llama_1b: ModelSpec) -> None:
    """The share of windows and states in a quantised cache's bytes is what they take of it."""
    spec = with_layers(llama_1b, WINDOW, FULL)
    share = unquantised_share(spec, kv_tokens=8192, max_sequences=1, kv_type="q8_0")
    assert share == pytest.approx(1280 * 2048 / (1280 * 2048 + 8192 * 1088))
    assert unquantised_share(llama_1b, kv_tokens=8192, max_sequences=1, kv_type="q8_0") == 0
    assert unquantised_share(llama_1b, kv_tokens=8192, max_sequences=1, kv_type="f16") == 1


def test_states_are_there_twice(llama_1b: ModelSpec) -> None:
    """Convolutions count in the model's type and states in f32, for each sequence and twice."""
    widths = {"ssm.conv_kernel": 4, "ssm.inner_size": 128, "ssm.state_size": 16,
              "ssm.group_count": 1}  # fmt: skip
    spec = with_layers(
        llama_1b, FULL, num_recurrent_layers=3, recurrent_state_bytes=99, widths=widths
    )
    one = 3 * (3 * (128 + 2 * 16) * 2 + 128 * 16 * 4)
    assert mlx_state_bytes(spec) == one
    assert kv_bytes(spec, tokens=256, sequences=3) == (256 + 128) * 2048 + 2 * 3 * one


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kv_layers": (KvLayer(key_width=576, value_width=0),)}, "one compressed vector"),
        ({"architecture": "gpt-oss"}, "attention sinks"),
        ({"architecture": "gemma2"}, "computes attention by itself"),
        ({"kv_layers": (FULL, KvLayer(key_width=0, value_width=0))}, "another layer's cache"),
        ({"kv_layers": (WINDOW, WINDOW)}, "no layer of it keeps all"),
        ({"key_dim": 80, "value_dim": 80}, "do not divide its heads of 80 and 80"),
    ],
)
def test_what_cannot_be_quantised_is_refused_with_its_reason(
    llama_1b: ModelSpec, changes: dict[str, object], reason: str
) -> None:
    """MLA, sinks, windows alone and odd heads keep f16; a wish for less is told why."""
    spec = msgspec.structs.replace(llama_1b, **changes)
    assert mlx_kv_types(spec) == {"f16"}
    check_mlx_kv_types(spec, "f16", "f16")
    with pytest.raises(ConfigError, match=f"MLX cannot quantise .* llama-1b: .*{reason}.*use f16"):
        check_mlx_kv_types(spec, "q8_0", "q8_0")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("q8_0", "f16", r"one type, not as q8_0/f16; use q8_0 or f16 for both"),
        ("q5_1", "q5_1", r"does not store KV as 'q5_1'; choose one of f16, q8_0, q4_0"),
        ("int8", "int8", r"knows no KV type named 'int8'"),
    ],
)
def test_types_that_mlx_does_not_have(
    llama_1b: ModelSpec, key: str, value: str, message: str
) -> None:
    """K and V have one type of three; everything else is refused with what there is."""
    with pytest.raises(ConfigError, match=message):
        check_mlx_kv_types(llama_1b, key, value)


def test_an_expanded_latent_is_whole_heads(llama_1b: ModelSpec) -> None:
    """DeepSeek V2's class keeps every head's keys and values, which groups of 64 divide."""
    spec = with_layers(
        llama_1b,
        KvLayer(key_width=576, value_width=0),
        num_heads=16,
        widths={"attention.latent_expanded": 1, "attention.key_length_mla": 192,
                "attention.value_length_mla": 128},
    )  # fmt: skip
    assert mlx_layers(spec) == (KvLayer(key_width=16 * 192, value_width=16 * 128),)
    assert mlx_kv_types(spec) == ALL


def test_an_index_keeps_its_keys_twice(llama_1b: ModelSpec) -> None:
    """DeepSeek's sparse attention has a second cache, whose keys are stored as values too."""
    spec = with_layers(
        llama_1b, KvLayer(key_width=576 + 128, value_width=0), architecture="deepseek32",
        widths={"attention.indexer.key_length": 128},
    )  # fmt: skip
    assert mlx_layers(spec)[0].value_width == 128
    assert mlx_kv_types(spec) == {"f16"}


def test_where_scores_stay_on_the_chip(llama_1b: ModelSpec) -> None:
    """Attention is fused on a GPU, for heads of 64, 80 or 128, over a cache of plain floats."""
    wide = msgspec.structs.replace(llama_1b, key_dim=256, value_dim=256)
    assert attention_is_fused(llama_1b, kv_type="f16", on_gpu=True)
    assert not attention_is_fused(llama_1b, kv_type="f16", on_gpu=False)
    assert not attention_is_fused(llama_1b, kv_type="q8_0", on_gpu=True)
    assert not attention_is_fused(wide, kv_type="f16", on_gpu=True)
