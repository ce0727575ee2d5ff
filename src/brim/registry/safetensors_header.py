"""Reads the headers of safetensors files: a length, then JSON.  Nothing is executed.

The header is believed only as far as the file's size allows, as in `gguf_header`, and JSON is
parsed only where it cannot become a multiple of what headers take.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import msgspec

from brim.errors import ModelFileError, NotFound

MAX_HEADER_BYTES = 24 * 1024 * 1024
"""Of a header or an index.  The format allows 100 MB; 100,000 tensors, as mixtures with hundreds of
experts in separate tensors have them, take about 14 MB in a header and 10 MB in an index."""

BYTES_PER_VALUE = 16
"""Least text that a value of a header has to itself, counted by what separates values: a tensor has
eight in 100 bytes and more.  A text of nothing but brackets would take forty times its size."""

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6,
    "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""The format's dtypes."""

MAX_NAME_LENGTH = 200
"""Of a part's name; file systems stop at 255 bytes."""

MAX_PARTS = 1_000
"""Files of one model; the largest published ones have under two hundred."""


SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""The file of a model in one piece, and the list of one in several."""


class SafeTensor(msgspec.Struct, frozen=True):
    """Where one tensor of a checkpoint lies and what it is."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """From the start of the file."""

    @property
    def num_elements(self) -> int:
        """Elements as stored; packed weights hold several in one."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """On file."""
        return self.num_elements * DTYPE_BITS[self.dtype] // 8


def has_safetensors(names: Iterable[str]) -> bool:
    """Whether a model is among a directory's files."""
    return not {SINGLE, INDEX}.isdisjoint(names)


def read_headers(model_dir: Path) -> dict[str, SafeTensor]:
    """All tensors of a model directory, whatever they are stored as.

    Raises:
        NotFound: The directory holds no safetensors model.
        ModelFileError: A file is damaged, cut short or missing.
    """
    single, index = model_dir / SINGLE, model_dir / INDEX
    if single.is_file():
        return read_safetensors(single)
    if not index.is_file():
        if single.is_symlink():  # as in a cache out of which its file was deleted
            raise ModelFileError(f"{single} links to a file that is gone; download it again")
        raise NotFound(f"{model_dir} has no model.safetensors; name a model's directory")
    named = read_json(index)
    tensors: dict[str, SafeTensor] = {}
    for part in parts_of_index(named, str(index)):
        tensors |= read_safetensors(model_dir / part)
    check_index(named, tensors, str(model_dir))
    return tensors


def parts_of_index(index: dict[str, Any], where: str) -> list[str]:
    """The files that an index names, which lie beside it.

    Raises:
        ModelFileError: It names none, too many, or one elsewhere.
    """
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFileError(f"{where} has no weight_map; download it again")
    parts = sorted(set(map(str, weight_map.values())))
    for part in parts:
        # An index may not reach outside its directory.
        if Path(part).name != part or "\0" in part or len(part) > MAX_NAME_LENGTH:
            raise ModelFileError(f"{where} names '{_shown(part)}', not a file beside it")
    if len(parts) > MAX_PARTS:
        raise ModelFileError(f"{where} names {len(parts)} files, over {MAX_PARTS}; it is damaged")
    return parts


def check_index(index: dict[str, Any], tensors: dict[str, SafeTensor], where: str) -> None:
    """Make sure that the files hold what their index says.

    Raises:
        ModelFileError: A tensor is missing.
    """
    if missing := sorted(set(index["weight_map"]) - set(tensors)):
        raise ModelFileError(f"{where} lacks the tensor {_shown(missing[0])}; download it again")


def read_safetensors(path: Path) -> dict[str, SafeTensor]:
    """The header of one file.

    Raises:
        ModelFileError: It is missing, damaged or cut short.
    """
    try:
        with path.open("rb") as file:
            file_bytes = file.seek(0, 2)
            file.seek(0)
            length = header_length(str(path), file.read(8), file_bytes)
            return parse_header(path, file.read(length), file_bytes)
    except (OSError, ValueError) as exc:  # ValueError: a path with a null byte
        raise _unreadable(path, exc) from exc


def header_length(where: str, start: bytes, file_bytes: int) -> int:
    """How long the header is that follows a file's first 8 bytes.

    Raises:
        ModelFileError: It cannot be true.
    """
    length = int.from_bytes(start, "little")
    if file_bytes < 8 or length > file_bytes - 8:
        raise _damaged(where, "its header does not fit into it")
    if length > MAX_HEADER_BYTES:
        raise _damaged(where, f"its header is said to have {length} bytes")
    return length


def parse_header(path: Path, text: bytes, file_bytes: int) -> dict[str, SafeTensor]:
    """The tensors that a header names, checked against the file's size.

    Raises:
        ModelFileError: It contradicts the format or the file.
    """
    header = parse_json(str(path), text)
    header.pop("__metadata__", None)
    start = 8 + len(text)
    tensors = {name: _tensor(path, name, entry, start) for name, entry in header.items()}
    _check_layout(path, tensors.values(), start, file_bytes)
    return tensors


def read_json(path: Path, *, max_bytes: int = MAX_HEADER_BYTES) -> dict[str, Any]:
    """A JSON object from a file of a model directory.

    Raises:
        ModelFileError: The file is missing, too large or holds something else.
    """
    try:
        with path.open("rb") as file:
            text = file.read(max_bytes + 1)
    except (OSError, ValueError) as exc:  # ValueError: a path with a null byte
        raise _unreadable(path, exc) from exc
    return parse_json(str(path), text, max_bytes=max_bytes)


def parse_json(where: str, text: bytes, *, max_bytes: int = MAX_HEADER_BYTES) -> dict[str, Any]:
    """A JSON object from a header, an index or a config.

    Raises:
        ModelFileError: It is something else, or larger than any of these.
    """
    num_values = sum(text.count(mark) for mark in (b",", b"[", b"{"))
    if len(text) > max_bytes or num_values > max_bytes // BYTES_PER_VALUE:
        raise _damaged(where, f"{len(text)} bytes of JSON with {num_values} values are no model's")
    try:
        found = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as exc:
        raise _damaged(where, f"not JSON ({exc!s:.200})") from exc
    if not isinstance(found, dict):
        raise _damaged(where, "not a JSON object")
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
        raise _damaged(path, f"tensor {_shown(name)}: {exc}") from exc
    bits = DTYPE_BITS.get(stored.dtype)
    if bits is None:
        raise _damaged(
            path, f"the tensor {_shown(name)} is of an unknown dtype {_shown(stored.dtype)}"
        )
    begin, end = stored.data_offsets
    if min((begin, *stored.shape)) < 0 or (end - begin) * 8 != math.prod(stored.shape) * bits:
        raise _damaged(
            path, f"the tensor {_shown(name)} has shape {stored.shape} in {end - begin} bytes"
        )
    return SafeTensor(path, name, stored.dtype, stored.shape, start + begin)


Number = Annotated[int, msgspec.Meta(ge=-(2**62), le=2**62)]


class _Entry(msgspec.Struct):
    dtype: str
    shape: Annotated[tuple[Number, ...], msgspec.Meta(max_length=8)]
    data_offsets: tuple[Number, Number]


def _check_layout(path: Path, tensors: Iterable[SafeTensor], start: int, file_bytes: int) -> None:
    """The format allows no gap and no overlap."""
    at = start
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        if tensor.offset != at:
            raise _damaged(
                path, f"the tensor {_shown(tensor.name)} does not begin where the last ends"
            )
        at += tensor.size_bytes
    if at != file_bytes:
        raise _damaged(path, f"its tensors end at byte {at}, the file at byte {file_bytes}")


def _shown(name: str) -> str:
    """A name from a file as it may stand in a sentence: not too long, and on one line."""
    return name[:80].encode("unicode_escape").decode()


def _unreadable(path: Path, exc: Exception) -> ModelFileError:
    reason = getattr(exc, "strerror", None) or exc
    return ModelFileError(f"{path} cannot be read ({reason}); download it again")


def _damaged(where: Path | str, what: str) -> ModelFileError:
    return ModelFileError(f"{where} is damaged: {what}; download it again")
