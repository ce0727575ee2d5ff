"""What a GGUF file will hold, before a byte of it is written: metadata pairs and tensors.

A blueprint comes from a template (`templates`) or from another file's header (`clone`); the writer
turns it into a file, `slices` into a shorter model.  Pairs keep their bytes as the file has them,
so that a cloned header is the same to the bit, whatever its keys mean.
"""

import math
import struct
from collections.abc import Sequence

import msgspec

from brim.errors import ModelFileError
from brim.registry.ggml_types import GGML_TYPES

ALIGNMENT = 32
"""GGUF's default: where the file has no `general.alignment`."""

VERSION = 3

TYPE_NUMBERS = {kind.name: number for number, kind in GGML_TYPES.items()}

UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
"""GGUF's numbers of the value types that are written here."""

NUMBER_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of one value, by the number of its type; strings and arrays have none of their own."""


class Pair(msgspec.Struct, frozen=True):
    """One metadata pair: GGUF's number of the value's type, and the value's bytes in the file."""

    key: str
    kind: int
    payload: bytes


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def text_pair(key: str, text: str) -> Pair:
    """A string."""
    return Pair(key, STRING, _string(text))


def count_pair(key: str, count: int) -> Pair:
    """An unsigned number of 32 bits."""
    return Pair(key, UINT32, struct.pack("<I", count))


def real_pair(key: str, value: float) -> Pair:
    """A number of 32 bits with a fraction."""
    return Pair(key, FLOAT32, struct.pack("<f", value))


def flag_pair(key: str, value: bool) -> Pair:
    """A truth value."""
    return Pair(key, BOOL, struct.pack("<?", value))


def texts_pair(key: str, texts: Sequence[str]) -> Pair:
    """An array of strings."""
    head = struct.pack("<IQ", STRING, len(texts))
    return Pair(key, ARRAY, head + b"".join(map(_string, texts)))


def counts_pair(key: str, counts: Sequence[int]) -> Pair:
    """An array of signed numbers of 32 bits, which is what converters write for layers."""
    head = struct.pack("<IQ", INT32, len(counts))
    return Pair(key, ARRAY, head + struct.pack(f"<{len(counts)}i", *counts))


def flags_pair(key: str, flags: Sequence[bool]) -> Pair:
    """An array of truth values."""
    head = struct.pack("<IQ", BOOL, len(flags))
    return Pair(key, ARRAY, head + struct.pack(f"<{len(flags)}?", *flags))


class Tensor(msgspec.Struct, frozen=True):
    """One tensor of the file to be."""

    name: str
    shape: tuple[int, ...]
    """Row length first, as ggml counts."""
    type_name: str

    @property
    def num_elements(self) -> int:
        """Elements, whatever they are stored as."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes in the file, without padding.

        Raises:
            ModelFileError: Rows do not divide into the type's blocks.

        Example:
            >>> Tensor("output.weight", (256, 10), "Q4_K").size_bytes
            1440
        """
        kind = GGML_TYPES[TYPE_NUMBERS[self.type_name]]
        if self.shape[0] % kind.block_size:
            raise ModelFileError(
                f"the rows of {self.name} have {self.shape[0]} elements, {self.type_name} takes "
                f"multiples of {kind.block_size}; choose another quant"
            )
        return self.num_elements // kind.block_size * kind.block_bytes


class Blueprint(msgspec.Struct, frozen=True):
    """All pairs and tensors of one GGUF file, in the file's order."""

    pairs: tuple[Pair, ...]
    tensors: tuple[Tensor, ...]
    alignment: int = ALIGNMENT

    @property
    def weights_bytes(self) -> int:
        """Bytes of all tensors, without padding between them."""
        return sum(tensor.size_bytes for tensor in self.tensors)

    @property
    def file_bytes(self) -> int:
        """Size of the file that `writer.write` makes."""
        return len(self.header()) + sum(self.padded(t.size_bytes) for t in self.tensors)

    def padded(self, num_bytes: int) -> int:
        """`num_bytes` rounded up to the alignment."""
        return -(-num_bytes // self.alignment) * self.alignment

    def header(self) -> bytes:
        """Everything before the first tensor's data, padding included."""
        parts = [b"GGUF", struct.pack("<IQQ", VERSION, len(self.tensors), len(self.pairs))]
        for pair in self.pairs:
            parts += (_string(pair.key), struct.pack("<I", pair.kind), pair.payload)
        offset = 0
        for tensor in self.tensors:
            number = len(tensor.shape)
            parts += (_string(tensor.name), struct.pack(f"<I{number}Q", number, *tensor.shape))
            parts.append(struct.pack("<IQ", TYPE_NUMBERS[tensor.type_name], offset))
            offset += self.padded(tensor.size_bytes)
        data = b"".join(parts)
        return data + bytes(self.padded(len(data)) - len(data))
