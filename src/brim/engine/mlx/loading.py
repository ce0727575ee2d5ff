"""Loads a model from a directory, one array after another in the order of its layers.

MLX does not map files: every weight is read into memory of its own.  mlx-lm builds the model from
arrays that are not read yet, and here they are: what stacks experts, casts or splits a tensor is
there twice for that one tensor alone, so that the peak stays near the weights' size.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.nn.layers.embedding import Embedding
from mlx.nn.layers.linear import Linear
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear

from brim.core.plan import Plan
from brim.engine.base import OnProgress
from brim.engine.mlx import library
from brim.errors import BrimError, ModelFileError
from brim.registry.safetensors_header import read_json

WEIGHTS_PATTERN = "model*.safetensors"
"""The files that mlx-lm takes a model's weights from, whatever an index says."""

QUANT_METHODS = frozenset(
    {"awq", "bitnet", "compressed-tensors", "fp8", "gptq", "modelopt", "mxfp4", "mxfp8"}
)
"""Values of `quantization_config.quant_method` that mlx-lm knows how to read."""

MAX_REASON_CHARS = 200
"""Of a backend's own words in a message: a sentence, not a dump of tensor names."""

_GLOB_CHARACTERS = "[*?"


class LoadedModel(NamedTuple):
    """A model whose weights are in memory."""

    model: Any
    """Of one of mlx-lm's classes: called with tokens (B, L) and caches, gives logits (B, L, V)."""
    config: dict[str, Any]
    """config.json, with `eos_token_id` as generation_config.json has it."""
    weights_bytes: int
    """Of all parameters as they are in memory."""


def load(plan: Plan, on_progress: OnProgress | None = None) -> LoadedModel:
    """Load the model that a plan names.

    Args:
        plan: The plan.
        on_progress: Told the share of the weights' bytes that is read.

    Raises:
        ModelFileError: A file is missing or damaged, the config lacks something or contradicts the
            weights, or mlx-lm has no class for the model.
    """
    directory = find_directory(plan.model.paths)
    config = read_json(directory / "config.json")
    _check_config(directory, config)
    with _as_model_file_error(directory), _without_cache():
        model, config = library.utils().load_model(
            directory, lazy=True, get_model_classes=_classes_for(directory)
        )
        _check_types(directory, model, config)
        _check_computable(directory, model)
        weights_bytes = _read_weights(model, on_progress or _ignore)
    return LoadedModel(model, config, weights_bytes)


def _ignore(_fraction: float) -> None:
    """Nobody wants to know."""


def _read_weights(model: Any, on_progress: OnProgress) -> int:
    """Read all parameters, in the order in which the model was built; their bytes.

    One is read while the one before is finished: 200 MB in 0.14 s where one at a time takes 0.21
    and all at once 0.10, but that would hold everything twice that is stacked or cast (2-core
    x86-64 Linux, from the page cache, November 2026).
    """
    num_bytes = 0
    before = None
    weights: Any = tree_flatten(model.parameters())
    total = max(1, sum(weight.nbytes for _, weight in weights))
    for _, weight in weights:
        mx.async_eval(weight)
        if before is not None:
            mx.eval(before)
            on_progress(num_bytes / total)
        before = weight
        num_bytes += weight.nbytes
    mx.synchronize()
    return num_bytes


def _check_computable(directory: Path, model: Any) -> None:
    """Refuse mixtures of experts that MLX's processor backend has no kernel for."""
    if mx.default_device() != mx.cpu:
        return
    for _, module in model.named_modules():
        if type(module) is SwitchLinear and module.weight.dtype != mx.float32:
            raise ModelFileError(
                f"{directory}: without a GPU, MLX computes mixtures of experts in float32 or "
                "quantised, and this one is neither; take it as GGUF for llama.cpp"
            )


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """Give what a tensor was made from back at once: nothing of its size is needed again."""
    before = mx.set_cache_limit(0)
    try:
        yield
    finally:
        mx.set_cache_limit(before)


def find_directory(paths: Sequence[str]) -> Path:
    """The one directory of the files, which mlx-lm is to find and no others.

    Raises:
        ModelFileError: They lie apart, one is gone, or there are more of them.
    """
    directory = Path(paths[0]).parent
    if any(mark in str(directory) for mark in _GLOB_CHARACTERS):
        raise ModelFileError(
            f"{directory}: mlx-lm finds nothing below a name with '[', '*' or '?'; rename it"
        )
    planned = {Path(path).name for path in paths if Path(path).parent == directory}
    found = {path.name for path in directory.glob(WEIGHTS_PATTERN)}
    if len(planned) < len(paths) or (missing := sorted(planned - found)):
        lacking = missing[0] if len(planned) == len(paths) else "some of the model's files"
        raise ModelFileError(f"{directory} lacks {lacking}; download the model again")
    if extra := sorted(found - planned):
        raise ModelFileError(
            f"{directory} holds {extra[0]}, which is no part of the model and mlx-lm would load; "
            "move it away"
        )
    return directory


def _check_config(directory: Path, config: dict[str, Any]) -> None:
    """Refuse what mlx-lm would run, or misread without a word."""
    if config.get("model_file") is not None:
        raise ModelFileError(
            f"{directory}: the model brings Python code of its own (model_file), which brim never "
            "runs; take a form of it that a built-in class loads"
        )
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not re.fullmatch(r"[\w-]{1,60}", model_type):
        raise ModelFileError(
            f"{directory}: config.json has no usable model_type; download the model again"
        )
    method = _quant_method(config)
    if "quantization" not in config and method is not None and method not in QUANT_METHODS:
        raise ModelFileError(
            f"{directory}: its weights are quantised by {method!s:.40}, which mlx-lm "
            f"{library.version()} cannot read; take the model in MLX's form or unquantised"
        )


def _quant_method(config: dict[str, Any]) -> Any:
    for holder in (config, config.get("text_config")):
        quantisation = holder.get("quantization_config") if isinstance(holder, dict) else None
        if isinstance(quantisation, dict):
            return quantisation.get("quant_method")
    return None


def _classes_for(directory: Path) -> Any:
    """mlx-lm's choice of classes, with a sentence for where it has none."""

    def classes(config: dict[str, Any]) -> Any:
        try:
            return library.utils()._get_classes(config)
        except (ValueError, AttributeError) as exc:
            raise ModelFileError(
                f"{directory}: mlx-lm {library.version()} has no class for model_type "
                f"'{config['model_type']}'; take the model as GGUF for llama.cpp"
            ) from exc

    return classes


def _check_types(directory: Path, model: Any, config: dict[str, Any]) -> None:
    """Refuse packed weights in a layer that would multiply with them as they are."""
    for name, module in model.named_modules():
        if type(module) not in (Linear, Embedding):
            continue
        dtype = module.weight.dtype
        if not mx.issubdtype(dtype, mx.floating):
            raise ModelFileError(
                f"{directory}: {name} is stored as {str(dtype).rpartition('.')[2]} and its config "
                f"({_quant_method(config) or 'no quantisation'}) does not say how to unpack it; "
                "take the model in MLX's form or unquantised"
            )


@contextlib.contextmanager
def _as_model_file_error(directory: Path) -> Iterator[None]:
    """Whatever mlx-lm and MLX raise while they read files that somebody else wrote."""
    try:
        yield
    except BrimError:
        raise
    except Exception as exc:  # model classes raise what their arithmetic happens to: a sentence
        raise ModelFileError(
            f"{directory}: mlx-lm {library.version()} cannot load it ({_in_words(exc)}); "
            "download it again, or take another form of the model"
        ) from exc


def _in_words(exc: Exception) -> str:
    """The first line of what was said, with what is missing from a bare KeyError."""
    words = " ".join(str(exc).split()) or type(exc).__name__
    if isinstance(exc, KeyError):
        words = f"{words} is missing"
    return words if len(words) <= MAX_REASON_CHARS else f"{words[:MAX_REASON_CHARS]}..."
