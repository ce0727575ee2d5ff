import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.models import PYSTD_1M

from brim.errors import ModelFileError, NotFound, Unsupported
from brim.registry.safetensors_file import load_values, read_checkpoint
from brim.registry.safetensors_header import read_safetensors


def entry(dtype: str = "F32", shape: Any = (4,), offsets: Any = (0, 16)) -> dict[str, Any]:
    """One tensor of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file with this header, as a dict or as the bytes themselves."""

    def write(header: dict[str, Any] | bytes, data_bytes: int = 16) -> Path:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path = tmp_path / "model.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data_bytes))
        return path

    return write


class TestReading:
    def test_values(self, tmp_path: Path) -> None:
        """Tensors that the safetensors package wrote come back as they were."""
        written: dict[str, np.ndarray[Any, Any]] = {
            "half": np.arange(6, dtype=np.float16).reshape(2, 3),
            "full": np.linspace(-1, 1, 8, dtype=np.float32),
        }
        save_file(written, tmp_path / "model.safetensors", {"format": "np"})
        found = read_safetensors(tmp_path / "model.safetensors")
        assert set(found) == set(written)
        for name, values in written.items():
            np.testing.assert_array_equal(load_values(found[name]), values, strict=True)

    def test_bfloat16(self, write: Callable[..., Path]) -> None:
        """A bfloat16 becomes the float32 of which it is the upper half."""
        path = write({"t": entry("BF16", (2,), (0, 4))}, 0)
        with path.open("ab") as file:
            file.write(struct.pack("<ff", 1.5, -3.0)[2:4] + struct.pack("<f", -3.0)[2:])
        np.testing.assert_array_equal(
            load_values(read_safetensors(path)["t"]), np.array([1.5, -3.0], np.float32), strict=True
        )

    def test_sharded(self, tmp_path: Path) -> None:
        """A checkpoint in parts is read through its index."""
        for number in (1, 2):
            save_file({f"t{number}": np.zeros(4, np.float32)}, tmp_path / f"p{number}.safetensors")
        index = {"weight_map": {"t1": "p1.safetensors", "t2": "p2.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        assert set(read_checkpoint(tmp_path)) == {"t1", "t2"}
        (tmp_path / "p2.safetensors").unlink()
        with pytest.raises(ModelFileError, match=r"p2\.safetensors cannot be read"):
            read_checkpoint(tmp_path)

    def test_an_index_stays_in_its_directory(self, tmp_path: Path) -> None:
        """An index that points elsewhere is refused."""
        index = {"weight_map": {"t": "../secret.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ModelFileError, match="not a file beside it"):
            read_checkpoint(tmp_path)

    def test_no_checkpoint(self, tmp_path: Path) -> None:
        """A directory without weights is NotFound."""
        with pytest.raises(NotFound, match=r"has no model\.safetensors"):
            read_checkpoint(tmp_path)


class TestDamage:
    @pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.5, 0.99])
    def test_cut_short(self, tmp_path: Path, share: float) -> None:
        """A file cut anywhere is refused by name."""
        data = (PYSTD_1M / "model.safetensors").read_bytes()
        path = tmp_path / "cut.safetensors"
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(ModelFileError, match=r"cut\.safetensors is damaged"):
            read_safetensors(path)

    @pytest.mark.parametrize("length", [2**20, 2**63, 2**64 - 1])
    def test_header_length(self, tmp_path: Path, length: int) -> None:
        """A header said to be longer than the file is not read."""
        path = tmp_path / "x.safetensors"
        path.write_bytes(struct.pack("<Q", length) + b"{}" * 20)
        with pytest.raises(ModelFileError, match="does not fit"):
            read_safetensors(path)

    @pytest.mark.parametrize(
        ("header", "says"),
        [
            (b"[]", "not a JSON object"),
            (b"{", "not JSON"),
            (b"\xff", "not JSON"),
            (b"[" * 100_000, "not JSON"),
            (b'{"a":1,"a":2}', "stands in it twice"),
            ({"t": 5}, "tensor t"),
            ({"t": {"dtype": "F32"}}, "tensor t"),
            ({"t": entry(shape=(3,))}, r"shape \(3,\) in 16 bytes"),
            ({"t": entry(shape=(-4,), offsets=(16, 0))}, "has shape"),
            ({"t": entry(offsets=(-16, 0))}, "has shape"),
            ({"t": entry(offsets=(8, 24))}, "does not begin where"),
            ({"t": entry(), "u": entry()}, "does not begin where"),
            ({"t": entry(shape=(2**62,), offsets=(0, 2**64))}, "is damaged"),
            ({"t": entry(shape=(2,), offsets=(0, 8))}, "the file at byte"),
            ({"t": entry("F7")}, "unknown dtype F7"),
            ({"t": entry(shape=(1,) * 9)}, "tensor t"),
        ],
    )
    def test_header(self, write: Callable[..., Path], header: Any, says: str) -> None:
        """A header that contradicts the format or the file is refused with what is wrong."""
        with pytest.raises(ModelFileError, match=says):
            read_safetensors(write(header))

    def test_values_that_need_scales(self, write: Callable[..., Path]) -> None:
        """Weights in a dtype whose values need scales have a header, and no values: Unsupported."""
        path = write({"t": entry("F8_E4M3", (16,))})
        assert read_safetensors(path)["t"].size_bytes == 16
        with pytest.raises(Unsupported, match="F8_E4M3"):
            read_checkpoint(path.parent)
