"""Tables that line up."""

import pytest

from brim.cli.output import print_table
from brim.core.units import gib


def test_columns_are_as_wide_as_their_widest_cell(capsys: pytest.CaptureFixture[str]) -> None:
    """Cells line up left or right, and no line ends in blanks."""
    print_table(("a", "long"), [("xyz", "1"), ("y", "22")], right=frozenset({1}))
    assert capsys.readouterr().out == "a    long\nxyz     1\ny      22\n"


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 MiB"), (6 * 2**20, "6 MiB"), (2**30, "1.00 GiB")]
)
def test_bytes_for_a_reader(num_bytes: int, text: str) -> None:
    """Small sizes are in MiB, larger ones in GiB."""
    assert gib(num_bytes) == text
