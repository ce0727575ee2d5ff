"""`GET /brim/v1/events` for apps and `GET /brim/events` for the operator, as server-sent events.

Nothing is kept for a reader: one that does not take what was sent within a minute, or falls so far
behind that events would be left out, is cut off and may ask again.
"""

import asyncio
import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from brim.core.event import Event
from brim.core.stance import Stance
from brim.errors import BrimError, Busy, InvalidRequest, RateLimited
from brim.runtime.api import Runtime
from brim.server.auth import Audience, Doorkeeper
from brim.server.caller import Caller, known_caller
from brim.server.connection import abort, while_connected
from brim.server.stream import STREAM_HEADERS, EventStream
from brim.server.wire.app_events import concerning, of_stance
from brim.server.wire.chunks import event as encoded
from brim.telemetry.event_log import Listener

LOOK_S = 1.0
"""Between two looks whether the server drains and the key still holds: a stream must not keep a
stopping server waiting, nor outlive its app."""

STALL_S = 60.0
"""For a reader to take what was sent; no network pauses longer, and a page that sleeps may ask
again."""

MAX_STREAMS_EACH = 8
"""Of one app, or of all that have no key: each holds a connection for good, and one tells all."""

_HEARTBEAT = b": nothing new\n\n"

Batch = Callable[[Caller, Sequence[Event]], bytes]
"""What a caller is sent of new events; empty for nothing."""


class EventRoutes:
    """Streams events for as long as the client listens.

    Args:
        runtime: Whose events and stance are told.
        doorkeeper: Asked again and again whether the client may still listen.
        heartbeat_s: Seconds between comments while nothing happens.
    """

    def __init__(self, runtime: Runtime, doorkeeper: Doorkeeper, *, heartbeat_s: float) -> None:
        self._runtime = runtime
        self._doorkeeper = doorkeeper
        self._heartbeat_s = heartbeat_s
        self._num_open: Counter[str] = Counter()

    async def for_app(self, request: Request) -> ASGIApp:
        """How short memory and power are, then what changes, and what happens to its models."""
        told: Stance | None = None

        def batch(caller: Caller, events: Sequence[Event]) -> bytes:
            nonlocal told
            stance = self._runtime.stance()
            news = of_stance(stance, told, time.time())
            told = stance
            news += [each for each in (concerning(event, caller) for event in events) if each]
            return b"".join(encoded(msgspec.json.encode(each)) for each in news)

        return self._answer(request, batch, Audience.CLIENTS, tells_history=False)

    async def for_operator(self, request: Request) -> ASGIApp:
        """Every event: those that are kept, oldest first, then those to come.

        `since` (Unix seconds) leaves older ones out; `follow=false` answers with a list of those
        that are kept.

        Raises:
            InvalidRequest: One of the two is not what it should be.
        """
        since_unix_s = _since(request)
        if not _follows(request):
            kept = [e for e in self._runtime.event_log.events() if e.at_unix_s > since_unix_s]
            return Response(msgspec.json.encode(kept), media_type="application/json")

        def batch(_: Caller, events: Sequence[Event]) -> bytes:
            wanted = [event for event in events if event.at_unix_s > since_unix_s]
            return b"".join(encoded(msgspec.json.encode(event)) for event in wanted)

        return self._answer(request, batch, Audience.OPERATOR, tells_history=True)

    def _answer(
        self, request: Request, batch: Batch, audience: Audience, *, tells_history: bool
    ) -> ASGIApp:
        """The response: an open stream, or its headers alone where only they were asked for."""
        if request.method == "HEAD":
            headers = {name.decode(): value.decode() for name, value in STREAM_HEADERS}
            return Response(headers=headers)

        async def stream(scope: Scope, receive: Receive, send: Send) -> None:
            if self._runtime.is_draining():
                raise Busy("the server is stopping; ask again", retry_after_s=LOOK_S)
            out = EventStream(send, ())
            log = self._runtime.event_log
            with self._counted(known_caller(scope)), log.listening() as listener:
                history = log.events() if tells_history else []

                async def tell() -> None:
                    await self._tell(scope, out, listener, batch, audience, history)

                await while_connected(receive, tell())

        return stream

    async def _tell(
        self,
        scope: Scope,
        out: EventStream,
        listener: Listener,
        batch: Batch,
        audience: Audience,
        history: Sequence[Event],
    ) -> None:
        events, silent_s = history, self._heartbeat_s  # the first write says that it is open
        while (caller := self._still_welcome(scope, audience)) is not None:
            data = batch(caller, events)
            if not data and silent_s >= self._heartbeat_s:
                data = _HEARTBEAT
            if data:
                silent_s = 0.0
                if not await self._written(out, data):
                    abort(scope)
                    break
            began_s = time.monotonic()
            found = await _next(listener)
            if found is None:
                break  # it was too slow for what happened
            events = found
            silent_s += time.monotonic() - began_s
        await out.end()

    async def _written(self, out: EventStream, data: bytes) -> bool:
        """Whether the reader took it in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STALL_S):
                await out.write(data)
                return True
        return False

    def _still_welcome(self, scope: Scope, audience: Audience) -> Caller | None:
        """Who listens, by what is known of apps now; None where the stream is over."""
        if self._runtime.is_draining():
            return None
        try:
            return self._doorkeeper.admit(scope, audience)
        except BrimError:
            return None

    @contextlib.contextmanager
    def _counted(self, caller: Caller) -> Iterator[None]:
        # No app is spelt so: a stranger must not take the operator's places.
        owner = "/operator" if caller.is_operator else caller.app_name
        if self._num_open[owner] >= MAX_STREAMS_EACH:
            raise RateLimited(
                f"{MAX_STREAMS_EACH} event streams are open already; close one, each tells all",
                retry_after_s=LOOK_S,
            )
        self._num_open[owner] += 1
        try:
            yield
        finally:
            self._num_open[owner] -= 1


async def _next(listener: Listener) -> Sequence[Event] | None:
    """The next event; none after a while; None where events were lost."""
    try:
        async with asyncio.timeout(LOOK_S):
            event = await listener.next()
    except TimeoutError:
        return ()
    return None if event is None else (event,)


def _since(request: Request) -> float:
    text = request.query_params.get("since", "0")
    with contextlib.suppress(ValueError):
        since_unix_s = float(text)
        if math.isfinite(since_unix_s):  # nothing is later than "nan"
            return since_unix_s
    raise InvalidRequest(
        f"`since` is '{text[:40]}'; send seconds since 1970, such as 1763800000", param="since"
    )


def _follows(request: Request) -> bool:
    text = request.query_params.get("follow", "true")
    if text not in ("true", "false"):
        raise InvalidRequest(f"`follow` is '{text[:40]}'; send true or false", param="follow")
    return text == "true"
