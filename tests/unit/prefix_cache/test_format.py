"""The header of an entry: what is written is read, and nothing else is."""

import re
import struct
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import xxhash

from brim.errors import StoreError
from brim.prefix_cache import format as form

PAGE = Path(__file__).parents[3] / "docs" / "formats" / "prefix-cache.md"


def header_of(**changes: Any) -> form.Header:
    tokens = np.arange(7, 27, dtype=np.int32)
    header = form.Header(
        identity="model-1 engine-2 k=f16",
        model_hash=b"m" * 32,
        namespace="app",
        model_name="demo",
        model_paths=("/models/a.gguf", "/models/\udcff.gguf"),
        model_bytes=123456789,
        start=5,
        tokens=tokens,
        start_hash=form.prefix_hash(np.arange(5, dtype=np.int32)),
        end_hash=b"e" * 32,
        parent="0123456789abcdef" * 2,
        block_bytes=1000,
        block_head=b"h" * 64,
    )
    return msgspec.structs.replace(header, **changes)


def resealed(data: bytes, offset: int, value: bytes) -> bytes:
    """A header with one field changed and its checksum made good: what a hostile writer makes."""
    out = bytearray(data)
    out[offset : offset + len(value)] = value
    out[16:32] = xxhash.xxh3_128_digest(bytes(out[32:]))
    return bytes(out)


def test_a_header_is_read_as_it_was_written() -> None:
    """Every field comes back, tokens included, and a path that is no UTF-8 as well."""
    header = header_of()
    read = form.decode(form.encode(header), header.num_bytes)
    for name in form.Header.__struct_fields__:
        if name != "tokens":
            assert getattr(read, name) == getattr(header, name), name
    assert read.tokens.dtype == np.int32
    assert read.tokens.tolist() == header.tokens.tolist()
    assert (read.end, read.key, read.num_bytes) == (25, header.key, header.num_bytes)


def test_a_block_begins_on_a_page() -> None:
    """Headers are whole pages of 16 KiB, whatever the number of tokens."""
    for num_tokens in (1, 3700, 4100, 100_000):
        header = header_of(tokens=np.zeros(num_tokens, np.int32))
        assert header.header_bytes % (16 * 1024) == 0
        assert len(form.encode(header)) == header.header_bytes
        assert form.decode(form.encode(header), header.num_bytes).end == 5 + num_tokens


def test_any_changed_byte_of_a_header_is_noticed() -> None:
    """No byte of the header can change, padding included, without being refused."""
    header = header_of()
    data = form.encode(header)
    for at in [*range(600), *range(600, len(data), 97), len(data) - 1]:
        damaged = bytearray(data)
        damaged[at] ^= 1 << (at % 8)
        with pytest.raises(StoreError):
            form.decode(bytes(damaged), header.num_bytes)


@pytest.mark.parametrize("length", [0, 8, 247, 248, 16_383])
def test_a_header_that_is_cut_short_is_refused(length: int) -> None:
    """A file that ends within its header is no entry."""
    header = header_of()
    with pytest.raises(StoreError):
        form.decode(form.encode(header)[:length], length)


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        pytest.param(8, struct.pack("<I", 2), id="another version"),
        pytest.param(12, struct.pack("<I", 0), id="no header"),
        pytest.param(12, struct.pack("<I", 2**32 - 16384), id="a header of 4 GiB"),
        pytest.param(32, struct.pack("<Q", 2**60), id="a block of 2^60 bytes"),
        pytest.param(32, struct.pack("<Q", 0), id="no block"),
        pytest.param(48, struct.pack("<I", 2**32 - 1), id="a start at 2^32"),
        pytest.param(48, struct.pack("<I", 0), id="a parent at the start"),
        pytest.param(52, struct.pack("<I", 0), id="no tokens"),
        pytest.param(52, struct.pack("<I", 2**31), id="2^31 tokens"),
        pytest.param(120, bytes(16), id="no parent behind the start"),
        pytest.param(168, struct.pack("<I", 2**32 - 1), id="an identity of 4 GiB"),
        pytest.param(180, struct.pack("<I", 17_000), id="paths beyond the header"),
    ],
)
def test_lengths_are_bounded_before_they_are_used(offset: int, value: bytes) -> None:
    """A header whose checksum is right and whose lengths are not is refused."""
    header = header_of()
    with pytest.raises(StoreError):
        form.decode(resealed(form.encode(header), offset, value), header.num_bytes)


def test_the_length_of_the_file_must_fit() -> None:
    """A byte more or less than the header announces is damage."""
    header = header_of()
    for more in (-1, 1):
        with pytest.raises(StoreError, match="wrong length"):
            form.decode(form.encode(header), header.num_bytes + more)


def test_keys_tell_segments_apart_and_nothing_else() -> None:
    """Model, form, namespace, place and tokens each change the key; the namespace is not in it."""
    header = header_of(namespace="a-very-private-app")
    changes: list[dict[str, Any]] = [
        {"identity": "other"}, {"model_hash": b"n" * 32}, {"namespace": "b"}, {"start": 6},
        {"end_hash": b"f" * 32},
    ]  # fmt: skip
    keys = {msgspec.structs.replace(header, **change).key for change in changes}
    assert len({header.key, *keys}) == 6
    assert all(re.fullmatch("[0-9a-f]{32}", key) for key in keys)
    assert form.directory_name("a", b"b" * 32) != form.directory_name("a", b"c" * 32)


def test_the_page_says_where_each_field_is() -> None:
    """Offsets, sizes and the version of docs/formats/prefix-cache.md are those of the code."""
    text = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (\d+) \|", text, re.MULTILINE)
    places = [(int(offset), int(size)) for offset, size in rows]
    sizes = [8, 4, 4, 16, 8, 8, 4, 4, 32, 32, 16, 32, 4, 4, 4, 4, 64]
    assert [size for _, size in places] == sizes
    assert [offset for offset, _ in places] == [sum(sizes[:i]) for i in range(len(sizes))]
    assert struct.calcsize(form._FIXED.format) == sum(sizes)
    assert f"version {form.VERSION}" in text
    assert form.MAGIC.decode() in text
