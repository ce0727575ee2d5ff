"""When an answer fails: proper statuses before the first byte, events after it."""

import asyncio
import contextlib
import json
import logging

import pytest
from support.scripted import Client, Reply, ScriptedAnswer, ScriptedRuntime, running, settle

from brim.core.answer import FinishReason
from brim.errors import (
    BrimError,
    Busy,
    ContextOverflow,
    DoesNotFit,
    EngineError,
    InvalidRequest,
    WorkerDied,
    all_error_classes,
)
from brim.server.app import build_app
from brim.server.failure import code_of

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "code", "retry_after"),
    [
        (ContextOverflow("too long", param="messages"), 400, "context_length_exceeded", None),
        (InvalidRequest("no template"), 400, "invalid_request", None),
        (Busy("queue full", retry_after_s=2.2), 503, "busy", "3"),
        (Busy("queue full", retry_after_s=0.01), 503, "busy", "1"),
        (DoesNotFit("never"), 507, "does_not_fit", None),
        (EngineError("quarantined"), 500, "engine_error", None),
        (WorkerDied("gone", retry_after_s=1), 503, "worker_died", "1"),
    ],
)
async def test_refused_admission_is_a_proper_status(
    client: Client,
    runtime: ScriptedRuntime,
    stream: bool,
    error: BrimError,
    status: int,
    code: str,
    retry_after: str | None,
) -> None:
    """What `submit` raises has its class's status, OpenAI's shape, and Retry-After where known."""
    runtime.refusal = error
    reply = await client.chat(stream=stream)
    assert reply.status == status
    assert reply.json() == {
        "error": {
            "message": error.message,
            "type": error.openai_type,
            "param": error.param,
            "code": code,
        }
    }
    assert reply.headers.get("retry-after") == retry_after


@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_before_the_first_token_is_a_proper_status(
    client: Client, runtime: ScriptedRuntime, stream: bool
) -> None:
    """A worker that dies while it reads the prompt gives 503, even to a streaming client."""
    runtime.pieces = []
    runtime.failure = WorkerDied("the worker died", retry_after_s=2)
    reply = await client.chat(stream=stream)
    assert reply.status == 503
    assert reply.json()["error"]["message"] == "the worker died"
    assert reply.headers["retry-after"] == "2"


async def test_a_failure_while_streaming_is_an_event_without_done(
    client: Client, runtime: ScriptedRuntime
) -> None:
    """The text so far stays, an error event follows, and the stream ends without `[DONE]`."""
    runtime.failure = WorkerDied("the worker died")
    reply = await client.chat(stream=True)
    assert reply.status == 200
    *chunks, last = reply.events()
    texts = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(texts) == "Hello wörld!\n"
    assert last["error"]["code"] == "worker_died"
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)


async def test_a_failure_is_a_status_when_nothing_was_streamed(
    client: Client, runtime: ScriptedRuntime
) -> None:
    """A whole answer that fails half-way is an error, not half an answer."""
    runtime.failure = EngineError("llama.cpp failed")
    reply = await client.chat()
    assert reply.status == 500
    assert reply.json()["error"]["type"] == "server_error"


async def test_text_and_failure_in_one_batch_are_both_sent(
    client: Client, runtime: ScriptedRuntime
) -> None:
    """Text that came together with the error is not lost."""
    runtime.failure = WorkerDied("the worker died")
    runtime.batch_size = 10
    events = (await client.chat(stream=True)).events()
    assert events[1]["choices"][0]["delta"]["content"] == "Hello wörld!\n"
    assert events[-1]["error"]["code"] == "worker_died"


async def test_an_answer_that_breaks_off_is_an_error(
    client: Client, runtime: ScriptedRuntime
) -> None:
    """If the runtime ended an answer without an ending, the client is told, streamed or not."""
    runtime.breaks_off = True
    reply = await client.chat()
    assert reply.status == 500
    assert "broke off" in reply.json()["error"]["message"]
    assert "broke off" in (await client.chat(stream=True)).events()[-1]["error"]["message"]


async def test_an_answer_cancelled_by_the_runtime_says_so(
    client: Client, runtime: ScriptedRuntime
) -> None:
    """FinishReason.CANCELLED that no client caused is a stopping server: 503, try again."""
    runtime.finish_reason = FinishReason.CANCELLED
    reply = await client.chat()
    assert reply.status == 503
    assert "stopping" in reply.json()["error"]["message"]
    assert (await client.chat(stream=True)).events()[-1]["error"]["code"] == "busy"


async def test_a_bug_is_a_500_in_openais_shape_and_goes_to_the_log(
    client: Client, runtime: ScriptedRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    """An exception that is not ours becomes 500, and the log has its place without its text."""
    runtime.refusal = ZeroDivisionError("secret")
    exchange = client.exchange(
        "POST",
        "/v1/chat/completions",
        [b'{"model":"small","messages":[{"role":"user","content":""}]}'],
    )
    with caplog.at_level(logging.ERROR):
        await exchange.run()
    assert exchange.status == 500
    assert "ZeroDivisionError" in caplog.text
    assert "in submit" in caplog.text
    assert "secret" not in caplog.text
    assert b"secret" not in b"".join(exchange.parts)
    assert b'"type":"server_error"' in b"".join(exchange.parts)


async def test_a_bug_while_streaming_is_an_event_and_a_log_entry(
    client: Client, runtime: ScriptedRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    """The stream ends with a general error; its place is in the log, its text nowhere."""
    text = "secret"

    async def gate(answer: ScriptedAnswer, position: int) -> None:
        if position == 2:
            raise ZeroDivisionError(text)

    runtime.gate = gate
    with caplog.at_level(logging.ERROR):
        events = (await client.chat(stream=True)).events()
    assert events[-1]["error"]["message"].startswith("brim failed")
    assert "in gate" in caplog.text
    assert "secret" not in caplog.text


async def test_one_of_several_prompts_may_be_refused(
    client: Client, runtime: ScriptedRuntime
) -> None:
    """If one prompt is refused the request fails, and no other prompt keeps running."""

    async def refuse_b(request: object) -> None:
        if getattr(request, "prompt", None) == "b":
            raise ContextOverflow("prompt is too long")

    runtime.before_submit = refuse_b
    reply = await client.complete(prompt=["a", "b", "c"])
    await settle()
    assert reply.status == 400
    assert reply.json()["error"]["code"] == "context_length_exceeded"
    assert all(answer.is_finished or answer.is_cancelled for answer in runtime.answers)


async def test_a_refusal_of_a_later_prompt_ends_a_stream_with_an_event(
    client: Client, runtime: ScriptedRuntime
) -> None:
    """A prompt that is refused after another's text was sent is an error event."""
    text_was_sent = asyncio.Event()

    async def refuse_b(request: object) -> None:
        if getattr(request, "prompt", None) == "b":
            await text_was_sent.wait()
            raise Busy("no room", retry_after_s=1)

    async def on_send(data: bytes) -> None:
        text_was_sent.set()

    runtime.before_submit = refuse_b
    exchange = client.exchange(
        "POST",
        "/v1/completions",
        [b'{"model":"small","prompt":["a","b"],"stream":true}'],
    )
    exchange.on_send = on_send
    reply = await exchange.run()
    assert reply.status == 200
    assert reply.events()[-1]["error"]["code"] == "busy"


async def test_prompts_that_wait_for_each_other_all_end(
    client: Client, runtime: ScriptedRuntime
) -> None:
    """A prompt that is admitted only after another has ended does not hang the request."""
    first_done = asyncio.Event()

    async def one_at_a_time(request: object) -> None:
        if getattr(request, "prompt", None) == "b":
            await first_done.wait()

    async def gate(answer: ScriptedAnswer, position: int) -> None:
        if answer.request.prompt == "a" and position == len(runtime.pieces):
            first_done.set()

    runtime.before_submit = one_at_a_time
    runtime.gate = gate
    answer = (await client.complete(prompt=["a", "b"])).json()
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop", "stop"]


async def bridged(runtime: ScriptedRuntime) -> Reply:
    """A stream whose first token comes only after a comment was sent."""
    may_go = asyncio.Event()

    async def gate(answer: ScriptedAnswer, position: int) -> None:
        await may_go.wait()

    async def on_send(data: bytes) -> None:
        if data.startswith(b":"):
            may_go.set()

    runtime.gate = gate
    client = Client(build_app(runtime, heartbeat_s=0.001))
    body = b'{"model":"small","prompt":"a","stream":true}'
    exchange = client.exchange("POST", "/v1/completions", [body])
    exchange.on_send = on_send
    return await exchange.run()


async def test_a_long_prefill_is_bridged_with_comments(runtime: ScriptedRuntime) -> None:
    """While nothing has been generated, a stream sends comment lines that clients skip."""
    reply = await bridged(runtime)
    assert reply.body.startswith(b": ")
    texts = [event["choices"][0]["text"] for event in reply.events()[:-1]]
    assert "".join(texts) == "Hello wörld!\n"


async def test_comments_of_a_queued_stream_say_where_it_came(runtime: ScriptedRuntime) -> None:
    """Someone who watches the stream sees that it waits for others."""
    runtime.queue_place = 7
    reply = await bridged(runtime)
    assert reply.body.startswith(b": nothing yet; it came as number 7 of the queue\n\n")


async def test_an_error_after_a_comment_is_an_event(runtime: ScriptedRuntime) -> None:
    """Once a comment is out the status is 200, so the error that follows is an event."""
    runtime.pieces = []
    runtime.failure = EngineError("broken")
    reply = await bridged(runtime)
    assert reply.status == 200
    assert [event["error"]["code"] for event in reply.events()] == ["engine_error"]


async def waiting(runtime: ScriptedRuntime) -> Reply:
    """A stream whose request is decided only after a comment was sent."""
    may_go = asyncio.Event()

    async def queue(request: object) -> None:
        await may_go.wait()

    async def on_send(data: bytes) -> None:
        may_go.set()

    runtime.before_submit = queue
    client = Client(build_app(runtime, heartbeat_s=0.001))
    body = json.dumps({"model": runtime.name, "prompt": "a", "stream": True}).encode()
    exchange = client.exchange("POST", "/v1/completions", [body])
    exchange.on_send = on_send
    return await exchange.run()


async def test_waiting_for_memory_is_bridged_with_comments(runtime: ScriptedRuntime) -> None:
    """A queued stream gets its headers and comments while it waits, then its answer."""
    reply = await waiting(runtime)
    assert reply.body.startswith(b": ")
    assert reply.headers["x-brim-context-tokens"] == "8192"
    assert reply.events()[-1] == "[DONE]"


@pytest.mark.parametrize(
    ("progress", "comment"),
    [
        (0.0, b": waiting to load model small%0A\n\n"),
        (0.431, b": loading model small%0A, 43 %\n\n"),
    ],
)
async def test_waiting_for_a_load_says_how_far_it_is(
    runtime: ScriptedRuntime, progress: float, comment: bytes
) -> None:
    """Comments tell the percent, in one line whatever the model is called."""
    runtime.name, runtime.progress = "small\n", progress
    reply = await waiting(runtime)
    assert reply.body.startswith(comment)


async def test_a_refusal_after_a_comment_is_an_event(runtime: ScriptedRuntime) -> None:
    """A request that waited and was then refused is told so in the stream, without `[DONE]`."""
    runtime.refusal = Busy("no room", retry_after_s=1)
    reply = await waiting(runtime)
    assert reply.status == 200
    assert [event["error"]["code"] for event in reply.events()] == ["busy"]


async def test_a_client_that_leaves_a_queued_stream_releases_it(
    runtime: ScriptedRuntime,
) -> None:
    """An answer that is admitted in the moment its client leaves is cancelled all the same."""
    is_waiting = asyncio.Event()

    async def stubborn(request: object) -> None:
        is_waiting.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()

    runtime.before_submit = stubborn
    client = Client(build_app(runtime))
    body = b'{"model":"small","prompt":"a","stream":true}'
    exchange = client.exchange("POST", "/v1/completions", [body])
    async with running(exchange) as task:
        await is_waiting.wait()
        exchange.leave()
        await task
    assert [answer.is_cancelled for answer in runtime.answers] == [True]


def test_every_error_class_has_a_code_of_its_own() -> None:
    """Programs can tell any two classes of the hierarchy apart by `code`."""
    codes = {name: code_of(cls("x")) for name, cls in all_error_classes().items()}
    assert len(set(codes.values())) == len(codes)
    assert codes["Unsupported"] == "unsupported"
