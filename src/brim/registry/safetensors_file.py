"""Reads safetensors checkpoints: a length, a JSON header, plain arrays.  Nothing is executed.

The header is believed only as far as the file's size allows, as in `gguf_header`.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from brim.errors import ModelFileError, NotFound, Unsupported

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

Floats = NDArray[np.floating[Any]]
"""Weights as float16 or float32."""

DTYPE_BYTES = {"F16": 2, "BF16": 2, "F32": 4}
"""Dtypes that weights come in; others (F8, I8, ...) need scales that brim does not read."""


class SafeTensor(msgspec.Struct, frozen=True):
    """One tensor of a checkpoint; `load` reads it."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """From the start of the file."""

    def load(self) -> Floats:
        """The values, as float16 where they are stored so and as float32 otherwise."""
        count = math.prod(self.shape)
        stored = {"F16": "<f2", "BF16": "<u2", "F32": "<f4"}[self.dtype]
        values = np.fromfile(self.path, stored, count, offset=self.offset).reshape(self.shape)
        if self.dtype == "BF16":  # the upper half of a float32
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values


def read_checkpoint(model_dir: Path) -> dict[str, SafeTensor]:
    """All tensors of a model directory, from one file or from all parts that its index names.

    Raises:
        NotFound: The directory holds no safetensors model.
        ModelFileError: A file is damaged, cut short or missing.
        Unsupported: A tensor has a dtype that brim does not read.
    """
    single, index = model_dir / "model.safetensors", model_dir / "model.safetensors.index.json"
    if single.is_file():
        return read_safetensors(single)
    if not index.is_file():
        raise NotFound(f"{model_dir} has no model.safetensors; name a model's directory")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ModelFileError(f"{index} has no weight_map; download it again")
    tensors: dict[str, SafeTensor] = {}
    for part in sorted(set(map(str, weight_map.values()))):
        if Path(part).name != part:  # an index may not reach outside its directory
            raise ModelFileError(f"{index} names {part!r}, not a file beside it")
        tensors |= read_safetensors(model_dir / part)
    if missing := sorted(set(weight_map) - set(tensors)):
        raise ModelFileError(f"{model_dir} lacks the tensor {missing[0]}; download it again")
    return tensors


def read_safetensors(path: Path) -> dict[str, SafeTensor]:
    """The header of one file.

    Raises:
        ModelFileError: It is missing, damaged or cut short.
        Unsupported: A tensor has a dtype that brim does not read.
    """
    try:
        with path.open("rb") as file:
            file_bytes = file.seek(0, 2)
            file.seek(0)
            header_bytes = int.from_bytes(file.read(8), "little")
            if file_bytes < 8 or header_bytes > min(file_bytes - 8, MAX_HEADER_BYTES):
                raise _damaged(path, "its header does not fit into it")
            header = _parse(path, file.read(header_bytes))
    except OSError as exc:
        raise ModelFileError(f"{path} cannot be read ({exc.strerror}); download it again") from exc
    header.pop("__metadata__", None)
    start = 8 + header_bytes
    tensors = {name: _tensor(path, name, entry, start) for name, entry in header.items()}
    _check_layout(path, tensors.values(), start, file_bytes)
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model directory.

    Raises:
        ModelFileError: The file is missing or holds something else.
    """
    try:
        return _parse(path, path.read_bytes())
    except OSError as exc:
        raise ModelFileError(f"{path} cannot be read ({exc.strerror}); download it again") from exc


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as exc:
        raise _damaged(path, f"not JSON ({exc})") from exc
    if not isinstance(found, dict):
        raise _damaged(path, "not a JSON object")
    return found


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def _tensor(path: Path, name: str, entry: Any, start: int) -> SafeTensor:
    try:
        stored = msgspec.convert(entry, _Entry)
    except msgspec.ValidationError as exc:
        raise _damaged(path, f"tensor {name}: {exc}") from exc
    item_bytes = DTYPE_BYTES.get(stored.dtype)
    if item_bytes is None:
        raise Unsupported(
            f"{path}: the tensor {name} is stored as {stored.dtype}, and brim converts "
            f"{', '.join(DTYPE_BYTES)}; get the unquantised checkpoint"
        )
    begin, end = stored.data_offsets
    if min((begin, *stored.shape)) < 0 or end - begin != math.prod(stored.shape) * item_bytes:
        raise _damaged(path, f"the tensor {name} has shape {stored.shape} in {end - begin} bytes")
    return SafeTensor(path, name, stored.dtype, stored.shape, start + begin)


class _Entry(msgspec.Struct):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def _check_layout(path: Path, tensors: Iterable[SafeTensor], start: int, file_bytes: int) -> None:
    """The format allows no gap and no overlap."""
    at = start
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        if tensor.offset != at:
            raise _damaged(path, f"the tensor {tensor.name} does not begin where the last ends")
        at += math.prod(tensor.shape) * DTYPE_BYTES[tensor.dtype]
    if at != file_bytes:
        raise _damaged(path, f"its tensors end at byte {at}, the file at byte {file_bytes}")


def _damaged(path: Path, what: str) -> ModelFileError:
    return ModelFileError(f"{path} is damaged: {what}; download it again")
