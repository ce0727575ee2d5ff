"""Reads the header of a GGUF file: metadata and where each tensor lies, never a weight.

The file is mapped, so a header costs the pages it stands on, and what it announces is believed only
as far as the file's size allows: a damaged or hostile header ends in one sentence, not in a crash,
a hang or an allocation.  A header may also be read from a file's first bytes.  Versions 2 and 3,
little-endian.  Where the format leaves a choice the rule is llama.cpp's, so that a file is refused
here, with a reason, rather than there.
"""

import math
import mmap
import struct
from pathlib import Path

import msgspec
import xxhash

from brim.errors import ModelFileError, NotFound
from brim.registry.ggml_types import GGML_TYPES

MAGIC = b"GGUF"

MAX_PAIRS = 65_536
"""Metadata pairs and, separately, tensors.  Large models have about 60 pairs and 2,000 tensors,
unstacked mixtures 36,000; the bound keeps a file of zeros from being walked for minutes."""

MAX_STRINGS = 16_777_216
"""Strings in all arrays of a header, for the same reason: 30 times the largest vocabulary with its
merges, walked in about three seconds."""

MAX_KEPT_ITEMS = 4_096
"""Longest array of numbers that is kept unasked.  Those of interest have an item for each layer;
longer ones have an item for each token."""

MAX_DIMENSIONS = 4
"""ggml's tensors have no more."""

MAX_NAME_BYTES = 1_024
"""Of a key or a tensor's name; llama.cpp's tensors have under 64, its keys under 100."""

FEW_STRINGS = 1_024
"""Below it walking over an array's strings is as quick as looking for its end."""

MAX_JUMP_BYTES = 1 << 24
"""How far to look for the key behind an array: 262,144 tokens or 520,000 merges take 4 to 9 MB."""

TOKENIZER_KEY = b"tokenizer.ggml."
"""How the keys of a tokenizer begin.  No vocabulary has such a token; one that had would at worst
give another description of the file, as walking its strings would of a file that lies."""

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")

_STRING, _ARRAY = 8, 9
_NUMBERS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
"""Metadata value types of fixed size."""

Scalar = bool | int | float | str


class GgufArray(msgspec.Struct, frozen=True):
    """An array of the metadata; `items` is None where it was walked but not kept."""

    length: int
    items: tuple[Scalar, ...] | None


class TensorInfo(msgspec.Struct, frozen=True):
    """Where one tensor lies and what it is."""

    name: str
    shape: tuple[int, ...]
    """Row length first, as ggml counts."""
    type_name: str
    offset: int
    """From the start of the file."""
    size_bytes: int

    @property
    def num_elements(self) -> int:
        """Elements, whatever they are stored as."""
        return math.prod(self.shape)


class GgufHeader(msgspec.Struct, frozen=True, kw_only=True):
    """All that a GGUF file says before its weights begin."""

    where: str
    """The file, for messages."""
    version: int
    metadata: dict[str, Scalar | GgufArray]
    tensors: tuple[TensorInfo, ...]
    header_bytes: int
    """Where tensor data begins."""
    file_bytes: int
    digest: str
    """XXH3-128 of the header's bytes.  It tells files apart and proves nothing: a cryptographic
    hash would take longer than all the rest."""


def read_gguf_header(path: str | Path, *, keep: frozenset[str] = frozenset()) -> GgufHeader:
    """The header of one GGUF file (one part of a split one).

    Args:
        path: The file.
        keep: Keys whose arrays are wanted whole, however long (`tokenizer.ggml.tokens`).

    Raises:
        NotFound: There is no such file.
        ModelFileError: It is no GGUF file, is damaged or cut short, or cannot be read.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise ModelFileError(f"{path} is a directory; name a .gguf file in it")
        # A pipe would be waited on for ever, a device has no size.
        if path.exists() and not path.is_file():
            raise ModelFileError(f"{path} is not a regular file; name a .gguf file")
        with path.open("rb") as file:
            file_bytes = file.seek(0, 2)
            if file_bytes == 0:
                raise ModelFileError(f"{path} is empty; download it again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(str(path), data, file_bytes).header(keep)
    except FileNotFoundError as exc:
        raise NotFound(f"there is no file {path}; check the path") from exc
    except (OSError, ValueError) as exc:  # ValueError: a path with a null byte
        reason = getattr(exc, "strerror", None) or exc
        raise ModelFileError(f"{path} cannot be read ({reason}); check the path") from exc


def parse_gguf_header(where: str, start: bytes, file_bytes: int) -> GgufHeader | None:
    """The header in a file's first bytes; None where it goes on after them.

    Args:
        where: The file, for messages.
        start: Its first bytes.
        file_bytes: Its whole size.

    Raises:
        ModelFileError: It is no GGUF file, is damaged or cut short.
    """
    try:
        return _Reader(where, start, file_bytes).header(frozenset())
    except _MoreNeeded:
        return None


class _MoreNeeded(Exception):
    """The header goes on after the bytes that are at hand."""


class _Reader:
    """A place in a header; every step forward is checked against the file's end.

    Args:
        where: The file, for messages.
        data: All of it or its beginning.
        end: Its whole size.
    """

    def __init__(self, where: str, data: mmap.mmap | bytes, end: int) -> None:
        self.where = where
        self.data = data
        self.end = end
        self.at_hand = len(data)
        self.at = 0
        self.num_strings = 0

    def header(self, keep: frozenset[str]) -> GgufHeader:
        version = self.version()
        num_tensors, num_pairs = self.number(_U64), self.number(_U64)
        # A pair takes at least 13 bytes (empty key, type, one byte), a tensor at least 32.
        self.check_count(num_pairs, 13, MAX_PAIRS, "metadata pairs")
        self.check_count(num_tensors, 32, MAX_PAIRS, "tensors")
        metadata = self.metadata(num_pairs, keep)
        alignment = self.alignment(metadata)
        tensors, header_bytes = self.tensors(num_tensors, alignment)
        return GgufHeader(
            where=self.where,
            version=version,
            metadata=metadata,
            tensors=tensors,
            header_bytes=header_bytes,
            file_bytes=self.end,
            digest=self.digest(),
        )

    def digest(self) -> str:
        with memoryview(self.data) as view, view[: self.at] as header:
            return xxhash.xxh3_128_hexdigest(header)

    # --- errors --------------------------------------------------------------------------------

    def damaged(self, what: str) -> ModelFileError:
        return ModelFileError(f"{self.where} is damaged: {what}; download it again")

    def beyond(self, at: int) -> Exception:
        """What to raise where bytes before `at` are wanted that are not at hand."""
        if at <= self.end:
            return _MoreNeeded()
        return ModelFileError(
            f"{self.where} is cut short or damaged: its header goes on past the file's end at "
            f"byte {self.end}; download it again"
        )

    def check_count(self, count: int, least_bytes: int, most: int, what: str) -> None:
        if count > most or count * least_bytes > self.end - self.at:
            raise self.damaged(f"its header announces {count} {what} in {self.end} bytes")

    # --- bytes ---------------------------------------------------------------------------------

    def skip(self, num_bytes: int) -> int:
        """Step over bytes; gives where they began."""
        start = self.at
        if num_bytes > self.at_hand - start:
            raise self.beyond(start + num_bytes)
        self.at = start + num_bytes
        return start

    def number(self, kind: struct.Struct) -> int:
        value: int = kind.unpack_from(self.data, self.skip(kind.size))[0]
        return value

    def string(self) -> bytes:
        start = self.skip(self.number(_U64))
        return self.data[start : self.at]

    def name(self, what: str) -> str:
        length = self.number(_U64)
        if length > MAX_NAME_BYTES:
            raise self.damaged(f"{what} has {length} bytes")
        start = self.skip(length)
        try:
            return self.data[start : self.at].decode()
        except UnicodeDecodeError as exc:
            raise self.damaged(f"{what} is not UTF-8") from exc

    # --- metadata ------------------------------------------------------------------------------

    def version(self) -> int:
        start = self.data[:16]
        if not start.startswith(MAGIC):
            raise ModelFileError(f"{self.where} is not a GGUF file: {_what_it_is(start)}")
        self.skip(len(MAGIC))
        version = self.number(_U32)
        # Versions are small numbers: only one read in the wrong byte order has its low half empty.
        if version and version & 0xFFFF == 0:
            raise ModelFileError(
                f"{self.where} is a big-endian GGUF file; get the little-endian one"
            )
        if version not in (2, 3):
            raise ModelFileError(
                f"{self.where} is GGUF version {version}, and brim reads 2 and 3; "
                "get a newer conversion of the model"
            )
        return version

    def metadata(self, num_pairs: int, keep: frozenset[str]) -> dict[str, Scalar | GgufArray]:
        found: dict[str, Scalar | GgufArray] = {}
        for _ in range(num_pairs):
            key = self.name("a metadata key")
            if key in found:
                raise self.damaged(f"the key {key!r:.80} stands in its header twice")
            kind = self.number(_U32)
            found[key] = self.array(key, key in keep) if kind == _ARRAY else self.value(key, kind)
        return found

    def value(self, key: str, kind: int) -> Scalar:
        if kind == _STRING:
            # A stray byte in a description is no reason to refuse a model.
            return self.string().decode(errors="replace")
        number = _NUMBERS.get(kind)
        if number is None:
            raise self.damaged(f"the value of {key!r:.80} is of an unknown type ({kind})")
        scalar: Scalar = number.unpack_from(self.data, self.skip(number.size))[0]
        return scalar

    def array(self, key: str, keep: bool) -> GgufArray:
        kind, length = self.number(_U32), self.number(_U64)
        if kind == _STRING:
            return self.strings(key, length, keep)
        number = _NUMBERS.get(kind)
        if number is None:
            raise self.damaged(f"the array {key!r:.80} is of an unknown type ({kind})")
        start = self.skip(length * number.size)
        if not keep and length > MAX_KEPT_ITEMS:
            return GgufArray(length, None)
        items = struct.unpack_from(f"<{length}{number.format[1:]}", self.data, start)
        return GgufArray(length, items)

    def strings(self, key: str, length: int, keep: bool) -> GgufArray:
        self.num_strings += length
        if length * _U64.size > self.end - self.at or self.num_strings > MAX_STRINGS:
            raise self.damaged(f"the array {key!r:.80} announces {length} strings")
        if keep:
            return GgufArray(
                length, tuple(self.string().decode(errors="replace") for _ in range(length))
            )
        if length < FEW_STRINGS or not self.jump(length):
            self.walk(length)
        return GgufArray(length, None)

    def jump(self, length: int) -> bool:
        """Step over many strings at once, where what follows them can be found and proves it.

        A tokenizer's arrays are followed by another of its keys.  Up to that key's text stand seven
        zeros, the upper bytes of a short string's length, for each string and for the key.  Where
        the number differs (empty or long strings, another key) nothing is stepped over.
        """
        start = self.at
        text_at = self.data.find(TOKENIZER_KEY, start, start + MAX_JUMP_BYTES)
        if text_at < 0 or self.data[start:text_at].count(0) != 7 * (length + 1):
            return False
        self.at = text_at - _U64.size
        return True

    def walk(self, length: int) -> None:
        # The hot loop of this module, so without calls.
        data, at, last, unpack = self.data, self.at, self.at_hand - _U64.size, _U64.unpack_from
        for _ in range(length):
            if at > last:
                raise self.beyond(at + _U64.size)
            at += 8 + unpack(data, at)[0]
        if at > self.at_hand:
            raise self.beyond(at)
        self.at = at

    def alignment(self, metadata: dict[str, Scalar | GgufArray]) -> int:
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self.damaged(f"its alignment is {alignment!r}, not a power of two")
        return alignment

    # --- tensors -------------------------------------------------------------------------------

    def tensors(self, num_tensors: int, alignment: int) -> tuple[tuple[TensorInfo, ...], int]:
        """All tensors with offsets from the file's start, and where the first one lies."""
        found: dict[str, TensorInfo] = {}
        expected_offset = 0
        for _ in range(num_tensors):
            tensor = self.tensor()
            if tensor.name in found:
                raise self.damaged(f"the tensor {tensor.name!r:.80} stands in its header twice")
            # llama.cpp's rule: tensors follow each other in the header's order, padded.
            if tensor.offset != expected_offset:
                raise self.damaged(
                    f"the tensor {tensor.name!r:.80} is said to lie at {tensor.offset}, "
                    f"not at {expected_offset} where the one before it ends"
                )
            found[tensor.name] = tensor
            expected_offset += _padded(tensor.size_bytes, alignment)
        start = _padded(self.at, alignment)
        last_byte = max((start + t.offset + t.size_bytes for t in found.values()), default=0)
        if last_byte > self.end:
            raise ModelFileError(
                f"{self.where} is cut short: its tensors end at byte {last_byte}, the file at byte "
                f"{self.end}; download it again"
            )
        placed = (
            TensorInfo(t.name, t.shape, t.type_name, start + t.offset, t.size_bytes)
            for t in found.values()
        )
        return tuple(placed), start

    def tensor(self) -> TensorInfo:
        name = self.name("a tensor's name")
        num_dimensions = self.number(_U32)
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            raise self.damaged(f"the tensor {name!r:.80} has {num_dimensions} dimensions")
        shape = tuple(self.number(_U64) for _ in range(num_dimensions))
        number = self.number(_U32)
        kind = GGML_TYPES.get(number)
        if kind is None:
            raise ModelFileError(
                f"{self.where} holds the tensor {name!r:.80} of type {number}, which this "
                "version of brim does not know; get another quant of the model, or a newer brim"
            )
        if 0 in shape or shape[0] % kind.block_size:
            raise self.damaged(
                f"the tensor {name!r:.80} has the shape {list(shape)} in {kind.name}"
            )
        size_bytes = math.prod(shape) // kind.block_size * kind.block_bytes
        return TensorInfo(name, shape, kind.name, self.number(_U64), size_bytes)


def _padded(num_bytes: int, alignment: int) -> int:
    return -(-num_bytes // alignment) * alignment


def _what_it_is(start: bytes) -> str:
    """What stands where a model should, from its first bytes, and what to do about it."""
    if start.startswith(b"version https:"):
        return "it is a Git LFS pointer to one; run git lfs pull, or download it again"
    if start.lstrip()[:5].lower() in (b"<!doc", b"<html"):
        return "it is a web page; download the file itself, not the page about it"
    if start[8:9] == b"{":
        return (
            "it looks like a safetensors file; convert its directory: "
            "brim convert MODEL_DIR OUT.gguf"
        )
    return f"it begins with {start[:4]!r}, not {MAGIC!r}; download it again"
