"""Part of a sequence as a self-describing block: header, tokens, the backend's state, checksum.

Layout, little-endian:

    offset  bytes  what
    0       4      magic "BRKV"
    4       4      u32 format version
    8       4      u32 length of the identity
    12      4      u32 number of tokens
    16      8      u64 tokens of the sequence that stand before these
    24      8      u64 length of the state
    32      16     xxh3-128 of everything after this field
    48      ...    identity (UTF-8: model fingerprint, backend version, KV types)
    ...     4 n    tokens, i32 each
    ...     ...    state, as the backend wrote it

The checksum is there because llama.cpp's own import accepts flipped payload bytes.  If you change
the layout, change VERSION.
"""

import mmap
import os
import struct
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import xxhash

from brim.engine.base import Allocate
from brim.errors import DoesNotFit, StoreError
from brim.machine.file_blocks import reserve_blocks
from brim.machine.file_system import is_in_memory

MAGIC = b"BRKV"
VERSION = 2
_HEADER = struct.Struct("<4sIIIQQ16s")
_CHECKED_FROM = _HEADER.size

_ON_DISK = Path("/var/tmp")
"""By the file system standard on a disk, where /tmp often lies in memory."""


class Block(msgspec.Struct, frozen=True):
    """A block that was read and found whole."""

    start: int
    """Tokens of the sequence that stand before it."""
    tokens: list[int]
    state: memoryview


def write(
    identity: str,
    tokens: Sequence[int],
    state_bytes: int,
    fill: Callable[[int, int], int],
    *,
    start: int = 0,
    allocate: Allocate | None = None,
) -> memoryview:
    """A block, in a mapped temporary file that vanishes when the view is released.

    Args:
        identity: Compared on import.
        tokens: Those of the block.
        state_bytes: Size of the state.
        fill: Called with (address, size); writes the state there and returns the bytes written.
        start: Tokens of the sequence that stand before these.
        allocate: Makes room elsewhere than in a temporary file.

    Raises:
        StoreError: The state came out shorter or longer than announced, or the disk is full.
    """
    name = identity.encode()
    token_data = np.asarray(tokens, np.int32).tobytes()
    state_at = _HEADER.size + len(name) + len(token_data)
    view = (allocate or temporary)(state_at + state_bytes)
    view[_HEADER.size : state_at] = name + token_data
    written = fill(address_of(view) + state_at, state_bytes)
    if written != state_bytes:
        raise StoreError(f"the backend exported {written} of {state_bytes} bytes of KV")
    checksum = xxhash.xxh3_128_digest(view[_CHECKED_FROM:])
    view[: _HEADER.size] = _HEADER.pack(
        MAGIC, VERSION, len(name), len(tokens), start, state_bytes, checksum
    )
    return view


def address_of(view: bytes | memoryview) -> int:
    """Where a buffer begins in memory, as long as somebody keeps it."""
    return int(np.frombuffer(view, np.uint8).ctypes.data)


def temporary(num_bytes: int) -> memoryview:
    """Room in a mapped file without a name, which vanishes when the view is released.

    On a disk wherever there is one: in a tmpfs it would take the memory that it is to free.

    Raises:
        StoreError: There is none.
    """
    try:
        with tempfile.TemporaryFile(prefix="brim-kv-", dir=_directory()) as file:
            reserve_blocks(file.fileno(), num_bytes)
            return memoryview(mmap.mmap(file.fileno(), num_bytes))
    except OSError as exc:
        raise StoreError(
            f"cannot write {num_bytes} bytes of KV to a temporary file: {exc}"
        ) from exc


def _directory() -> Path:
    """Where temporary files go: the usual place, unless that is in memory and another is not.

    A service may find the other read-only; that in memory is better than none then.
    """
    usual = Path(tempfile.gettempdir())
    if not is_in_memory(usual) or not os.access(_ON_DISK, os.W_OK) or is_in_memory(_ON_DISK):
        return usual
    return _ON_DISK


def read(identity: str, block: bytes | memoryview) -> Block:
    """What a block holds.

    Raises:
        StoreError: Damaged, cut short, of another version, or of another model or KV type.
    """
    view = memoryview(block).cast("B")
    if len(view) < _HEADER.size:
        raise StoreError("a stored KV block is cut short")
    header = _HEADER.unpack_from(view)
    magic, version, name_bytes, num_tokens, start, state_bytes, checksum = header
    if magic != MAGIC or version != VERSION:
        raise StoreError(f"a stored KV block is not of format {VERSION}")
    tokens_at = _HEADER.size + name_bytes
    state_at = tokens_at + 4 * num_tokens
    if len(view) != state_at + state_bytes:
        raise StoreError("a stored KV block has the wrong length")
    if xxhash.xxh3_128_digest(view[_CHECKED_FROM:]) != checksum:
        raise StoreError("a stored KV block is damaged (its checksum differs)")
    found = bytes(view[_HEADER.size : tokens_at]).decode("utf-8", "replace")
    if found != identity:
        raise StoreError(f"a stored KV block is of {found}, not of {identity}")
    tokens = np.frombuffer(view[tokens_at:state_at], np.int32).tolist()
    return Block(start, tokens, view[state_at:])


def check_place(block: Block, num_tokens: int, context_tokens: int) -> None:
    """Refuse a block that does not continue a sequence of `num_tokens`.

    Raises:
        StoreError: It belongs to another place.
        DoesNotFit: The window ends before it does.
    """
    if block.start != num_tokens:
        raise StoreError(
            f"a stored KV block continues {block.start} tokens; the sequence has {num_tokens}"
        )
    if block.start + len(block.tokens) > context_tokens:
        raise DoesNotFit(
            f"a stored KV block ends at token {block.start + len(block.tokens)}; "
            f"the context is {context_tokens}"
        )
