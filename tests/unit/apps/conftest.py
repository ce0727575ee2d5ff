"""A meter for each test."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.app_desk import Desk


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path / "usage.sqlite")
    yield desk
    desk.meter.close()
