"""`POST /v1/chat/completions` and `POST /v1/completions`: two shapes around one exchange."""

import asyncio
import contextlib
import copy
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import msgspec
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from brim.core.plan import Plan
from brim.errors import BrimError, Busy, RequestTimeout
from brim.runtime.api import Answer, ModelStatus, Runtime
from brim.server.caller import Caller, known_caller
from brim.server.connection import ClientLeft, read_body, while_connected
from brim.server.failure import error_response
from brim.server.limits import LARGE_BODY_BYTES
from brim.server.merged import submit_all
from brim.server.routes.usage import UsageSource
from brim.server.stream import (
    EventStream,
    WaitingComments,
    bridged,
    failures_as_events,
    merged,
    replaced,
    stream_answer,
)
from brim.server.wire import convert, openai, whole
from brim.server.wire.chunks import AnyWriter, ChatChunks, CompletionChunks
from brim.server.wire.decode import decode
from brim.server.wire.outline import refuse_oversized
from brim.server.wire.tally import Tally, cache_headers, num_trimmed_tokens

Body = TypeVar("Body", bound=msgspec.Struct)


@dataclass(frozen=True)
class Shape(Generic[Body]):
    """What tells the two routes apart."""

    schema: type[Body]
    call: Callable[[Body, Sequence[ModelStatus], Caller], convert.Call]
    writer: type[AnyWriter]
    whole: whole.Whole


CHAT = Shape(openai.ChatCompletionRequest, convert.chat_call, ChatChunks, whole.chat_completion)
PLAIN = Shape(openai.CompletionRequest, convert.completion_call, CompletionChunks, whole.completion)


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What both routes keep to."""

    max_body_bytes: int
    """Longer request bodies are refused."""
    heartbeat_s: float
    """Seconds between comments while a stream has nothing to say yet."""
    large_bodies: asyncio.Semaphore
    """Held while a large body is decoded."""


class CompletionsEndpoint(Generic[Body]):
    """An ASGI app that answers one of the routes.

    Args:
        runtime: Admits and generates.
        shape: CHAT or PLAIN.
        bounds: What it keeps to.
        usage: Where it is looked up what an app's budget leaves.
    """

    def __init__(
        self,
        runtime: Runtime,
        shape: Shape[Body],
        bounds: Bounds,
        usage: UsageSource | None = None,
    ) -> None:
        self._runtime = runtime
        self._shape = shape
        self._bounds = bounds
        self._usage = usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        try:
            call = await self._asked(scope, receive)
        except ClientLeft:
            return
        except RequestTimeout as exc:
            response = error_response(exc)
            response.headers["connection"] = "close"  # the rest of the body must not be waited for
            await response(scope, receive, send)
            return
        is_started = False

        async def tracked(message: Message) -> None:
            nonlocal is_started
            is_started = True
            await send(message)

        try:
            await while_connected(receive, self._answer(call, scope, receive, tracked))
        except asyncio.CancelledError:
            # The server's patience with running responses ended.  A stream is cut, which clients
            # notice; who has nothing yet is told.
            if not is_started:
                await error_response(_stopping())(scope, receive, send)

    async def _asked(self, scope: Scope, receive: Receive) -> convert.Call:
        """What is wanted; the body itself is gone when it is known, and not when it is answered."""
        data = await read_body(scope, receive, self._bounds.max_body_bytes)
        return await self._understood(data, known_caller(scope))

    async def _understood(self, data: bytes, caller: Caller) -> convert.Call:
        models = caller.visible(self._runtime.models())
        if len(data) < LARGE_BODY_BYTES:
            return self._shape.call(decode(data, self._shape.schema), models, caller)

        def understand() -> convert.Call:
            refuse_oversized(data, models)
            return self._shape.call(decode(data, self._shape.schema), models, caller)

        async with self._bounds.large_bodies:
            return await asyncio.to_thread(understand)

    async def _answer(self, call: convert.Call, scope: Scope, receive: Receive, send: Send) -> None:
        answer: Answer | None = None

        async def submit() -> Answer:
            nonlocal answer
            answer = await submit_all(self._runtime, call.requests)
            return answer

        try:
            caller = known_caller(scope)
            if call.stream:
                await self._stream(call, submit, send, caller)
            else:
                with self._discreet(caller):
                    response = await self._collect(call, await submit())
                await response(scope, receive, send)
        finally:
            if answer is not None:
                answer.cancel()

    @contextlib.contextmanager
    def _discreet(self, caller: Caller) -> Iterator[None]:
        """Errors tell an app of no model that was not granted to it.

        What stands in the way of a model is often another one, and the runtime names it.
        """
        try:
            yield
        except BrimError as error:
            message = caller.without_hidden(error.message, self._runtime.models())
            if message == error.message:
                raise
            told = copy.copy(error)  # others may wait for the same load, and are told the same
            told.message = message
            raise told from error

    async def _stream(
        self,
        call: convert.Call,
        submit: Callable[[], Coroutine[Any, Any, Answer]],
        send: Send,
        caller: Caller,
    ) -> None:
        plan = convert.find_model(call.model, self._runtime.models()).plan
        out = EventStream(send, known_headers(call, plan))
        async with failures_as_events(out):
            with self._discreet(caller):
                waiting = WaitingComments(
                    call.model, self._runtime.load_progress, self._bounds.heartbeat_s
                )
                answer = await bridged(submit(), out, waiting.look_s, waiting.next)
                out.add_headers(self._admission_headers(call, answer))
                writer = self._shape.writer(call, answer.plan)
                await stream_answer(call, answer, writer, out, self._bounds.heartbeat_s)

    def _admission_headers(self, call: convert.Call, answer: Answer) -> list[tuple[bytes, bytes]]:
        headers, app = admission_headers(answer), call.requests[0].app
        left = self._usage.left(app).left_tokens if app and self._usage is not None else None
        if left is not None:
            headers.append((b"x-brim-budget-tokens-left", str(left).encode()))
        return headers

    async def _collect(self, call: convert.Call, answer: Answer) -> Response:
        """The whole answer as one response; a failure anywhere in it is raised."""
        tally = Tally(call, answer)
        collected = whole.Collected(call.num_choices)
        async for batch in answer:
            for delta in merged(batch):
                collected.add(delta)
                if delta.finish_reason is not None:
                    tally.end(delta)
        tally.check_complete()
        body = self._shape.whole(call, answer.plan, collected, tally)
        response = Response(msgspec.json.encode(body), media_type="application/json")
        known = replaced(known_headers(call, answer.plan), self._admission_headers(call, answer))
        response.raw_headers += known
        response.raw_headers += _encoded(cache_headers(tally.cache()))
        return response


def _stopping() -> Busy:
    return Busy("the server is stopping; ask again", retry_after_s=1)


def known_headers(call: convert.Call, plan: Plan) -> list[tuple[bytes, bytes]]:
    """`x-brim-*`: what is known before the request is admitted."""
    values = [
        ("x-request-id", call.request_id),
        ("x-brim-request-id", call.request_id),
        ("x-brim-model", call.model),
        ("x-brim-engine", plan.engine),
        ("x-brim-quant", plan.model.quant),
        ("x-brim-context-tokens", str(plan.context_tokens)),
    ]
    return _encoded(values)


def admission_headers(answer: Answer) -> list[tuple[bytes, bytes]]:
    """`x-brim-*`: what admission decides."""
    values: list[tuple[str, object]] = [
        ("x-brim-max-tokens", answer.max_tokens),
        ("x-brim-queue-place", answer.queue_place),
        ("x-brim-trimmed-tokens", num_trimmed_tokens(answer)),
    ]
    if answer.instead_of is not None:
        model = answer.plan.model
        values += [
            ("x-brim-model", model.name),
            ("x-brim-quant", model.quant),
            ("x-brim-instead-of", answer.instead_of),
        ]
    return _encoded([(name, str(value)) for name, value in values])


def _encoded(headers: Iterable[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    # Model names come from files and may hold anything; header values are printable ASCII.
    return [(name.encode(), quote(value, safe="/:@+ ").encode()) for name, value in headers]
