"""Slices of models, and what two of them say about the whole."""

from collections import Counter
from pathlib import Path

import pytest

from brim.bench.standin import blueprint, sliced, tiny, write
from brim.bench.standin.slices import Depths, depths, extrapolated, layer_kinds, num_layers
from brim.errors import InvalidRequest
from brim.registry.describe import describe_gguf


def test_a_slice_is_described_with_its_layers(tmp_path: Path) -> None:
    """Everything else of the description is the whole model's."""
    whole = blueprint(tiny("lfm2", num_layers=12))
    specs = [
        describe_gguf(write(tmp_path / f"{n}.gguf", sliced(whole, n), with_data=False))
        for n in (12, 8)
    ]
    assert [spec.num_layers for spec in specs] == [12, 8]
    assert [len(spec.kv_layers) for spec in specs] == [12, 8]
    assert specs[0].kv_layers[:8] == specs[1].kv_layers
    assert specs[0].hidden_size == specs[1].hidden_size
    assert specs[1].num_recurrent_layers == 4


def test_a_slice_of_all_layers_is_the_whole() -> None:
    """No tensor changes its place or type."""
    whole = blueprint(tiny("qwen3moe", num_layers=9))
    assert sliced(whole, 9) == whole


def test_types_come_from_layers_spread_over_the_model() -> None:
    """Recipes give the first layers more bits, and a slice of them would be too large."""
    whole = blueprint(tiny("llama", num_layers=32), "Q4_K_M")
    part = sliced(whole, 4)
    shares = []
    for model in (whole, part):
        downs = [t.type_name for t in model.tensors if t.name.endswith("ffn_down.weight")]
        shares.append(Counter(downs)["Q6_K"] / len(downs))
    # The first four layers themselves are Q6_K throughout.
    assert shares == [0.5, 0.5]


def test_the_bytes_of_two_slices_scale_to_those_of_the_whole() -> None:
    """What is fixed and what a layer takes are both found."""
    whole = blueprint(tiny("llama", num_layers=32), "Q8_0")
    at = Depths(shallow=3, deep=10, period=1)
    shallow, deep = (sliced(whole, n).weights_bytes for n in (at.shallow, at.deep))
    assert extrapolated(shallow, deep, at, 32) == whole.weights_bytes


def test_heads_that_predict_further_tokens_are_not_sliced(tmp_path: Path) -> None:
    """They come after the layers and are no layers."""
    from brim.bench.standin.blueprint import Blueprint, Tensor, count_pair

    model = blueprint(tiny("llama", num_layers=4))
    blocks = count_pair("llama.block_count", 5)
    pairs = [blocks if pair.key == blocks.key else pair for pair in model.pairs]
    extra = (count_pair("llama.nextn_predict_layers", 1),)
    heads = (Tensor("blk.4.nextn.eh_proj.weight", (512, 256), "F16"),)
    whole = Blueprint((*pairs, *extra), (*model.tensors, *heads))
    assert num_layers(whole) == 4
    part = sliced(whole, 4)
    assert part.tensors == model.tensors
    assert not [pair for pair in part.pairs if "nextn" in pair.key]


def test_a_slice_without_a_kind_of_layer_is_refused() -> None:
    """Backends abort on a hybrid that never attends."""
    whole = blueprint(tiny("qwen3next", num_layers=8))
    with pytest.raises(InvalidRequest, match="the first 4 of which show all kinds; choose 4 to 8"):
        sliced(whole, 3)
    with pytest.raises(InvalidRequest, match="not 9"):
        sliced(whole, 9)


@pytest.mark.parametrize(
    ("kinds", "most", "expected"),
    [
        ("a" * 32, 8, (2, 8, 1)),
        ("a" * 32, 2, (1, 2, 1)),
        # Dense layers at the beginning are in both slices.
        ("d" + "e" * 26, 10, (2, 10, 1)),
        # Gemma 3: a rest of two layers is in the shallow slice, so that periods lie between.
        ("wwwwwf" * 4 + "ww", 20, (8, 20, 6)),
        ("rrra" * 12, 12, (4, 12, 4)),
    ],
)
def test_depths_differ_by_whole_periods(
    kinds: str, most: int, expected: tuple[int, int, int]
) -> None:
    """The whole is the shallow slice and a number of the same steps."""
    found = depths(kinds, most)
    assert found is not None
    assert (found.shallow, found.deep, found.period) == expected
    assert (len(kinds) - found.shallow) % found.period == 0
    assert set(kinds[: found.shallow]) == set(kinds)


def test_too_few_layers_give_no_depths() -> None:
    """One layer of each kind twice is the least."""
    assert depths("a" * 8, 1) is None
    assert depths("rrra" * 4, 7) is None


def test_windows_make_kinds_of_layers(tmp_path: Path) -> None:
    """Layers with the same tensors differ where one of them sees everything."""
    whole = blueprint(tiny("gemma3", num_layers=12))
    spec = describe_gguf(write(tmp_path / "m.gguf", whole, with_data=False))
    found = depths(layer_kinds(whole, spec.kv_layers), 12)
    assert found is not None
    assert found.period == 6
