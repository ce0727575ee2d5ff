"""docs/doctor.md lists every check with its reason, and nothing else."""

import re
from pathlib import Path

from brim.doctor.registry import CHECKS

PAGE = Path(__file__).parents[3] / "docs" / "doctor.md"


def test_the_page_lists_the_checks_with_their_reasons() -> None:
    """One row for each, in the registry's order, in its words."""
    rows = re.findall(r"^\| `([a-z-]+)` \| ([a-z]+) \| (.+) \|$", PAGE.read_text("utf-8"), re.M)
    assert rows == [(check.name, check.group, check.why) for check in CHECKS]
