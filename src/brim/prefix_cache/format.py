"""One file of the prefix cache: a header that the index is made from, and the engine's block.

Layout, little-endian; docs/formats/prefix-cache.md explains it:

    offset  bytes  what
    0       8      magic "BRIMKVPC"
    8       4      u32 format version
    12      4      u32 bytes of the header, a multiple of 16384; the block begins there
    16      16     xxh3-128 of the header behind this field
    32      8      u64 bytes of the block, which ends the file
    40      8      u64 bytes of the model's files, for what a token is worth
    48      4      u32 start: tokens of the prefix before this segment
    52      4      u32 n: tokens of this segment
    56      32     SHA-256 of the tokens before the segment
    88      32     SHA-256 of all tokens up to its end
    120     16     key of the parent, the segment with the token before; zeros where start is 0
    136     32     SHA-256 of what the model's files are
    168     16     u32 x 4: bytes of identity, namespace, model name, model paths
    184     64     first bytes of the block, filled up with zeros: header and block belong together
    248     ...    the four texts, in UTF-8; paths are separated by NUL
    ...     4 n    tokens, i32 each
    ...     ...    zeros to the end of the header

A reader bounds every length by the size of the file before it uses it.  If you change the layout,
change VERSION and the page.
"""

import hashlib
import struct
from collections.abc import Iterable

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from brim.errors import StoreError

Tokens = NDArray[np.int32]

MAGIC = b"BRIMKVPC"
VERSION = 1

PAGE_BYTES = 16 * 1024
"""A page of memory on Apple silicon, and a multiple of other machines': a block can be mapped."""

BLOCK_HEAD_BYTES = 64
"""The engine's own header, with its checksum, begins a block: it tells blocks apart."""

MAX_TEXT_BYTES = 1024 * 1024
"""Of the identity, namespace, name and paths together; longer ones are no header of ours."""

MAX_TOKENS = 2**24
"""Of one prefix; no window comes near, and the header stays under 64 MiB."""

SUFFIX = ".kv"

_FIXED = struct.Struct("<8sII16sQQII32s32s16s32sIIII64s")
_CHECKED_FROM = 32
_NO_PARENT = bytes(16)


class Header(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """What a file says of its segment."""

    identity: str
    """The engine's, of the model and the form of its KV."""
    model_hash: bytes
    """Of what the model's files are: `model_files.model_hash`."""
    namespace: str
    model_name: str
    model_paths: tuple[str, ...]
    model_bytes: int
    start: int
    tokens: Tokens
    start_hash: bytes
    """SHA-256 of the tokens before `start`."""
    end_hash: bytes
    parent: str
    """Key of the segment that this one continues; empty where start is 0."""
    block_bytes: int
    block_head: bytes

    @property
    def end(self) -> int:
        """Behind the last token."""
        return self.start + len(self.tokens)

    @property
    def key(self) -> str:
        """The file's name without its suffix."""
        return segment_key(
            self.identity, self.model_hash, self.namespace, self.start, self.end_hash
        )

    @property
    def header_bytes(self) -> int:
        """Where the block begins."""
        texts = (self.identity, self.namespace, self.model_name, "\0".join(self.model_paths))
        return header_size(sum(len(_encoded(text)) for text in texts), len(self.tokens))

    @property
    def num_bytes(self) -> int:
        """Of the whole file."""
        return self.header_bytes + self.block_bytes


def prefix_hash(tokens: Tokens) -> bytes:
    """SHA-256 of tokens as i32, little-endian."""
    return hashlib.sha256(np.ascontiguousarray(tokens, "<i4").data).digest()


def directory_name(identity: str, model_hash: bytes) -> str:
    """Name of the directory with all segments of one model in one form."""
    return hashlib.sha256(_encoded(identity) + b"\0" + model_hash).hexdigest()[:32]


def segment_key(
    identity: str, model_hash: bytes, namespace: str, start: int, end_hash: bytes
) -> str:
    """32 hexadecimal digits that tell a segment from every other; nothing can be read from them."""
    parts = (directory_name(identity, model_hash).encode(), _encoded(namespace))
    digest = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts))
    digest.update(start.to_bytes(4, "little") + end_hash)
    return digest.hexdigest()[:32]


def header_size(text_bytes: int, num_tokens: int) -> int:
    """Bytes of a header, in whole pages."""
    size = _FIXED.size + text_bytes + 4 * num_tokens
    return -(-size // PAGE_BYTES) * PAGE_BYTES


def encode(header: Header) -> bytes:
    """The header as it stands in a file."""
    texts = _all_encoded(
        (header.identity, header.namespace, header.model_name, "\0".join(header.model_paths))
    )
    size = header_size(sum(map(len, texts)), len(header.tokens))
    out = bytearray(size)
    _FIXED.pack_into(
        out, 0, MAGIC, VERSION, size, bytes(16), header.block_bytes, header.model_bytes,
        header.start, len(header.tokens), header.start_hash, header.end_hash,
        bytes.fromhex(header.parent) or _NO_PARENT, header.model_hash, *map(len, texts),
        header.block_head,
    )  # fmt: skip
    body = b"".join(texts) + np.ascontiguousarray(header.tokens, "<i4").tobytes()
    out[_FIXED.size : _FIXED.size + len(body)] = body
    out[16:32] = xxhash.xxh3_128_digest(memoryview(out)[_CHECKED_FROM:])
    return bytes(out)


def decode(data: bytes | memoryview, file_bytes: int) -> Header:
    """The header of a file of `file_bytes`, of which `data` is at least the header.

    Raises:
        StoreError: Not a header of this version, cut short, damaged, or at odds with itself.
    """
    view = memoryview(data).cast("B")
    size = header_bytes_of(view, file_bytes)
    if len(view) < size or xxhash.xxh3_128_digest(view[_CHECKED_FROM:size]) != view[16:32]:
        raise StoreError("the header of a prefix cache entry is damaged")
    (
        _, _, _, _, block_bytes, model_bytes, start, num_tokens, start_hash, end_hash, parent,
        model_hash, *lengths, block_head,
    ) = _FIXED.unpack_from(view)  # fmt: skip
    _check_lengths(size, file_bytes, block_bytes, start, num_tokens, lengths)
    texts, at = [], _FIXED.size
    for length in lengths:
        texts.append(bytes(view[at : at + length]).decode("utf-8", "surrogateescape"))
        at += length
    if (start == 0) != (parent == _NO_PARENT):
        raise StoreError("a prefix cache entry has a parent at its start, or none behind it")
    return Header(
        identity=texts[0],
        model_hash=model_hash,
        namespace=texts[1],
        model_name=texts[2],
        model_paths=tuple(texts[3].split("\0")) if texts[3] else (),
        model_bytes=model_bytes,
        start=start,
        tokens=np.frombuffer(bytes(view[at : at + 4 * num_tokens]), "<i4").astype(
            np.int32, copy=False
        ),
        start_hash=start_hash,
        end_hash=end_hash,
        parent="" if parent == _NO_PARENT else parent.hex(),
        block_bytes=block_bytes,
        block_head=block_head,
    )


def header_bytes_of(data: bytes | memoryview, file_bytes: int) -> int:
    """How long the header is that these bytes begin, bounded by the file.

    Raises:
        StoreError: It is no header of this version, or longer than its file.
    """
    if len(data) < _FIXED.size:
        raise StoreError("a prefix cache entry is cut short")
    magic, version, size = struct.unpack_from("<8sII", data)
    if magic != MAGIC or version != VERSION:
        raise StoreError(f"a file is no prefix cache entry of format {VERSION}")
    limit = header_size(MAX_TEXT_BYTES, MAX_TOKENS)
    if size % PAGE_BYTES or not PAGE_BYTES <= size <= min(file_bytes, limit):
        raise StoreError("the header of a prefix cache entry has a wrong length")
    return int(size)


def _check_lengths(
    size: int, file_bytes: int, block_bytes: int, start: int, num_tokens: int, texts: list[int]
) -> None:
    if file_bytes != size + block_bytes or not block_bytes:
        raise StoreError("a prefix cache entry has a wrong length")
    if not 0 < num_tokens <= MAX_TOKENS - min(start, MAX_TOKENS):
        raise StoreError("a prefix cache entry has a wrong number of tokens")
    if sum(texts) > MAX_TEXT_BYTES or header_size(sum(texts), num_tokens) != size:
        raise StoreError("a prefix cache entry has texts of a wrong length")


def _encoded(text: str) -> bytes:
    # Paths of other encodings come as surrogates, and go back to the same bytes.
    return text.encode("utf-8", "surrogateescape")


def _all_encoded(texts: Iterable[str]) -> list[bytes]:
    return [_encoded(text) for text in texts]
