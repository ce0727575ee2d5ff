"""Gives the tensors of a Hugging Face or MLX checkpoint GGUF's names, as far as sums need them.

A packed matrix of MLX (numbers, scales, biases) becomes one tensor with its true shape.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from brim.errors import ModelFileError
from brim.registry.gguf_header import TensorInfo
from brim.registry.quants import MLX_BITS, MlxQuant
from brim.registry.safetensors_header import SafeTensor

OTHER_PARTS = re.compile(
    r"^(model\.)?(vision|visual|audio|multi_modal|mm_|embed_vision|embed_audio|img_|thinker\.v)"
    r"|vision_(tower|model|embed)|audio_(tower|encoder)|\bmtp\b"
)
"""Parts that see, hear or draft: they take memory and are not read for a token."""

EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings|embeddings|embedding|tok_embeddings|embed_in)\.weight$"
)

OUTPUT = re.compile(r"(^|\.)(lm_head|output|embed_out)\.weight$")

PER_LAYER_EMBEDDING = re.compile(r"embed_tokens_per_layer\.weight$")

LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.(.+)$")

EXPERTS = re.compile(r"(?:^|\.)(experts|switch_mlp|switch_glu)\.")

SCALES = (".scales", ".biases", "_scales", "_scale_inv", "_scale")


class Packing(NamedTuple):
    """How a config says that matrices are packed."""

    default: MlxQuant | None
    overrides: dict[str, Any]
    """Module -> its own group size, or false."""

    def group_size(self, module: str) -> int:
        """Of a matrix that is packed."""
        own = self.overrides.get(module)
        size = own.get("group_size") if isinstance(own, Mapping) else None
        if isinstance(size, int) and size > 0:
            return size
        return self.default.group_size if self.default else 64


def packing_of(config: Mapping[str, Any]) -> Packing:
    """The packing that a config's `quantization` block describes; none where it has no such block.

    Raises:
        ModelFileError: The block names sizes that MLX does not have.
    """
    block = config.get("quantization")
    if not isinstance(block, Mapping):
        return Packing(None, {})
    bits, group = block.get("bits"), block.get("group_size")
    mode = block.get("mode", "affine")
    if bits not in MLX_BITS or not isinstance(group, int) or not 1 <= group <= 1024:
        raise ModelFileError(
            f"config.json says that weights have {bits!r:.20} bits in groups of {group!r:.20}, "
            "which MLX does not know; download it again"
        )
    return Packing(MlxQuant(str(mode)[:16], bits, group), dict(block))


def as_gguf(tensors: Mapping[str, SafeTensor], packing: Packing) -> list[TensorInfo]:
    """The checkpoint's weights under GGUF's names, each with its scales.

    Scales of another packing than MLX's or FP8's (GPTQ, AWQ) stand as tensors of their own.

    Raises:
        ModelFileError: A packed matrix and its scales do not belong together.
    """
    scales = _scales_by_module(tensors.values())
    owners = {name.removesuffix(".weight") for name in tensors}
    alone = {s.name for module, own in scales.items() if module not in owners for s in own}
    found = []
    for name, tensor in tensors.items():
        if name.endswith(SCALES) and name not in alone:
            continue
        module = name.removesuffix(".weight")
        own = scales.get(module, [])
        shape, kind = _true_shape(tensor, own, packing, module)
        size_bytes = tensor.size_bytes + sum(scale.size_bytes for scale in own)
        found.append(TensorInfo(gguf_name(name), shape, kind, 0, size_bytes))
    return found


def gguf_name(name: str) -> str:
    """What sums call a tensor.

    Example:
        >>> gguf_name("model.layers.3.mlp.switch_mlp.down_proj.weight")
        'blk.3.ffn_down_exps.weight'
        >>> gguf_name("language_model.model.embed_tokens.weight")
        'token_embd.weight'
    """
    if OTHER_PARTS.search(name):
        return f"v.{name}"
    for pattern, gguf in (
        (PER_LAYER_EMBEDDING, "per_layer_token_embd.weight"),
        (EMBEDDING, "token_embd.weight"),
        (OUTPUT, "output.weight"),
    ):
        if pattern.search(name) and not LAYER.search(name):
            return gguf
    layer = LAYER.search(name)
    if layer is None:
        return name
    if EXPERTS.search(name):
        part = "down" if "down" in name or ".w2." in name else "up"
        return f"blk.{layer[1]}.ffn_{part}_exps.weight"
    return f"blk.{layer[1]}.{layer[2]}"


def _scales_by_module(tensors: Iterable[SafeTensor]) -> dict[str, list[SafeTensor]]:
    """Scales and biases of packed matrices; a layer's plain `.bias` is none."""
    found: dict[str, list[SafeTensor]] = {}
    for tensor in tensors:
        for suffix in SCALES:
            if tensor.name.endswith(suffix):
                module = tensor.name[: -len(suffix)].removesuffix(".weight")
                # gpt-oss keeps numbers as `..._blocks` beside `..._scales`.
                key = f"{module}_blocks" if suffix == "_scales" else module
                found.setdefault(key, []).append(tensor)
                break
    return found


def _true_shape(
    tensor: SafeTensor, scales: list[SafeTensor], packing: Packing, module: str
) -> tuple[tuple[int, ...], str]:
    """Shape, row length first, of the matrix itself, and what it is packed as."""
    shape = tuple(reversed(tensor.shape)) or (1,)
    if tensor.dtype == "U8" and scales and tensor.name.endswith("_blocks"):
        return (2 * shape[0], *shape[1:]), "MXFP4"
    if tensor.dtype != "U32" or packing.default is None or not scales:
        return shape, tensor.dtype
    group = packing.group_size(module)
    columns = (scales[0].shape[-1] if scales[0].shape else 0) * group
    bits = 32 * shape[0] // columns if columns else 0
    # Every row of a packed matrix is whole numbers of 32 bits.
    is_whole = bits in MLX_BITS and bits * columns == 32 * shape[0]
    if not is_whole or any(scale.shape != scales[0].shape for scale in scales):
        raise ModelFileError(
            f"{tensor.path} is damaged: {tensor.name!r:.80} and its scales do not belong together; "
            "download it again"
        )
    mode = packing.default.mode
    if mode != "affine" and bits != packing.default.bits:
        mode = "affine"
    return (columns, *shape[1:]), MlxQuant(mode, bits, group).name
