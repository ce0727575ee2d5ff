"""A streamed answer: batches of deltas become server-sent events.

Nothing is sent until the first batch is there, so that whatever goes wrong before it has a proper
status; a long wait for memory or a long prefill is bridged with comments.  After the first byte an
error is an event, and the stream ends without `[DONE]`.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from typing import Any, TypeVar
from urllib.parse import quote

from starlette.types import Send

from brim.core.answer import Delta
from brim.errors import BrimError
from brim.runtime.api import Answer
from brim.server.failure import error_json, internal
from brim.server.wire.chunks import DONE, AnyWriter, event
from brim.server.wire.convert import Call
from brim.server.wire.tally import Tally
from brim.worker.deltas import DeltaBuffer

T = TypeVar("T")
Headers = Iterable[tuple[bytes, bytes]]

HEARTBEAT_S = 15.0
"""Half of the shortest idle limit that proxies and clients commonly have, 30 s."""

LOADING_S = 5.0
"""Between two words on a load.  Not sooner: with the first go the headers, and an error that comes
later is no status any more, on which clients try again by themselves."""

_HEARTBEAT = b": nothing yet\n\n"
"""A comment line: event-stream clients skip it."""

STREAM_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would gather events into blocks
)


class EventStream:
    """The response; headers go out with the first bytes."""

    def __init__(self, send: Send, headers: Headers) -> None:
        self._send = send
        self._headers = [*STREAM_HEADERS, *headers]
        self.is_started = False

    def add_headers(self, headers: Headers) -> None:
        """More headers, in place of those of their name; left out where they have gone already."""
        self._headers = replaced(self._headers, headers)

    async def write(self, data: bytes) -> None:
        """Send bytes; it returns when the transport takes more, so a slow client slows us."""
        if not self.is_started:
            self.is_started = True
            await self._send(
                {"type": "http.response.start", "status": 200, "headers": self._headers}
            )
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self) -> None:
        """Close the response."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


def replaced(headers: Headers, by: Headers) -> list[tuple[bytes, bytes]]:
    """Headers, with others in place of those of their name."""
    return [*{**dict(headers), **dict(by)}.items()]


@contextlib.asynccontextmanager
async def failures_as_events(out: EventStream) -> AsyncIterator[None]:
    """Close the stream at the end; a failure after its first byte is sent as an event.

    Raises:
        BrimError: It failed before the first byte; nothing was sent.
    """
    try:
        yield
    except Exception as exc:
        if not out.is_started:
            raise
        error = exc if isinstance(exc, BrimError) else internal(exc)
        await out.write(event(error_json(error)))
    await out.end()


async def bridged(
    work: Coroutine[Any, Any, T],
    out: EventStream,
    look_s: float,
    comment: Callable[[], bytes] = lambda: _HEARTBEAT,
) -> T:
    """The result of `work`, with a comment on the stream for every `look_s` it takes.

    Args:
        work: Whose result is waited for.
        out: The stream.
        look_s: Between two comments.
        comment: Makes one; empty where there is nothing to say.
    """
    task = asyncio.create_task(work)
    try:
        while not (await asyncio.wait((task,), timeout=look_s))[0]:
            if text := comment():
                await out.write(text)
    finally:
        if not task.done():
            # Waited for: until it has ended it may still be given what must be released.
            task.cancel()
            await asyncio.wait((task,))
    return task.result()


class WaitingComments:
    """What a stream says until its request is admitted.

    Args:
        model: That it is for.
        progress: How far the load of a model is; None where it is not being loaded.
        heartbeat_s: Between two comments while there is nothing to tell.
    """

    def __init__(
        self, model: str, progress: Callable[[str], float | None], heartbeat_s: float
    ) -> None:
        self._model = model
        self._progress = progress
        self._heartbeat_s = heartbeat_s
        self._silent_since_s = time.monotonic()
        self.look_s = min(LOADING_S, heartbeat_s)

    def next(self) -> bytes:
        """The comment for this moment, empty for none; to be asked each `look_s`."""
        progress, now_s = self._progress(self._model), time.monotonic()
        if progress is None and now_s - self._silent_since_s < self._heartbeat_s:
            return b""
        self._silent_since_s = now_s
        return loading_comment(self._model, progress)


def loading_comment(model: str, progress: float | None) -> bytes:
    r"""What a stream says while its model is loaded.

    Example:
        >>> loading_comment("chat", 0.431), loading_comment("chat", None)
        (b': loading model chat, 43 %\n\n', b': nothing yet\n\n')
    """
    if progress is None:
        return _HEARTBEAT
    if not progress:
        return b": waiting to load model %s\n\n" % _in_one_line(model)
    return b": loading model %s, %d %%\n\n" % (_in_one_line(model), 100 * progress)


def _in_one_line(name: str) -> bytes:
    # A line break in a name would end the comment, and what follows could pass for an event.
    return quote(name, safe="/:@+ ").encode()


async def stream_answer(
    call: Call, answer: Answer, writer: AnyWriter, out: EventStream, heartbeat_s: float
) -> None:
    """Send the whole answer.

    Raises:
        BrimError: It failed, before the first byte or after it.
    """
    tally = Tally(call, answer)
    batches = aiter(answer)

    async def first() -> list[Delta] | None:
        return await anext(batches, None)

    batch = await bridged(first(), out, heartbeat_s, lambda: _waiting_comment(answer))
    opening = writer.opening()
    while batch is not None:
        data, failure = encode_batch(writer, tally, merged(batch))
        if data:
            await out.write(opening + data)
            opening = b""
        if failure is not None:
            raise failure
        batch = await anext(batches, None)
    tally.check_complete()
    await out.write(writer.closing(tally) + DONE)


def _waiting_comment(answer: Answer) -> bytes:
    if not answer.queue_place:
        return _HEARTBEAT
    return b": nothing yet; it came as number %d of the queue\n\n" % answer.queue_place


def merged(batch: list[Delta]) -> list[Delta]:
    """At most one delta a choice: what came together is sent together."""
    if len(batch) == 1:
        return batch
    buffer = DeltaBuffer()
    buffer.add((0, delta) for delta in batch)
    return [delta for _, delta in buffer.take()]


def encode_batch(
    writer: AnyWriter, tally: Tally, batch: list[Delta]
) -> tuple[bytes, BrimError | None]:
    """Events of a batch, and the error that ends the stream after them."""
    events: list[bytes] = []
    for delta in batch:
        if delta.logprobs:
            events.append(writer.text_with_logprobs(delta.index, delta.text, delta.logprobs))
        elif delta.text:
            events.append(writer.text(delta.index, delta.text))
        if delta.finish_reason is not None:
            try:
                reason = tally.end(delta)
            except BrimError as exc:
                return b"".join(events), exc
            events.append(writer.ending(delta.index, reason, tally))
    return b"".join(events), None
