"""What each quant makes of a model's tensors: GGUF's recipes, and MLX's groups.

A recipe is a name for a mix: most matrices get its base type, those that matter more get better
ones.  The rules are those of llama.cpp's quantiser, with an importance matrix for the types that
are published with one.

Source: `llama_tensor_get_type` and what it calls in llama.cpp's llama-quant.cpp; mlx-lm's
`quantize_model`.  How far published files lie from them: tests/unit/registry/test_known_sizes.py.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from brim.errors import InvalidRequest
from brim.registry.ggml_types import GGML_TYPES, GgmlType
from brim.registry.gguf_header import TensorInfo

Shape = tuple[str, tuple[int, ...]]
"""A tensor's name and its dimensions, row length first."""

TYPES: dict[str, GgmlType] = {kind.name: kind for kind in GGML_TYPES.values()}


class Model(NamedTuple):
    """What the rules ask about a model."""

    architecture: str
    num_layers: int
    num_experts: int
    num_heads: int
    num_kv_heads: int

    @property
    def shares_keys(self) -> bool:
        """Whether four and more heads share one key: its values are few, and worth more bits."""
        return self.num_kv_heads > 0 and self.num_heads // self.num_kv_heads >= 4

    @property
    def is_70b(self) -> bool:
        """llama.cpp's size class of models whose values get more bits."""
        return (
            self.architecture in ("llama", "qwen2", "deci")
            and self.num_layers == 80
            and self.num_heads != self.num_kv_heads
        )


Rule = Callable[[int, int, Model], str]
"""Position among n tensors of a kind, n, the model -> type."""


def _always(name: str) -> Rule:
    return lambda position, count, model: name


def _spread(better: str, base: str) -> Rule:
    """The first and last eighth and every third between them."""

    def rule(position: int, count: int, model: Model) -> str:
        first, last = count // 8, 7 * count // 8
        is_better = position < first or position >= last or (position - first) % 3 == 2
        return better if is_better else base

    return rule


def _first(better: str, base: str, *, part: int = 8) -> Rule:
    """The first part of the layers."""
    return lambda position, count, model: better if position < count // part else base


def _fewest(better: str, base: str, number: int) -> Rule:
    """The first few tensors."""
    return lambda position, count, model: better if position < number else base


def _shared(better: str, base: str) -> Rule:
    """Models whose heads share keys."""
    return lambda position, count, model: better if model.shares_keys else base


def _shared_or_mixed(better: str, base: str) -> Rule:
    """Models whose heads share keys, and mixtures."""
    return lambda position, count, model: (
        better if model.shares_keys or model.num_experts >= 4 else base
    )


class Recipe(NamedTuple):
    """The mix behind a quant's name; None is the base type."""

    base: str
    output: str = "Q6_K"
    """The output matrix, and an embedding that serves as one."""
    embedding: str | None = None
    value: Rule | None = None
    down: Rule | None = None
    result: str | None = None
    """Attention's output matrix."""
    query_key: tuple[str | None, str | None] = (None, None)
    middle: str | None = None
    """Gate and up in all but the first and last eighth of the layers."""
    has_mixtral_rules: bool = False
    """Whether attention's output gets Q5_K in mixtures of eight."""
    is_low_bit: bool = False
    """Whether values and keys of mixtures of eight get Q4_K rather than Q8_0."""


RECIPES: dict[str, Recipe] = {
    "F32": Recipe("F32", output="F32"),
    "F16": Recipe("F16", output="F16"),
    "BF16": Recipe("BF16", output="BF16"),
    "Q8_0": Recipe("Q8_0", output="Q8_0"),
    "Q6_K": Recipe("Q6_K"),
    "Q5_K_M": Recipe("Q5_K", value=_spread("Q6_K", "Q5_K"), down=_spread("Q6_K", "Q5_K")),
    "Q5_K_S": Recipe("Q5_K"),
    "Q5_1": Recipe("Q5_1"),
    "Q5_0": Recipe("Q5_0"),
    "Q4_K_M": Recipe(
        "Q4_K", value=_spread("Q6_K", "Q4_K"), down=_spread("Q6_K", "Q4_K"), has_mixtral_rules=True
    ),
    "Q4_K_S": Recipe(
        "Q4_K",
        value=_fewest("Q5_K", "Q4_K", 4),
        down=_first("Q5_K", "Q4_K"),
        has_mixtral_rules=True,
    ),
    "Q4_1": Recipe("Q4_1"),
    "Q4_0": Recipe("Q4_0"),
    "IQ4_NL": Recipe("IQ4_NL", value=_shared("Q5_K", "IQ4_NL"), has_mixtral_rules=True),
    "IQ4_XS": Recipe("IQ4_XS", value=_shared("Q5_K", "IQ4_XS"), has_mixtral_rules=True),
    "MXFP4_MOE": Recipe("Q8_0", output="Q8_0"),
    "Q3_K_L": Recipe("Q3_K", value=_always("Q5_K"), down=_always("Q5_K"), result="Q5_K"),
    "Q3_K_M": Recipe(
        "Q3_K",
        value=_fewest("Q5_K", "Q4_K", 2),
        down=_first("Q5_K", "Q4_K", part=16),
        result="Q4_K",
        has_mixtral_rules=True,
    ),
    "Q3_K_S": Recipe("Q3_K", has_mixtral_rules=True),
    "IQ3_M": Recipe(
        "IQ3_S",
        value=_always("Q4_K"),
        down=_first("Q4_K", "IQ3_S"),
        result="Q4_K",
        has_mixtral_rules=True,
    ),
    "IQ3_S": Recipe("IQ3_S", value=_shared("Q4_K", "IQ3_S"), has_mixtral_rules=True),
    "IQ3_XS": Recipe(
        "IQ3_S",
        value=_shared("Q4_K", "IQ3_S"),
        query_key=("IQ3_XXS", "IQ3_XXS"),
        middle="IQ3_XXS",
        has_mixtral_rules=True,
    ),
    "IQ3_XXS": Recipe(
        "IQ3_XXS",
        output="Q5_K",
        embedding="IQ3_S",
        value=_shared("Q4_K", "IQ3_XXS"),
        result="IQ3_S",
        query_key=("IQ2_S", "IQ2_S"),
        has_mixtral_rules=True,
    ),
    "Q2_K": Recipe(
        "Q2_K",
        value=_shared("Q4_K", "Q3_K"),
        down=_always("Q3_K"),
        result="Q3_K",
        has_mixtral_rules=True,
    ),
    "Q2_K_S": Recipe("Q2_K", value=_shared("Q4_K", "Q2_K"), down=_first("Q4_K", "Q2_K")),
    "IQ2_M": Recipe(
        "IQ2_S",
        output="Q5_K",
        embedding="IQ3_S",
        value=_shared_or_mixed("Q4_K", "IQ3_S"),
        down=_first("IQ3_S", "IQ2_S"),
        result="IQ3_S",
        has_mixtral_rules=True,
        is_low_bit=True,
    ),
    "IQ2_S": Recipe(
        "IQ2_XS",
        output="Q5_K",
        embedding="IQ3_S",
        value=_shared_or_mixed("Q4_K", "IQ3_S"),
        down=_first("IQ3_S", "IQ2_XS"),
        result="IQ3_S",
        has_mixtral_rules=True,
        is_low_bit=True,
    ),
}
"""Quant -> mix, best first."""

for _name, _result in (
    ("IQ2_XS", None),
    ("IQ2_XXS", None),
    ("IQ1_M", "IQ2_XXS"),
    ("IQ1_S", "IQ2_XXS"),
):
    RECIPES[_name] = Recipe(
        _name,
        output="Q5_K",
        embedding="Q2_K",
        value=_shared_or_mixed("Q4_K", "Q2_K"),
        down=_first("Q2_K", _name),
        result=_result,
        has_mixtral_rules=True,
        is_low_bit=True,
    )
for _name in ("TQ2_0", "TQ1_0", "Q2_0"):
    RECIPES[_name] = Recipe(_name, embedding="Q4_K")

ALIASES = {"FP16": "F16", "FP32": "F32", "MXFP4": "MXFP4_MOE", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}

KEPT = re.compile(
    r"_norm\.weight$|ffn_gate_inp|altup|laurel|per_layer_model_proj|ssm_conv1d|shortconv\.conv"
    r"|^position_embd|^token_types|ssm_a$|indexer\.[kq]_proj"
)
"""Tensors that no recipe quantises."""

HALF = re.compile(r"altup_|laurel|per_layer_model_proj")
"""Those of them that stay in two bytes; the others are written in four."""

FALLBACKS = {
    "Q2_K": "Q4_0", "Q3_K": "Q4_0", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0", "Q2_0": "Q4_0",
    "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
}  # fmt: skip
"""What a type becomes where its blocks do not divide the rows; others become IQ4_NL."""


class MlxQuant(NamedTuple):
    """How MLX packs a matrix: numbers of so many bits in groups that share a scale."""

    mode: str
    """'affine', 'mxfp4', 'mxfp8', 'nvfp4', or '' for two-byte weights."""
    bits: int
    group_size: int

    @property
    def name(self) -> str:
        """As brim and published measurements call it."""
        if not self.mode:
            return "MLX bf16"
        if self.mode != "affine":
            return f"MLX {self.mode}"
        return f"MLX {self.bits}bit" + ("" if self.group_size == 64 else f" g{self.group_size}")

    @property
    def group_bytes(self) -> int:
        """Of one group's numbers with its scale, and its bias where it has one."""
        # An affine group has scale and bias of two bytes each, the others a scale of one byte.
        return self.group_size * self.bits // 8 + (4 if self.mode == "affine" else 1)


MLX_MODES = {
    "bf16": MlxQuant("", 16, 1), "fp16": MlxQuant("", 16, 1), "mxfp4": MlxQuant("mxfp4", 4, 32),
    "mxfp8": MlxQuant("mxfp8", 8, 32), "nvfp4": MlxQuant("nvfp4", 4, 16),
}  # fmt: skip

MLX_BITS, MLX_GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)

MLX_NAME = re.compile(r"(?:MLX[ -]?)?(?P<bits>\d)[- ]?bit(?:[ -]?g(?P<group>\d+))?", re.IGNORECASE)

ROUTER = MlxQuant("affine", 8, 64)
"""What mlx-lm gives the matrix that picks experts, whatever the others get."""


def parse_quant(quant: str) -> str | MlxQuant:
    """The recipe's name or MLX's packing that a user's word for a quant means.

    Raises:
        InvalidRequest: No quant is called so.

    Example:
        >>> parse_quant("q4_k_m")
        'Q4_K_M'
        >>> parse_quant("MLX 4bit").group_bytes
        36
    """
    word = quant.strip()
    upper = ALIASES.get(word.upper(), word.upper())
    if upper in RECIPES:
        return upper
    mode = MLX_MODES.get(word.lower().removeprefix("mlx").strip(" -"))
    if mode is not None:
        return mode
    if match := MLX_NAME.fullmatch(word):
        found = MlxQuant("affine", int(match["bits"]), int(match["group"] or 64))
        if found.bits in MLX_BITS and found.group_size in MLX_GROUPS:
            return found
    raise InvalidRequest(
        f"no quant is called '{quant:.40}'; name one of {', '.join(RECIPES)}, or of MLX "
        f"{', '.join(f'{bits}bit' for bits in MLX_BITS)}, mxfp4, bf16 as 'MLX 4bit'"
    )


def gguf_tensors(shapes: Sequence[Shape], recipe: str, model: Model) -> list[TensorInfo]:
    """The tensors of a GGUF file of the recipe, offsets left at 0."""
    mix = RECIPES[recipe]
    names = [name for name, _ in shapes]
    state = _Positions(
        is_tied="output.weight" not in names,
        num_values=sum(map(_is_value, names)),
    )
    found = []
    for name, shape in shapes:
        kind = _kept_type(name, shape) or _fitting(
            _type_of(name, shape, recipe, mix, model, state), shape[0]
        )
        block = TYPES[kind]
        size_bytes = math.prod(shape) // block.block_size * block.block_bytes
        found.append(TensorInfo(name, shape, kind, 0, size_bytes))
    return found


class _Positions:
    """How many tensors of a kind have passed; the rules count them in the file's order."""

    def __init__(self, *, is_tied: bool, num_values: int) -> None:
        self.is_tied = is_tied
        self.num_values = num_values
        self.value = 0
        self.down = 0


def _is_value(name: str) -> bool:
    return name.endswith(("attn_v.weight", "attn_qkv.weight", "attn_kv_b.weight"))


def _type_of(
    name: str, shape: tuple[int, ...], recipe: str, mix: Recipe, model: Model, state: _Positions
) -> str:
    if name in ("token_embd.weight", "per_layer_token_embd.weight") and not state.is_tied:
        return mix.embedding or mix.base
    if name in ("output.weight", "token_embd.weight", "per_layer_token_embd.weight"):
        is_even = shape[0] % TYPES[mix.base].block_size == 0
        return mix.output if is_even else "Q8_0"
    if mix.base in ("F32", "F16", "BF16"):
        return mix.base
    if recipe == "MXFP4_MOE":
        return "MXFP4" if len(shape) > 2 else "Q8_0"
    if _is_value(name):
        return _value_type(mix, model, state)
    if "ffn_down" in name:
        layer = int(name.split(".")[1]) if model.num_experts > 1 else state.down
        state.down += 1
        return mix.down(layer, model.num_layers, model) if mix.down else mix.base
    return _other_type(name, mix, model)


def _value_type(mix: Recipe, model: Model, state: _Positions) -> str:
    kind = mix.value(state.value, state.num_values, model) if mix.value else mix.base
    state.value += 1
    if mix.is_low_bit:
        return kind
    if model.is_70b and kind in ("Q3_K", "Q4_K"):
        kind = "Q5_K"
    return "Q8_0" if model.num_experts == 8 else kind


def _other_type(name: str, mix: Recipe, model: Model) -> str:
    is_mixtral = model.num_experts == 8
    if name.endswith("attn_k.weight"):
        if is_mixtral:
            return "Q4_K" if mix.is_low_bit else "Q8_0"
        return mix.query_key[1] or mix.base
    if name.endswith("attn_q.weight"):
        return mix.query_key[0] or mix.base
    if name.endswith("attn_output.weight"):
        if is_mixtral:
            return "Q5_K" if mix.has_mixtral_rules else mix.base
        return mix.result or mix.base
    if mix.middle and ("ffn_gate" in name or "ffn_up" in name):
        layer, count = int(name.split(".")[1]), model.num_layers
        return mix.middle if count // 8 <= layer < 7 * count // 8 else mix.base
    return mix.base


def _kept_type(name: str, shape: tuple[int, ...]) -> str | None:
    if len(shape) > 1 and not KEPT.search(name):
        return None
    return "F16" if HALF.search(name) and len(shape) > 1 else "F32"


def _fitting(kind: str, row_length: int) -> str:
    """The type, or what takes its place where its blocks do not divide the rows."""
    if row_length % TYPES[kind].block_size == 0:
        return kind
    # A type with blocks of 32 has no smaller one below it.
    kind = kind if TYPES[kind].block_size <= 32 else FALLBACKS.get(kind, "IQ4_NL")
    return kind if row_length % TYPES[kind].block_size == 0 else "F16"


def mlx_tensors(shapes: Iterable[Shape], quant: MlxQuant) -> list[TensorInfo]:
    """The tensors of an MLX checkpoint, each with its scales; offsets left at 0."""
    found = []
    for name, shape in shapes:
        packing = ROUTER if quant.mode and name.endswith("ffn_gate_inp.weight") else quant
        is_packed = packing.mode and len(shape) > 1 and not re.search(r"conv|ssm_a$|_norm", name)
        if is_packed and shape[0] % packing.group_size == 0:
            size_bytes = math.prod(shape) // packing.group_size * packing.group_bytes
            found.append(TensorInfo(name, shape, packing.name, 0, size_bytes))
        else:
            found.append(TensorInfo(name, shape, "BF16", 0, 2 * math.prod(shape)))
    return found
