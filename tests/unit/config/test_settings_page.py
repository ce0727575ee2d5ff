"""docs/settings.md is made from the tree."""

from pathlib import Path

from brim.config.document import settings_page
from brim.config.load import all_fields

PAGE = Path(__file__).parents[3] / "docs" / "settings.md"


def test_page_is_up_to_date() -> None:
    """The page in the repository is the one the tree makes (python -m brim.config.document)."""
    assert PAGE.read_text(encoding="utf-8") == settings_page()


def test_page_has_every_setting() -> None:
    """Every key of the tree has a row with its meaning."""
    rows = [line for line in settings_page().splitlines() if line.startswith("| `")]
    assert len(rows) == len(all_fields())
    assert all(len(row.split("|")[5].strip()) > 10 for row in rows)
