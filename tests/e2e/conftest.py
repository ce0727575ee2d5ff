"""Real processes: nothing here is simulated but the machine's size."""

from collections.abc import Iterator

import pytest
from blockbuster import BlockBuster, blockbuster_ctx


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def no_blocking() -> Iterator[BlockBuster]:
    """Fails a test whose event loop waits for a file, a socket, a lock or a process."""
    with blockbuster_ctx() as detector:
        yield detector
