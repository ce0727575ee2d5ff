"""docs/apps.md has every key of a manifest, and its examples can be added."""

import re
from pathlib import Path

import pytest

from brim.apps.document import all_keys, key_tables, with_keys
from brim.apps.manifest import parse_manifest

PAGE = Path(__file__).parents[3] / "docs" / "apps.md"

EXAMPLES = re.findall(r"```toml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_page_is_up_to_date() -> None:
    """Its tables are those that the structs make (python -m brim.apps.document)."""
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_keys(page)
    assert key_tables() in page


def test_tables_have_every_key() -> None:
    """Each with a row, its values and what it means."""
    rows = [line for line in key_tables().splitlines() if line.startswith("| `")]
    assert len(rows) == len(all_keys())
    assert {"name", "budgets.tokens_per_day", "limits.memory_share"} <= set(all_keys())
    for row in rows:
        assert all(len(cell.strip()) > 1 for cell in row.split("|")[1:-1]), row


@pytest.mark.parametrize("text", EXAMPLES)
def test_examples_of_the_page_are_in_order(text: str) -> None:
    """What is shown can be added."""
    assert parse_manifest(text, where="docs/apps.md").name


def test_there_are_examples() -> None:
    """A short one and a long one."""
    assert len(EXAMPLES) >= 2
