"""The types that a recipe gives each tensor are those that llama.cpp's quantiser writes."""

from pathlib import Path

import pytest

from brim.engine.llamacpp import log
from brim.engine.llamacpp.binding import lib
from brim.registry.ggml_types import FILE_TYPES
from brim.registry.gguf_header import read_gguf_header
from brim.registry.quants import RECIPES, Model, gguf_tensors
from brim.registry.sources import DEMO_PATH

# The others need an importance matrix, which the quantiser refuses to go without.
WITHOUT_IMATRIX = (
    "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0",
    "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K", "IQ3_S", "IQ3_M", "MXFP4_MOE", "TQ1_0", "TQ2_0",
)  # fmt: skip

# Six layers of the demo model: 4 heads that share 2 keys, 768 wide feed-forwards, tied embeddings.
MODEL = Model(architecture="llama", num_layers=6, num_experts=0, num_heads=4, num_kv_heads=2)


def quantised(recipe: str, out: Path) -> dict[str, str]:
    """Tensor -> type in the file that llama.cpp makes of the demo model."""
    log.install()
    params = lib.llama_model_quantize_default_params()
    params.ftype = next(number for number, name in FILE_TYPES.items() if name == recipe)
    params.allow_requantize = True
    params.nthread = 2
    assert lib.llama_model_quantize(str(DEMO_PATH).encode(), str(out).encode(), params) == 0
    return {tensor.name: tensor.type_name for tensor in read_gguf_header(out).tensors}


@pytest.mark.parametrize("recipe", WITHOUT_IMATRIX)
def test_types(recipe: str, tmp_path: Path) -> None:
    """Every tensor of the demo model gets the type that the recipe's rules name."""
    shapes = [(tensor.name, tensor.shape) for tensor in read_gguf_header(DEMO_PATH).tensors]
    ours = {tensor.name: tensor.type_name for tensor in gguf_tensors(shapes, recipe, MODEL)}
    assert ours == quantised(recipe, tmp_path / "quantised.gguf")


def test_every_recipe_is_known_to_the_format() -> None:
    """A recipe's name is one that a GGUF file can give as its own."""
    assert set(RECIPES) <= set(FILE_TYPES.values())
