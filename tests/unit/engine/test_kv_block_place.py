"""Where blocks lie on their way: on a disk, where there is one."""

import tempfile
from pathlib import Path

import pytest

from brim.engine import kv_block


@pytest.mark.parametrize(
    ("in_memory", "expected"),
    [((), "usual"), (("usual",), "disk"), (("usual", "disk"), "usual"), (("disk",), "usual")],
)
def test_temporary_files_do_not_lie_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory: tuple[str, ...], expected: str
) -> None:
    """The usual place unless it is a tmpfs and another is not."""
    usual, disk = tmp_path / "usual", tmp_path / "disk"
    usual.mkdir()
    disk.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(usual))
    monkeypatch.setattr(kv_block, "_ON_DISK", disk)
    monkeypatch.setattr(kv_block, "is_in_memory", lambda path: path.name in in_memory)
    assert kv_block._directory().name == expected


def test_a_system_without_another_place_takes_the_usual_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rather than none."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(kv_block, "_ON_DISK", tmp_path / "nothing")
    monkeypatch.setattr(kv_block, "is_in_memory", lambda path: True)
    assert kv_block._directory() == tmp_path


def test_a_place_that_cannot_be_written_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service may find /var/tmp read-only: memory is better than no place at all."""
    usual, disk = tmp_path / "usual", tmp_path / "disk"
    usual.mkdir()
    disk.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(usual))
    monkeypatch.setattr(kv_block, "_ON_DISK", disk)
    monkeypatch.setattr(kv_block, "is_in_memory", lambda path: path == usual)
    assert kv_block._directory() == disk
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    assert kv_block._directory() == usual
