"""From dimensions to the keys and tensors that llama.cpp's loader wants, by architecture.

A template yields names and shapes; the types come from the quant's recipe.  To add one: a function
in `layers`, an entry in `_LAYERS`, the keys of its own in `keys`, tiny dimensions in `dimensions`;
the integration test then loads it and decodes with it.

Source: `load_arch_hparams` and `load_arch_tensors` of llama.cpp's src/models/*.cpp.
"""

from collections.abc import Callable, Iterator

from brim.bench.standin import layers
from brim.bench.standin.blueprint import Blueprint, Tensor
from brim.bench.standin.dimensions import Dimensions
from brim.bench.standin.keys import metadata_pairs
from brim.bench.standin.layers import Shaped
from brim.errors import Unsupported
from brim.registry.quants import Model, gguf_tensors, parse_quant

_LAYERS: dict[str, Callable[[Dimensions, int], Iterator[Shaped]]] = {
    "deepseek2": layers.deepseek2,
    "falcon-h1": layers.falcon_h1,
    "gemma2": layers.gemma,
    "gemma3": layers.gemma,
    "glm4moe": layers.glm4moe,
    "gpt-oss": layers.gpt_oss,
    "jamba": layers.jamba,
    "lfm2": layers.lfm2,
    "llama": layers.llama,
    "mamba": layers.mamba,
    "mistral3": layers.llama,
    "phi3": layers.phi3,
    "qwen2": layers.llama,
    "qwen3": layers.llama,
    "qwen3moe": layers.llama,
    "qwen3next": layers.qwen3next,
    "qwen35": layers.qwen3next,
    "qwen35moe": layers.qwen3next,
    "smollm3": layers.llama,
}

ARCHITECTURES = tuple(_LAYERS)
"""GGUF's names of the architectures that stand-ins can be made of without a header to clone."""


def blueprint(dimensions: Dimensions, quant: str = "Q4_K_M") -> Blueprint:
    """The file of a model with these dimensions, quantised by llama.cpp's recipe for `quant`.

    Raises:
        Unsupported: There is no template for the architecture, or the quant is MLX's.
        InvalidRequest: No quant is called so.
    """
    recipe = parse_quant(quant)
    if not isinstance(recipe, str):
        raise Unsupported(f"stand-ins are GGUF files, and {recipe.name} is not GGUF's; try Q4_K_M")
    shaped = list(shapes(dimensions))
    types = _types(shaped, recipe, dimensions)
    tensors = tuple(Tensor(name, shape, types.get(name, "F32")) for name, shape in shaped)
    return Blueprint(tuple(metadata_pairs(dimensions, recipe)), tensors)


def _types(shaped: list[Shaped], recipe: str, d: Dimensions) -> dict[str, str]:
    """The types of all weights; what is no weight (biases, state decays) stays F32."""
    weights = [(name, shape) for name, shape in shaped if name.endswith(".weight")]
    model = Model(
        architecture=d.architecture,
        num_layers=d.num_layers,
        num_experts=d.num_experts,
        num_heads=d.num_heads,
        num_kv_heads=d.num_kv_heads,
    )
    return {tensor.name: tensor.type_name for tensor in gguf_tensors(weights, recipe, model)}


def shapes(dimensions: Dimensions) -> Iterator[Shaped]:
    """Name and shape (row length first) of every tensor, in the file's order.

    Raises:
        Unsupported: There is no template for the architecture.
    """
    d = dimensions
    if d.architecture not in _LAYERS:
        raise Unsupported(
            f"no template for '{d.architecture}'; give a GGUF file of it, or one of "
            f"{', '.join(ARCHITECTURES)}"
        )
    yield "token_embd.weight", (d.hidden_size, d.vocab_size)
    if d.architecture == "lfm2":
        yield "token_embd_norm.weight", (d.hidden_size,)
    else:
        yield "output_norm.weight", (d.hidden_size,)
    if not d.is_tied:
        yield "output.weight", (d.hidden_size, d.vocab_size)
    yield from layers.rope_factors(d)
    for layer in range(d.num_layers):
        for name, shape in _LAYERS[d.architecture](d, layer):
            yield f"blk.{layer}.{name}", shape
