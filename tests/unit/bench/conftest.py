"""A server on a real socket that answers with the bytes that a test gives it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest

from brim.bench.client import Endpoint

Script = Callable[[str, bytes], list[bytes]]
"""(path, body) -> pieces of the raw response, written one by one; an empty one closes."""

Scripted = Callable[[Script], AbstractAsyncContextManager[Endpoint]]


@pytest.fixture
def connections() -> list[int]:
    """Port of each connection that the scripted server got."""
    return []


@pytest.fixture
def scripted(connections: list[int]) -> Scripted:
    """Starts such a server and gives its endpoint."""

    @asynccontextmanager
    async def start(script: Script) -> AsyncIterator[Endpoint]:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connections.append(writer.get_extra_info("peername")[1])
            try:
                while True:
                    head = (await reader.readuntil(b"\r\n\r\n")).decode()
                    length = int(head.lower().split("content-length:")[1].split("\r\n")[0])
                    body = await reader.readexactly(length)
                    for piece in script(head.split()[1], body):
                        if not piece:
                            return
                        writer.write(piece)
                        await writer.drain()
                        await asyncio.sleep(0)
            except (asyncio.IncompleteReadError, ConnectionError):
                return
            finally:
                writer.close()

        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        try:
            yield Endpoint.parse(f"scripted=http://127.0.0.1:{port}")
        finally:
            server.close()
            await server.wait_closed()

    return start
