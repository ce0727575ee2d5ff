import ctypes
import importlib.util
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGUFReader

from brim.errors import BrimError, ModelFileError, NotFound
from brim.registry import gguf_header
from brim.registry.ggml_types import GGML_TYPES
from brim.registry.gguf_header import GgufArray, parse_gguf_header, read_gguf_header
from brim.registry.sources import DEMO_PATH

Build = Callable[..., bytes]
F32 = 0


def header_error(tmp_path: Path, data: bytes) -> str:
    """What a file of these bytes is refused with."""
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelFileError) as caught:
        read_gguf_header(path)
    assert str(path) in caught.value.message
    return caught.value.message


class TestReading:
    def test_agrees_with_the_reference_reader(self) -> None:
        """Tensors have the names, shapes, types, places and sizes that the gguf package finds."""
        header = read_gguf_header(DEMO_PATH)
        reference = GGUFReader(DEMO_PATH)
        ours = [(t.name, t.shape, t.type_name, t.offset, t.size_bytes) for t in header.tensors]
        theirs = [
            (t.name, tuple(map(int, t.shape)), t.tensor_type.name, t.data_offset, t.n_bytes)
            for t in reference.tensors
        ]
        assert ours == theirs
        assert header.header_bytes == reference.data_offset
        assert set(header.metadata) == {k for k in reference.fields if not k.startswith("GGUF.")}

    def test_keeps_strings_of_an_array_only_on_demand(self) -> None:
        """A vocabulary has its length and no items, unless its key is asked for."""
        key = "tokenizer.ggml.tokens"
        assert read_gguf_header(DEMO_PATH).metadata[key] == GgufArray(4096, None)
        kept = read_gguf_header(DEMO_PATH, keep=frozenset({key})).metadata[key]
        assert isinstance(kept, GgufArray)
        assert kept.items is not None
        assert kept.items[:3] == ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

    def test_reads_every_scalar_type(self, tmp_path: Path, gguf_bytes: Build) -> None:
        """Each fixed-size type of the format comes back as the value that was written."""
        cases = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
        pairs = {f"k{n}": struct.pack(f"<I{letter}", n, 7) for n, letter in cases.items()}
        path = tmp_path / "scalars.gguf"
        path.write_bytes(gguf_bytes(pairs | {"flag": True, "word": "seven"}))
        expected = dict.fromkeys(pairs, 7) | {"flag": True, "word": "seven"}
        assert read_gguf_header(path).metadata == expected

    def test_accepts_version_2(self, tmp_path: Path, gguf_bytes: Build) -> None:
        """The previous version, which differs in nothing that is read, is accepted."""
        path = tmp_path / "old.gguf"
        path.write_bytes(gguf_bytes({"a": 1}, version=2))
        assert read_gguf_header(path).version == 2

    def test_knows_the_types_of_the_library_that_loads_them(self) -> None:
        """Block and byte sizes are those of the installed ggml for every type that it has."""
        spec = importlib.util.find_spec("llama_cpp")
        assert spec is not None
        assert spec.origin is not None
        library = next(Path(spec.origin).parent.glob("lib/libggml-base.*"))
        ggml = ctypes.CDLL(str(library))
        ggml.ggml_blck_size.restype = ctypes.c_int64
        ggml.ggml_type_size.restype = ctypes.c_size_t
        sizes = {n: (ggml.ggml_blck_size(n), ggml.ggml_type_size(n)) for n in range(43)}
        theirs = {n: size for n, size in sizes.items() if size != (0, 0)}
        assert {n: (t.block_size, t.block_bytes) for n, t in GGML_TYPES.items()} == theirs


class TestWrongFiles:
    def test_missing(self, tmp_path: Path) -> None:
        """A path with nothing there is NotFound."""
        with pytest.raises(NotFound, match=r"there is no file .*none\.gguf"):
            read_gguf_header(tmp_path / "none.gguf")

    @pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
    def test_neither_directory_nor_pipe(
        self, tmp_path: Path, make: Callable[[Path], object]
    ) -> None:
        """A directory is refused, and a pipe is refused instead of being waited on."""
        make(tmp_path / "model.gguf")
        with pytest.raises(ModelFileError, match=r"name a \.gguf file"):
            read_gguf_header(tmp_path / "model.gguf")

    def test_impossible_path(self) -> None:
        """A path that no file can have is refused, not a crash."""
        with pytest.raises(BrimError):
            read_gguf_header("model\0.gguf")

    @pytest.mark.parametrize(
        ("data", "says"),
        [
            (b"", "is empty"),
            (b"just some text\n", "begins with b'just'"),
            (b"GG", "begins with b'GG'"),
            (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
            (b"\n<!DOCTYPE html><html>", "web page"),
            (struct.pack("<Q", 40) + b'{"a":{}}', "safetensors"),
            (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
            (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
            (b"GGUF" + struct.pack("<IQQ", 4, 0, 0), "version 4"),
            (b"GGUF" + struct.pack("<IQ", 3, 0), "cut short"),
        ],
    )
    def test_other_files(self, tmp_path: Path, data: bytes, says: str) -> None:
        """What is no GGUF file is told apart and named."""
        assert says in header_error(tmp_path, data)

    @pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
    def test_cut_short(self, tmp_path: Path, share: float) -> None:
        """A download that stopped at 1, 50 or 99 percent is caught, with the bytes where known."""
        data = DEMO_PATH.read_bytes()
        kept = int(len(data) * share)
        message = header_error(tmp_path, data[:kept])
        assert "cut short" in message
        assert str(kept) in message

    def test_one_byte_short(self, tmp_path: Path) -> None:
        """The last byte of the last tensor is missed."""
        header = read_gguf_header(DEMO_PATH)
        end = header.tensors[-1].offset + header.tensors[-1].size_bytes
        data = DEMO_PATH.read_bytes()[: end - 1]
        assert f"end at byte {end}, the file at byte {end - 1}" in header_error(tmp_path, data)


class TestDamagedHeaders:
    @pytest.mark.parametrize("count", [2**16 + 1, 2**32, 2**63, 2**64 - 1])
    @pytest.mark.parametrize("field", ["num_pairs", "num_tensors"])
    def test_counts(self, tmp_path: Path, gguf_bytes: Build, field: str, count: int) -> None:
        """A count that the file's size cannot hold is refused."""
        data = gguf_bytes({"a": 1}, **{field: count}, data_bytes=4096)
        assert f"announces {count}" in header_error(tmp_path, data)

    @pytest.mark.parametrize("length", [2**10, 2**40, 2**63, 2**64 - 1])
    @pytest.mark.parametrize("kind", [0, 5, 8, 12])
    def test_array_lengths_cost_no_memory(
        self, tmp_path: Path, gguf_bytes: Build, kind: int, length: int
    ) -> None:
        """An array longer than the file is refused without allocating for it."""
        data = gguf_bytes({"a": struct.pack("<IIQ", 9, kind, length)})
        tracemalloc.start()
        try:
            header_error(tmp_path, data)
            assert tracemalloc.get_traced_memory()[1] < 1_000_000
        finally:
            tracemalloc.stop()

    @pytest.mark.parametrize("length", [2**20, 2**63, 2**64 - 1])
    def test_string_lengths(self, tmp_path: Path, gguf_bytes: Build, length: int) -> None:
        """A string that reaches past the end is refused, alone and inside an array."""
        alone = gguf_bytes({"a": struct.pack("<IQ", 8, length)})
        inside = gguf_bytes({"a": struct.pack("<IIQQ", 9, 8, 1, length)})
        assert "cut short" in header_error(tmp_path, alone)
        assert "cut short" in header_error(tmp_path, inside)

    def test_a_file_of_zeros_is_not_walked_for_ever(
        self, tmp_path: Path, gguf_bytes: Build
    ) -> None:
        """More strings than any model has are refused even where the file could hold them."""
        path = tmp_path / "sparse.gguf"
        path.write_bytes(gguf_bytes({"a": struct.pack("<IIQ", 9, 8, 2**30)}))
        os.truncate(path, 2**34)
        with pytest.raises(ModelFileError, match="announces 1073741824 strings"):
            read_gguf_header(path)

    @pytest.mark.parametrize(
        ("pairs", "says"),
        [
            ([("a", 1), ("a", 2)], "'a' stands in its header twice"),
            ([("a", struct.pack("<I", 13))], "unknown type"),
            ([("a", struct.pack("<IIQ", 9, 9, 0))], "unknown type"),
            ([("general.alignment", 24)], "alignment is 24"),
            ([("general.alignment", 0)], "alignment is 0"),
            ([("general.alignment", "x")], "alignment is 'x'"),
        ],
    )
    def test_metadata(
        self, tmp_path: Path, gguf_bytes: Build, pairs: list[tuple[str, object]], says: str
    ) -> None:
        """Metadata that contradicts the format is refused with what is wrong."""
        assert says in header_error(tmp_path, gguf_bytes(pairs))

    def test_names_that_are_not_text(self, tmp_path: Path, gguf_bytes: Build) -> None:
        """A key with bytes that are no UTF-8 is refused."""
        data = gguf_bytes({"key": 1}).replace(b"key", b"k\xff\xfe")
        assert "not UTF-8" in header_error(tmp_path, data)

    def test_text_that_is_not_utf_8_is_no_reason_to_refuse(
        self, tmp_path: Path, gguf_bytes: Build
    ) -> None:
        """A stray byte in a description is shown as a replacement character."""
        path = tmp_path / "latin1.gguf"
        path.write_bytes(gguf_bytes({"about": "na?ve"}).replace(b"na?ve", b"na\xefve"))
        assert read_gguf_header(path).metadata == {"about": "na\ufffdve"}

    @pytest.mark.parametrize(
        ("tensor", "says"),
        [
            (("t", (32,), 4, 0), "type 4"),
            (("t", (32,), 99, 0), "type 99"),
            (("t", (0, 4), F32, 0), "shape [0, 4]"),
            (("t", (31,), 8, 0), "shape [31] in Q8_0"),
            (("t", (), F32, 0), "0 dimensions"),
            (("t", (1, 1, 1, 1, 1), F32, 0), "5 dimensions"),
            (("t", (2**40,), F32, 0), "cut short"),
            (("t", (2**63, 2**63, 2**63, 2**63), F32, 0), "cut short"),
            (("t", (32,), F32, 32), "said to lie at 32, not at 0"),
        ],
    )
    def test_tensors(
        self,
        tmp_path: Path,
        gguf_bytes: Build,
        tensor: tuple[str, tuple[int, ...], int, int],
        says: str,
    ) -> None:
        """A tensor of an unknown type, an impossible shape or a wrong place is refused."""
        data = gguf_bytes({"a": 1}, [tensor], data_bytes=4096)
        assert says in header_error(tmp_path, data)

    def test_a_tensor_twice(self, tmp_path: Path, gguf_bytes: Build) -> None:
        """Two tensors of one name are refused."""
        tensors = [("t", (32,), F32, 0), ("t", (32,), F32, 128)]
        data = gguf_bytes({}, tensors, data_bytes=256)
        assert "'t' stands in its header twice" in header_error(tmp_path, data)


TOKENS = "tokenizer.ggml.tokens"


class TestLongArrays:
    @pytest.mark.parametrize(
        ("tokens", "jumps"),
        [
            ([f"token {n}" for n in range(2000)], True),
            (["", *(f"token {n}" for n in range(2000))], False),
            (["x" * 300, *(f"token {n}" for n in range(2000))], False),
        ],
        ids=["short", "an empty one", "a long one"],
    )
    def test_stepping_over(
        self,
        tmp_path: Path,
        gguf_bytes: Build,
        monkeypatch: pytest.MonkeyPatch,
        tokens: list[str],
        jumps: bool,
    ) -> None:
        """A vocabulary is stepped over at once where that is proved right, else walked through."""
        path = tmp_path / "model.gguf"
        pairs = {TOKENS: tokens, "tokenizer.ggml.eos_token_id": 7, "general.name": "x"}
        path.write_bytes(gguf_bytes(pairs))
        walked: list[int] = []
        walk = gguf_header._Reader.walk

        def note(reader: gguf_header._Reader, length: int) -> None:
            walked.append(length)
            walk(reader, length)

        monkeypatch.setattr(gguf_header._Reader, "walk", note)
        metadata = read_gguf_header(path).metadata
        assert metadata[TOKENS] == GgufArray(len(tokens), None)
        assert (metadata["tokenizer.ggml.eos_token_id"], metadata["general.name"]) == (7, "x")
        assert walked == ([] if jumps else [len(tokens)])

    def test_only_the_beginning(self, gguf_bytes: Build) -> None:
        """From a file's first bytes the header is read once all of it is there."""
        data = gguf_bytes({TOKENS: [f"token {n}" for n in range(2000)], "general.name": "x"})
        whole = len(data) + 10**9
        assert parse_gguf_header("x", data[:-40], whole) is None
        assert parse_gguf_header("x", data[:100], whole) is None
        header = parse_gguf_header("x", data, whole)
        assert header is not None
        assert header.file_bytes == whole


def test_a_name_without_end(tmp_path: Path, gguf_bytes: Build) -> None:
    """A key of kilobytes is refused, and does not fill the message."""
    message = header_error(tmp_path, gguf_bytes({"k" * 5000: 1}))
    assert "a metadata key has 5000 bytes" in message
    assert len(message) < 300
