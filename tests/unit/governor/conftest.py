import pytest
from support.looks import Looks


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def looks() -> Looks:
    return Looks()
