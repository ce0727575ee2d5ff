"""Describes a model from its config.json and a quant's name, before there is any file of it."""

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec

from brim.core.model import ModelSpec
from brim.registry.config_layout import ConfigLayout
from brim.registry.config_reader import Config
from brim.registry.describe import GgufModel
from brim.registry.families import has_merges
from brim.registry.gguf_header import TensorInfo
from brim.registry.gguf_keys import MERGES, GgufKeys
from brim.registry.quants import MlxQuant, Model, gguf_tensors, mlx_tensors, parse_quant


def spec_from_config(config: Mapping[str, Any], *, quant: str, name: str) -> ModelSpec:
    """The model that a config describes, as large as a quant's recipe makes it.

    Args:
        config: A Hugging Face config.json, of the language model or of one that also sees.
        quant: A GGUF recipe ('Q4_K_M', 'F16', ...) or an MLX packing ('MLX 4bit', 'MLX bf16').
        name: What clients will call it.

    Returns:
        A description with `is_estimated`: bytes are the recipe's, within about 1 % of a file made
        by it (tests/unit/registry/test_known_sizes.py has the figures).

    Raises:
        ModelFileError: The config lacks a key, or one has an impossible value.
        InvalidRequest: No quant is called so.
    """
    wanted = parse_quant(quant)
    reader = Config(config, name)
    layout = ConfigLayout(reader)
    tensors = _tensors(layout, wanted)
    keys = GgufKeys(f"the config of {name}", layout.metadata)
    word = wanted.name if isinstance(wanted, MlxQuant) else wanted
    digest = hashlib.blake2b(reader.digest_text() + word.encode(), digest_size=16)
    spec = GgufModel(keys, tensors).spec(name, paths=(), fingerprint=digest.hexdigest())
    widths = dict(spec.widths)
    # How many merges a byte-pair vocabulary has stands in no config; none is another statement.
    if has_merges(spec.architecture, spec.vocab_size):
        del widths[MERGES]
    return msgspec.structs.replace(
        spec,
        format="safetensors" if isinstance(wanted, MlxQuant) else "gguf",
        quant=word,
        widths=widths,
        is_estimated=True,
    )


def _tensors(layout: ConfigLayout, quant: str | MlxQuant) -> list[TensorInfo]:
    if isinstance(quant, MlxQuant):
        return mlx_tensors(layout.shapes, quant)
    model = Model(
        architecture=layout.family.architecture,
        num_layers=layout.num_layers,
        num_experts=layout.num_experts,
        num_heads=layout.num_heads,
        num_kv_heads=layout.num_kv_heads,
    )
    return gguf_tensors(layout.shapes, quant, model)
