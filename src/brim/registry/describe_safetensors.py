"""What a safetensors model is (Hugging Face's or MLX's): its config's dimensions, its files' bytes.

Headers only, of one file or of all that an index names.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from brim.core.model import ModelSpec
from brim.errors import ModelFileError
from brim.registry.chat_template import read_chat_template
from brim.registry.config_json import spec_from_config
from brim.registry.gguf_header import TensorInfo
from brim.registry.mlx_names import as_gguf, packing_of
from brim.registry.safetensors_header import SafeTensor, read_headers, read_json
from brim.registry.weights import sum_weights

DTYPE_NAMES = {"BF16": "BF16", "F16": "F16", "F32": "F32", "F8_E4M3": "FP8", "MXFP4": "MXFP4"}
"""What a checkpoint without a packing is called, by the dtype of most of its bytes."""


def describe_directory(model_dir: Path, *, name: str | None = None) -> ModelSpec:
    """The safetensors model in a directory.

    Args:
        model_dir: Has config.json and model.safetensors, or its parts and their index.
        name: What clients will call it; the lower-cased directory's name unless given.

    Raises:
        NotFound: There are no weights.
        ModelFileError: A file is damaged, cut short or missing, or the config lacks a key.
    """
    config = read_json(model_dir / "config.json")
    tensors = read_headers(model_dir)
    paths = tuple(sorted({str(tensor.path.absolute()) for tensor in tensors.values()}))
    spec = describe_tensors(
        config, tensors, name=name or model_dir.resolve().name.lower(), paths=paths
    )
    return msgspec.structs.replace(spec, chat_template=read_chat_template(model_dir))


def describe_tensors(
    config: Mapping[str, Any],
    tensors: Mapping[str, SafeTensor],
    *,
    name: str,
    paths: tuple[str, ...] = (),
) -> ModelSpec:
    """The model with this config and these tensors; `paths` where they are files here.

    Raises:
        ModelFileError: The config lacks a key, or does not fit the tensors.
    """
    if not tensors:
        raise ModelFileError(f"{name} has no tensors; get a complete checkpoint")
    packing = packing_of(config)
    # Dimensions alone are taken from it; two-byte weights are the packing without a config block.
    spec = spec_from_config(config, quant="MLX bf16", name=name)
    weights = as_gguf(tensors, packing)
    sums = sum_weights(
        weights,
        num_layers=spec.num_layers,
        num_experts=spec.num_experts,
        num_active_experts=spec.num_active_experts,
    )
    # A number of 32 bits holds several parameters, and only MLX's packing says here how many.
    is_counted = packing.default is not None or all(t.dtype != "I32" for t in tensors.values())
    counted = sums if is_counted else spec
    return msgspec.structs.replace(
        spec,
        paths=paths,
        fingerprint=_fingerprint(config, tensors),
        num_parameters=counted.num_parameters,
        weights_bytes=sums.weights_bytes,
        active_bytes=sums.active_bytes,
        active_parameters=counted.active_parameters,
        matrix_bytes=sums.matrix_bytes,
        embedding_bytes=sums.embedding_bytes,
        quant=packing.default.name if packing.default else _most(weights),
        is_estimated=False,
    )


def _most(weights: list[TensorInfo]) -> str:
    bytes_by_type = Counter[str]()
    for tensor in weights:
        bytes_by_type[tensor.type_name] += tensor.size_bytes
    most = bytes_by_type.most_common(1)[0][0]
    return DTYPE_NAMES.get(most, most)


def _fingerprint(config: Mapping[str, Any], tensors: Mapping[str, SafeTensor]) -> str:
    """Of the config and of every tensor's name, type and shape, in whatever files they lie."""
    digest = hashlib.blake2b(msgspec.json.encode(config, order="deterministic"), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode(errors="replace"))
    return digest.hexdigest()
