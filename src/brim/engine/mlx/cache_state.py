"""A sequence's caches as bytes: what each layer holds, then the arrays' raw rows, little-endian.

Layout:

    offset  bytes  what
    0       8      u64 length of the description, a multiple of 64
    8       ...    description: JSON of `Description`, padded with spaces
    ...     ...    every array's rows, C order, in the order of the description

Nothing but the held tokens is written, straight from the buffers.  Checksum, identity of the model
and tokens are added by engine.kv_block.
"""

import ctypes
import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import msgspec
import numpy as np
from mlx_lm.models.cache import ArraysCache
from numpy.typing import NDArray

from brim.engine.mlx.kv_cache import LayerKV
from brim.engine.mlx.leaves import kind_of
from brim.engine.mlx.window_kv import WindowKV
from brim.errors import StoreError

_LENGTH = struct.Struct("<Q")

_ALIGN_BYTES = 64
"""A cache line: arrays then begin where copying is fastest."""

_RAW = {1: (mx.uint8, np.uint8), 2: (mx.uint16, np.uint16), 4: (mx.uint32, np.uint32)}
"""By item size: types to move bits as, because numpy has no bfloat16."""

_DTYPES = {
    str(dtype).removeprefix("mlx.core."): dtype
    for dtype in (
        mx.float32, mx.float16, mx.bfloat16, mx.uint32, mx.int32, mx.uint16, mx.int16,
        mx.uint8, mx.int8, mx.bool_,
    )
}  # fmt: skip


class ArrayShape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One array of the state."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its rows."""
        return int(_DTYPES[self.dtype].size * np.prod(self.shape, dtype=object))


class LayerShape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one cache holds."""

    kind: str
    num_tokens: int
    """Position of the next token; 0 where the kind does not count."""
    arrays: list[ArrayShape | None]


class Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the state holds; written before the arrays."""

    start: int
    """Tokens that stand before it."""
    num_tokens: int
    """Those, and its own."""
    layers: list[LayerShape]


class _Rows(NamedTuple):
    """Cells [start, end) of an array's last axis but one; all where there is no end."""

    array: mx.array
    start: int = 0
    end: int | None = None


def _rows_of(leaf: Any, start: int = 0, end: int | None = None) -> list[_Rows | None]:
    """The arrays of a cache and which of their rows are of tokens [start, end), all by default."""
    if isinstance(leaf, LayerKV):
        first, last = leaf.rows_at(leaf.offset if end is None else end)
        # A part is asked of caches alone whose rows are those of all tokens.
        return [_Rows(part, max(first, start), last) for part in leaf.parts]
    if isinstance(leaf, ArraysCache):
        if leaf.left_padding is not None or leaf.lengths is not None:
            raise StoreError("a sequence that is still in a batch cannot be stored")
        parts: Sequence[mx.array | None] = leaf.cache
        return [None if part is None else _Rows(part) for part in parts]
    raise StoreError(f"mlx: caches of kind {type(leaf).__name__} cannot be stored")


def _shape_of(rows: _Rows | None) -> ArrayShape | None:
    if rows is None:
        return None
    shape = list(rows.array.shape)
    if rows.end is not None:
        shape[-2] = rows.end - rows.start
    return ArrayShape(dtype=_dtype_name(rows.array), shape=tuple(shape))


def _dtype_name(array: mx.array) -> str:
    return str(array.dtype).removeprefix("mlx.core.")


def _describe(leaves: Sequence[Any], start: int, end: int) -> bytes:
    description = Description(
        start=start,
        num_tokens=end,
        layers=[
            LayerShape(
                kind=kind_of(leaf),
                num_tokens=min(leaf.offset, end) if isinstance(leaf, LayerKV) else 0,
                arrays=[_shape_of(rows) for rows in _rows_of(leaf, start, end)],
            )
            for leaf in leaves
        ],
    )
    text = msgspec.json.encode(description)
    padding = -(_LENGTH.size + len(text)) % _ALIGN_BYTES
    return _LENGTH.pack(len(text) + padding) + text + b" " * padding


def _all_shapes(description: Description) -> Iterator[ArrayShape]:
    for layer in description.layers:
        yield from (array for array in layer.arrays if array is not None)


def size_of(leaves: Sequence[Any], start: int, end: int) -> int:
    """Bytes that `write` writes."""
    head = _describe(leaves, start, end)
    description = msgspec.json.decode(head[_LENGTH.size :], type=Description)
    return len(head) + sum(shape.nbytes for shape in _all_shapes(description))


def write(leaves: Sequence[Any], start: int, end: int, address: int, size: int) -> int:
    """Write the state of tokens [start, end) to memory.

    Args:
        leaves: The sequence's caches.
        start: The first token; other than 0 only where all caches keep every token.
        end: Behind the last; less than all only there.
        address: Where to write.
        size: Bytes that may be written there.

    Returns:
        The bytes written.

    Raises:
        StoreError: There is too little room, or a cache is of a kind that cannot be written.
    """
    needed = size_of(leaves, start, end)
    if size < needed:
        raise StoreError(f"a sequence's state takes {needed} bytes; there is room for {size}")
    target = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
    head = _describe(leaves, start, end)
    target[: len(head)] = np.frombuffer(head, np.uint8)
    at = len(head)
    for leaf in leaves:
        for rows in _rows_of(leaf, start, end):
            if rows is not None:
                at += _copy_out(rows, target[at:])
    return at


def _copy_out(rows: _Rows, target: NDArray[np.uint8]) -> int:
    """Copy rows straight out of the array's buffer; how many bytes they are."""
    mlx_type, numpy_type = _RAW[rows.array.dtype.size]
    source = np.asarray(rows.array.view(mlx_type), copy=False)
    if rows.end is not None:
        source = source[..., rows.start : rows.end, :]
    target[: source.nbytes].view(numpy_type).reshape(source.shape)[...] = source
    return int(source.nbytes)


def read(
    leaves: Sequence[Any], expected: Sequence[Any], state: memoryview, start: int, end: int
) -> None:
    """Fill caches that hold `start` tokens from a state of tokens [start, end).

    Args:
        leaves: The caches.
        expected: Caches with the shapes and types that a sequence of `end` tokens has.
        state: What `write` wrote.
        start: What the caches hold; other than 0 only where all of them keep every token.
        end: What they are to hold.

    Raises:
        StoreError: It is not of these caches; nothing was filled.
    """
    view = state.cast("B")
    description, at = _read_description(view)
    if (description.start, description.num_tokens, len(description.layers)) != (
        start, end, len(leaves),
    ):  # fmt: skip
        raise StoreError("a stored state is of other tokens or layers than it says")
    for layer, twin in zip(description.layers, expected, strict=True):
        _check_layer(layer, twin, start, end)
    if at + sum(shape.nbytes for shape in _all_shapes(description)) != len(view):
        raise StoreError("a stored state has the wrong length")
    for layer, leaf in zip(description.layers, leaves, strict=True):
        arrays: list[mx.array | None] = []
        for shape in layer.arrays:
            size = 0 if shape is None else shape.nbytes
            arrays.append(None if shape is None else _copy_in(shape, view[at : at + size]))
            at += size
        _fill(leaf, arrays, start, layer.num_tokens)


def _read_description(view: memoryview) -> tuple[Description, int]:
    """The description, and where the arrays begin."""
    if len(view) < _LENGTH.size:
        raise StoreError("a stored state is cut short")
    end = _LENGTH.size + _LENGTH.unpack_from(view)[0]
    if end > len(view):
        raise StoreError("a stored state is cut short")
    try:
        return msgspec.json.decode(view[_LENGTH.size : end], type=Description), end
    except msgspec.MsgspecError as exc:
        raise StoreError(f"a stored state does not say what it holds: {exc}") from exc


def _check_layer(layer: LayerShape, expected: Any, start: int, end: int) -> None:
    """Refuse a layer that the model would not have made."""
    kind = kind_of(expected)
    if layer.kind != kind:
        raise StoreError(f"a stored layer is of kind '{layer.kind}', not '{kind}'")
    want = [_shape_of(rows) for rows in _rows_of(expected)]
    if layer.num_tokens != (end if want and isinstance(expected, LayerKV) else 0):
        raise StoreError("a stored layer ends at another token than its sequence")
    if isinstance(expected, LayerKV) and want:
        rows = _num_rows(expected, layer, start, end)
        want = [
            shape and ArrayShape(shape.dtype, (*shape.shape[:2], rows, shape.shape[3]))
            for shape in want
        ]
    if layer.arrays != want:
        raise StoreError(f"a stored layer of kind '{kind}' has other arrays than the model's")


def _num_rows(expected: LayerKV, layer: LayerShape, start: int, end: int) -> int:
    """How many rows the layer must hold; a window's may be fewer than it would keep itself."""
    most = expected.num_rows_at(end) - start
    first = layer.arrays[0] if layer.arrays else None
    shape = () if first is None else first.shape
    if isinstance(expected, WindowKV) and len(shape) == 4:
        least = min(end, expected.window_tokens - 1)
        return max(least, min(shape[2], most))
    return most


def _copy_in(shape: ArrayShape, raw: memoryview) -> mx.array:
    dtype = _DTYPES[shape.dtype]
    mlx_type, numpy_type = _RAW[dtype.size]
    array = mx.array(np.frombuffer(raw, numpy_type).reshape(shape.shape), mlx_type)
    return array.view(dtype)


def _fill(leaf: Any, arrays: Sequence[mx.array | None], start: int, end: int) -> None:
    if isinstance(leaf, LayerKV):
        parts = [part for part in arrays if part is not None]
        if parts:
            if start == 0:
                leaf.put(parts, end)
            else:
                leaf.append(parts)
            # One layer at a time, so that only one is there twice.
            mx.eval(leaf.parts)
    else:
        leaf.cache = list(arrays)
        mx.eval([part for part in arrays if part is not None])
