"""A model's files are read into memory piece by piece, with the share that is done."""

import mmap
from pathlib import Path

import pytest

from brim.engine.llamacpp import page_in


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two files of five and a half pieces in all."""
    monkeypatch.setattr(page_in, "PIECE_BYTES", mmap.PAGESIZE)
    sizes = (4 * mmap.PAGESIZE, 3 * mmap.PAGESIZE // 2)
    paths = [tmp_path / f"{number}.gguf" for number in range(len(sizes))]
    for path, size in zip(paths, sizes, strict=True):
        path.write_bytes(b"x" * size)
    return [str(path) for path in paths]


@pytest.mark.parametrize("can_populate", [True, False])
def test_every_piece_is_told(
    files: list[str], can_populate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By bytes over all files, with the system's call or by reading."""
    if not can_populate:
        monkeypatch.setattr(page_in, "MADV_POPULATE_READ", 12345)
    told: list[float] = []
    page_in.read_in(files, told.append)
    assert told == pytest.approx([2 / 11, 4 / 11, 6 / 11, 8 / 11, 10 / 11, 1.0])


@pytest.mark.parametrize("contents", [None, b""])
def test_a_file_that_cannot_be_read_is_left_to_the_backend(
    tmp_path: Path, contents: bytes | None
) -> None:
    """It has the sentence for it."""
    path = tmp_path / "model.gguf"
    if contents is not None:
        path.write_bytes(contents)
    page_in.read_in([str(path)], lambda fraction: pytest.fail("nothing was read"))
