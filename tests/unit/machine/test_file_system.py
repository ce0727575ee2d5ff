"""Which directories keep their files in memory."""

from pathlib import Path

import pytest

from brim.machine.file_system import is_in_memory

MOUNTS = """\
/dev/vda / ext4 rw,relatime 0 0
tmpfs /tmp tmpfs rw 0 0
/dev/vdb /tmp/disk ext4 rw 0 0
tmpfs /with\\040blank tmpfs rw 0 0
/dev/vdc /mnt ext4 rw 0 0
tmpfs /mnt tmpfs rw 0 0
tmpfs /größe\\040ä tmpfs rw 0 0
broken
"""


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/", False),
        ("/var/tmp", False),
        ("/tmp", True),
        ("/tmp/below/it", True),
        ("/tmp/disk/file", False),
        ("/tmpfoo", False),
        ("/with blank/x", True),
        ("/mnt", True),
        ("/größe ä/x", True),
    ],
)
def test_the_nearest_mount_decides(tmp_path: Path, path: str, expected: bool) -> None:
    """The longest mount point above a path, and of two on one point the later."""
    table = tmp_path / "mounts"
    table.write_text(MOUNTS, encoding="utf-8")
    assert is_in_memory(Path(path), table) is expected


def test_a_system_without_such_a_table_has_disks(tmp_path: Path) -> None:
    """MacOS."""
    assert not is_in_memory(tmp_path, tmp_path / "nothing")
