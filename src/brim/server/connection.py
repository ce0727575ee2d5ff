"""One HTTP exchange at the ASGI level: reading a bounded body, and noticing who left."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from starlette.types import Receive, Scope

from brim.errors import BodyTooLarge, RequestTimeout
from brim.server.limits import BODY_WITHIN_S

ABORT = "brim.abort"
"""Where `server.protocol` leaves the connection's end in the scope."""


def abort(scope: Scope) -> None:
    """Close the connection at once, with what it has not taken; one that hangs takes nothing."""
    end = scope.get(ABORT)
    if end is not None:
        end()


class ClientLeft(Exception):
    """The client closed the connection before its request was complete."""


async def read_body(
    scope: Scope, receive: Receive, max_bytes: int, within_s: float = BODY_WITHIN_S
) -> bytes:
    """The whole request body.

    Raises:
        BodyTooLarge: It is longer than `max_bytes`, as announced or as it came.
        RequestTimeout: It had not all arrived after `within_s`.
        ClientLeft: The connection ended first.
    """
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and int(value) > max_bytes:
            raise _too_large(int(value), max_bytes)
    try:
        async with asyncio.timeout(within_s):
            return await _all_parts(receive, max_bytes)
    except TimeoutError:
        raise RequestTimeout(
            f"the request body was not complete after {within_s:g} s; send all of it, or less"
        ) from None


async def _all_parts(receive: Receive, max_bytes: int) -> bytes:
    parts: list[bytes] = []
    num_bytes = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        part = message.get("body", b"")
        num_bytes += len(part)
        if num_bytes > max_bytes:
            raise _too_large(num_bytes, max_bytes)
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


def _too_large(num_bytes: int, max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(
        f"the request body has {num_bytes} bytes or more, and {max_bytes} are taken; send less text"
    )


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run `work`, but cancel it when the client leaves; its errors are raised here.

    The body must have been read: from then on ASGI's `receive` tells of nothing but the end.
    """
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
    finally:
        # Also when this task is cancelled itself, as at the end of a server's patience.
        watch.cancel()
        if not task.done():
            task.cancel()
        await asyncio.wait((task, watch))
    if not task.cancelled():
        task.result()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
