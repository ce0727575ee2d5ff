"""A scripted runtime behind the app, and a watch on calls that block the event loop."""

from collections.abc import Iterator

import pytest
from blockbuster import BlockBuster, blockbuster_ctx
from support.scripted import Client, ScriptedRuntime

from brim.server.app import build_app


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def no_blocking_calls() -> Iterator[BlockBuster]:
    """A call that blocks the event loop is the likeliest bug of a server: it fails the test."""
    with blockbuster_ctx("brim.server") as blocker:
        yield blocker


@pytest.fixture
def runtime() -> ScriptedRuntime:
    return ScriptedRuntime()


@pytest.fixture
def client(runtime: ScriptedRuntime) -> Client:
    return Client(build_app(runtime))
