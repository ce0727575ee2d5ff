"""GGUF files written byte by byte, so that they can be wrong in any one place."""

import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.models import PYSTD_1M

Build = Callable[..., bytes]


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if isinstance(value, bytes):  # type and value as they stand
        return value
    if all(isinstance(item, str) for item in value):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_string, value))
    return struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)


def build_gguf(
    pairs: dict[str, Any] | list[tuple[str, Any]],
    tensors: list[tuple[str, tuple[int, ...], int, int]] | None = None,
    *,
    version: int = 3,
    num_pairs: int | None = None,
    num_tensors: int | None = None,
    data_bytes: int = 0,
) -> bytes:
    """A file of these pairs and (name, shape, type, offset) tensors, true or not."""
    items = list(pairs.items()) if isinstance(pairs, dict) else pairs
    tensors = tensors or []
    out = b"GGUF" + struct.pack(
        "<IQQ",
        version,
        len(tensors) if num_tensors is None else num_tensors,
        len(items) if num_pairs is None else num_pairs,
    )
    out += b"".join(_string(key) + _value(value) for key, value in items)
    for name, shape, kind, offset in tensors:
        out += _string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        out += struct.pack("<IQ", kind, offset)
    return out + bytes(-len(out) % 32) + bytes(data_bytes)


LLAMA_PAIRS: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.context_length": 512,
    "llama.embedding_length": 64,
    "llama.block_count": 2,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
}

LLAMA_TENSORS = [("token_embd.weight", (64, 8), 0, 0), ("output_norm.weight", (64,), 0, 2048)]
LLAMA_DATA_BYTES = 2048 + 256


@pytest.fixture
def gguf_bytes() -> Build:
    """`build_gguf`."""
    return build_gguf


@pytest.fixture
def write_llama(tmp_path: Path) -> Callable[..., Path]:
    """Writes a small GGUF model with some keys changed; None leaves a key out."""

    def write(changes: dict[str, Any] | None = None, name: str = "Small-Q8_0.gguf") -> Path:
        pairs = {k: v for k, v in (LLAMA_PAIRS | (changes or {})).items() if v is not None}
        path = tmp_path / name
        path.write_bytes(build_gguf(pairs, LLAMA_TENSORS, data_bytes=LLAMA_DATA_BYTES))
        return path

    return write


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the small trained Llama that the tests bring along, free to be spoilt."""
    return Path(shutil.copytree(PYSTD_1M, tmp_path / "pystd-1m"))
