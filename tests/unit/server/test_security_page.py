"""docs/security.md promises nothing that no test holds."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_every_test_that_the_page_names_exists() -> None:
    """A promise whose test is renamed or deleted is noticed."""
    page = (ROOT / "docs" / "security.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", page))
    source = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(named) > 30
    assert named - set(re.findall(r"def (test_\w+)\(", source)) == set()
    for path in re.findall(r"`((?:tests|benches)/[\w/.]+)`", page):
        assert (ROOT / path).exists(), path


def test_every_row_of_promises_names_what_holds_it() -> None:
    """No row of a table of promises has an empty last cell."""
    page = (ROOT / "docs" / "security.md").read_text().partition("## Promises")[2]
    rows = [line for line in page.splitlines() if line.startswith("| ") and "promise" not in line]
    assert len(rows) > 15
    assert [row for row in rows if "`test" not in row.rpartition(" | ")[2]] == []
