"""A blueprint from another file's header: the same keys, tensors and types, whatever they mean.

Works for every architecture that the backend loads, because nothing is interpreted: pairs are
copied as bytes.  Of a split file the parts become one.
"""

import mmap
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from brim.bench.standin.blueprint import ARRAY, NUMBER_BYTES, STRING, Blueprint, Pair, Tensor
from brim.registry.describe import split_parts
from brim.registry.gguf_header import GgufHeader, read_gguf_header
from brim.registry.remote import RemoteFiles, gguf_header_at

_FIRST_PAIR = 24
"""After magic, version and the numbers of tensors and pairs."""

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


def clone_blueprint(path: str | Path) -> Blueprint:
    """The blueprint of a GGUF file, or of all parts of a split one.

    Raises:
        NotFound: There is no such file.
        ModelFileError: It is no GGUF file, damaged or incomplete.
    """
    parts = split_parts(Path(path))
    headers = [read_gguf_header(part) for part in parts]
    with (
        parts[0].open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        return blueprint_of(headers, data)


def clone_remote(files: RemoteFiles, names: Sequence[str]) -> Blueprint:
    """The blueprint of a remote GGUF file, of which only the header is fetched.

    Args:
        files: Where it is.
        names: All parts of a split file in order, or the file alone.

    Raises:
        BrimError: A file cannot be read, is no GGUF file or damaged.
    """
    read = [gguf_header_at(files, name) for name in names]
    return blueprint_of([header for header, _ in read], read[0][1])


def blueprint_of(headers: list[GgufHeader], start: bytes | mmap.mmap) -> Blueprint:
    """The blueprint of parts whose headers were read, and so found sound.

    Args:
        headers: Of all parts, in order.
        start: The first part's bytes, up to its tensors at least.
    """
    alignment = headers[0].metadata.get("general.alignment", 32)
    tensors = (tensor for header in headers for tensor in header.tensors)
    return Blueprint(
        tuple(pair for pair in _pairs(start) if not pair.key.startswith("split.")),
        tuple(Tensor(tensor.name, tensor.shape, tensor.type_name) for tensor in tensors),
        alignment if isinstance(alignment, int) else 32,
    )


def _pairs(data: bytes | mmap.mmap) -> Iterator[Pair]:
    """The pairs of a header that was read before: it is not checked again."""
    (number,) = _U64.unpack_from(data, _FIRST_PAIR - _U64.size)
    at = _FIRST_PAIR
    for _ in range(number):
        end = _end_of_string(data, at)
        key = bytes(data[at + _U64.size : end]).decode()
        (kind,) = _U32.unpack_from(data, end)
        start = end + _U32.size
        at = _end_of_value(data, start, kind)
        yield Pair(key, kind, bytes(data[start:at]))


def _end_of_value(data: bytes | mmap.mmap, at: int, kind: int) -> int:
    if kind == STRING:
        return _end_of_string(data, at)
    if kind != ARRAY:
        return at + NUMBER_BYTES[kind]
    (item_kind,), (length,) = _U32.unpack_from(data, at), _U64.unpack_from(data, at + _U32.size)
    at += _U32.size + _U64.size
    if item_kind != STRING:
        return int(at + length * NUMBER_BYTES[item_kind])
    for _ in range(length):
        at = _end_of_string(data, at)
    return at


def _end_of_string(data: bytes | mmap.mmap, at: int) -> int:
    return int(at + _U64.size + _U64.unpack_from(data, at)[0])
