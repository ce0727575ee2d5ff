"""Repeats the cells of an exported KV block, so that a deep cache need not be read token by token.

For speed only: kernels take as long for copied cells as for computed ones, while filling 8,192
cells of quantised KV takes minutes on a CPU.  It follows llama.cpp's format of a sequence's state
(llama-kv-cache.cpp, `state_write`, llama-cpp-python 0.3.36) and refuses anything else.
"""

import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

_HEADER = struct.Struct("<4sIIIQ16s")
"""Of engine/kv_block.py."""

Bytes = npt.NDArray[np.uint8]


class _Reader:
    """Takes fields off the front of a state and puts them, changed or not, into another."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._at = data, 0
        self.out: list[bytes | Bytes] = []

    def copy(self, form: str) -> int:
        """Read one number and write it as it is."""
        (value,) = struct.unpack_from(form, self._data, self._at)
        self.out.append(bytes(self._data[self._at : self._at + struct.calcsize(form)]))
        self._at += struct.calcsize(form)
        return int(value)

    def take(self, num_bytes: int) -> Bytes:
        """The next bytes, which are not written."""
        found = np.frombuffer(self._data, np.uint8, num_bytes, self._at)
        self._at += num_bytes
        return found

    @property
    def is_done(self) -> bool:
        """Whether nothing is left."""
        return self._at == len(self._data)


def repeat_block(path: Path, times: int) -> None:
    """Replace the block in `path` by one that holds its cells `times` times.

    Raises:
        SystemExit: The state is not of the format that this follows.
    """
    view = memoryview(path.read_bytes())
    magic, version, name_bytes, num_tokens, _, _ = _HEADER.unpack_from(view)
    tokens_at = _HEADER.size + name_bytes
    state_at = tokens_at + 4 * num_tokens
    tokens = np.tile(np.frombuffer(view[tokens_at:state_at], np.int32), times)
    state = _repeated(view[state_at:], num_tokens, times)
    body = bytes(view[_HEADER.size : tokens_at]) + tokens.tobytes() + state
    digest = xxhash.xxh3_128_digest(body)
    header = _HEADER.pack(magic, version, name_bytes, len(tokens), len(state), digest)
    path.write_bytes(header + body)


def _repeated(state: memoryview, num_tokens: int, times: int) -> bytes:
    reader = _Reader(state)
    reader.copy("<I")  # magic
    reader.copy("<i")  # sequence
    if reader.copy("<I") != 1 or reader.copy("<I") != num_tokens:
        raise SystemExit("the state holds other cells than one stream of the sequence's tokens")
    reader.out[-1] = struct.pack("<I", num_tokens * times)
    cells = np.tile(reader.take(12 * num_tokens).view(np.int32).reshape(-1, 3), (times, 1))
    cells[:, 0] = np.arange(len(cells))
    reader.out.append(cells.tobytes())
    is_transposed, num_layers = reader.copy("<I"), reader.copy("<I")
    for _ in range(num_layers):
        _repeat_rows(reader, num_tokens, times)
    for _ in range(num_layers):
        if is_transposed:
            _repeat_columns(reader, num_tokens, times)
        else:
            _repeat_rows(reader, num_tokens, times)
    if not reader.is_done:
        raise SystemExit("the state holds more than this knows of")
    return b"".join(bytes(part) for part in reader.out)


def _repeat_rows(reader: _Reader, num_tokens: int, times: int) -> None:
    """A cell is a row: rows follow each other."""
    reader.copy("<i")  # type
    row_bytes = reader.copy("<Q")
    reader.out.append(np.tile(reader.take(row_bytes * num_tokens), times))


def _repeat_columns(reader: _Reader, num_tokens: int, times: int) -> None:
    """A cell is a column: each row has one value of every cell."""
    reader.copy("<i")  # type
    value_bytes, num_rows = reader.copy("<I"), reader.copy("<I")
    rows = reader.take(value_bytes * num_rows * num_tokens).reshape(num_rows, -1)
    reader.out.append(np.tile(rows, (1, times)))
