"""A directory, a clock and a toy engine for each test of the prefix cache."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.prefixes import Clock, Filler, open_store

from brim.prefix_cache.store import PrefixCache

OpenStore = Callable[..., PrefixCache]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def toy() -> Filler:
    return Filler()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Where the cache is; made by the first store."""
    return tmp_path / "prefixes"


@pytest.fixture
def open_cache(directory: Path, clock: Clock) -> Iterator[OpenStore]:
    """Opens stores on the same directory; all are closed in the end."""
    opened: list[PrefixCache] = []

    def open_one(**changes: Any) -> PrefixCache:
        opened.append(open_store(directory, clock=clock, **changes))
        return opened[-1]

    yield open_one
    for cache in opened:
        cache.close()


@pytest.fixture
def cache(open_cache: OpenStore) -> PrefixCache:
    return open_cache()
