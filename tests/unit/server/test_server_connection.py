"""Clients that leave, are slow, or send too much."""

import asyncio
import sys
import threading
from typing import Any

import msgspec
import pytest
from support.scripted import (
    Client,
    ScriptedAnswer,
    ScriptedRuntime,
    chat_body,
    running,
    settle,
)

from brim.core.request import Request
from brim.server.app import build_app
from brim.server.connection import read_body
from brim.server.limits import LARGE_BODY_BYTES
from brim.server.routes import completions
from brim.server.wire.decode import decode

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"


def body(**fields: Any) -> list[bytes]:
    return [msgspec.json.encode(chat_body(**fields))]


async def never(answer: ScriptedAnswer, position: int) -> None:
    """Two tokens, then nothing more."""
    if position == 2:
        await asyncio.Event().wait()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_cancels_its_answer(
    client: Client, runtime: ScriptedRuntime, stream: bool
) -> None:
    """Closing the connection ends the work behind it, streamed or not, and the exchange returns."""
    runtime.gate = never
    exchange = client.exchange("POST", CHAT, body(stream=stream))
    async with running(exchange) as task:
        await settle()
        assert runtime.answers[0].num_batches_read == 2
        exchange.leave()
        await task
    assert runtime.answers[0].is_cancelled
    assert not runtime.answers[0].is_finished


@pytest.mark.parametrize("num_padding_bytes", [0, LARGE_BODY_BYTES])
async def test_a_body_is_let_go_before_its_answer_begins(
    client: Client, runtime: ScriptedRuntime, num_padding_bytes: int
) -> None:
    """While an answer is made, or waits for its turn, its request's bytes are held by nobody."""
    runtime.gate = never
    (text,) = body()
    data = [bytes(num_padding_bytes).replace(b"\0", b" ") + text]
    num_before = sys.getrefcount(data[0])
    exchange = client.exchange("POST", CHAT, data)
    async with running(exchange) as task:
        while not runtime.answers:  # large ones come from another thread  # noqa: ASYNC110
            await asyncio.sleep(0)
        await settle()
        assert runtime.answers[0].num_batches_read == 2
        num_during = sys.getrefcount(data[0])
        exchange.leave()
        await task
    assert num_during == num_before


async def test_a_client_that_leaves_while_it_waits_for_admission_is_forgotten(
    client: Client, runtime: ScriptedRuntime
) -> None:
    """Leaving the queue cancels `submit` itself; no answer is ever made."""
    given_up = asyncio.Event()

    async def queue(request: Request) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            given_up.set()

    runtime.before_submit = queue
    exchange = client.exchange("POST", CHAT, body())
    async with running(exchange) as task:
        await settle()
        exchange.leave()
        await task
    assert given_up.is_set()
    assert runtime.answers == []


async def test_leaving_cancels_every_prompt_of_a_request(
    client: Client, runtime: ScriptedRuntime
) -> None:
    """All prompts of one completion request end with its client."""
    runtime.gate = never
    data = b'{"model":"small","prompt":["a","b","c"],"stream":true}'
    exchange = client.exchange("POST", "/v1/completions", [data])
    async with running(exchange) as task:
        await settle()
        exchange.leave()
        await task
        await settle()
    assert [answer.is_cancelled for answer in runtime.answers] == [True] * 3


async def test_leaving_before_the_body_is_complete_asks_for_nothing(
    client: Client, runtime: ScriptedRuntime
) -> None:
    """Half a request is no request: nothing is submitted and nothing is sent."""
    exchange = client.exchange("POST", CHAT, [])
    exchange.leave()
    reply = await exchange.run()
    assert reply.status == 0
    assert runtime.answers == []


async def test_a_slow_client_slows_the_reading_and_nothing_piles_up(
    client: Client, runtime: ScriptedRuntime
) -> None:
    """While one send waits, no further batch is read: the runtime merges, the server holds none."""
    runtime.pieces = [b"x"] * 100
    may_continue = asyncio.Event()

    async def on_send(data: bytes) -> None:
        await may_continue.wait()

    exchange = client.exchange("POST", CHAT, body(stream=True))
    exchange.on_send = on_send
    async with running(exchange) as task:
        await settle()
        assert runtime.answers[0].num_batches_read == 1
        may_continue.set()
        reply = await task
    texts = [event["choices"][0]["delta"].get("content", "") for event in reply.events()[:-1]]
    assert "".join(texts) == "x" * 100


async def test_a_slow_client_that_leaves_is_let_go(
    client: Client, runtime: ScriptedRuntime
) -> None:
    """A client that stopped reading and then vanished does not hold its answer."""

    async def on_send(data: bytes) -> None:
        await asyncio.Event().wait()

    exchange = client.exchange("POST", CHAT, body(stream=True))
    exchange.on_send = on_send
    async with running(exchange) as task:
        await settle()
        exchange.leave()
        await task
    assert runtime.answers[0].is_cancelled


async def test_a_server_out_of_patience_tells_who_has_nothing_yet(
    client: Client, runtime: ScriptedRuntime
) -> None:
    """When a stopping server cancels an exchange, a waiting client gets 503 and Retry-After."""
    runtime.gate = never
    exchange = client.exchange("POST", CHAT, body())
    async with running(exchange) as task:
        await settle()
        task.cancel()
        reply = await task
    assert reply.status == 503
    assert reply.headers["retry-after"] == "1"
    assert runtime.answers[0].is_cancelled


async def test_a_body_in_parts_is_put_together(client: Client) -> None:
    """A request that arrives in many pieces is read whole."""
    (data,) = body()
    parts = [data[i : i + 7] for i in range(0, len(data), 7)]
    assert (await client.exchange("POST", CHAT, parts).run()).status == 200


@pytest.mark.parametrize("announced", [False, True])
async def test_a_body_over_the_limit_is_413(runtime: ScriptedRuntime, announced: bool) -> None:
    """Bytes are counted as they come, and an honest Content-Length is refused at once."""
    client = Client(build_app(runtime, max_body_bytes=1000))
    headers = {"content-length": "1001"} if announced else {}
    parts = [] if announced else [b" " * 500] * 3
    reply = await client.exchange("POST", CHAT, parts, headers).run()
    assert reply.status == 413
    assert reply.json()["error"]["code"] == "body_too_large"
    assert "1000" in reply.json()["error"]["message"]


async def test_a_body_of_exactly_the_limit_is_taken(runtime: ScriptedRuntime) -> None:
    """The limit itself is allowed."""
    (data,) = body()
    client = Client(build_app(runtime, max_body_bytes=len(data)))
    assert (await client.exchange("POST", CHAT, [data]).run()).status == 200


async def test_a_body_that_stalls_is_given_up(
    runtime: ScriptedRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that announced a body and does not send it gets 408 and loses the connection."""
    monkeypatch.setattr(read_body, "__defaults__", (0.001,))
    reply = await Client(build_app(runtime)).exchange("POST", CHAT, []).run()
    assert reply.status == 408
    assert reply.json()["error"]["code"] == "request_timeout"
    assert reply.headers["connection"] == "close"


async def test_a_large_body_does_not_hold_the_loop(
    client: Client, runtime: ScriptedRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While megabytes are being decoded, another request is answered from beginning to end."""
    may_go_on = threading.Event()

    def decode_when_allowed(data: bytes, schema: Any) -> Any:
        if len(data) >= LARGE_BODY_BYTES and not may_go_on.wait(20):
            raise TimeoutError("the loop was held: nobody could answer another request")
        return decode(data, schema)

    monkeypatch.setattr(completions, "decode", decode_when_allowed)
    messages = [{"role": "user", "content": "x" * 120}] * 9_000
    async with running(client.exchange("POST", CHAT, body(messages=messages))) as large:
        assert (await client.exchange("POST", CHAT, body()).run()).status == 200
        assert not large.done()
        may_go_on.set()
        assert (await large).status == 200
    assert len(runtime.answers[1].request.messages or ()) == 9_000


async def test_large_bodies_are_decoded_one_after_the_other(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many come at once, on whichever route, one is being made into objects."""
    num_decoding, most = 0, 0
    may_go_on = threading.Event()

    def counted(data: bytes, schema: Any) -> Any:
        nonlocal num_decoding, most
        if len(data) >= LARGE_BODY_BYTES:
            num_decoding += 1
            most = max(most, num_decoding)
            assert may_go_on.wait(20)
            num_decoding -= 1
        return decode(data, schema)

    monkeypatch.setattr(completions, "decode", counted)
    messages = [{"role": "user", "content": "x" * 120}] * 9_000
    plain = [b'{"model":"small","prompt":"Hi"}'.ljust(LARGE_BODY_BYTES)]
    async with (
        running(client.exchange("POST", CHAT, body(messages=messages))) as first,
        running(client.exchange("POST", CHAT, body(messages=messages))) as second,
        running(client.exchange("POST", "/v1/completions", plain)) as third,
    ):
        for _ in range(3):  # others are served meanwhile, long enough for all three to have come
            assert (await client.exchange("POST", CHAT, body()).run()).status == 200
        may_go_on.set()
        for large in (first, second, third):
            assert (await large).status == 200
    assert most == 1


@pytest.mark.parametrize("opening", [b"[", b" [ [1],["])
async def test_token_ids_by_the_million_are_refused_undecoded(
    client: Client, monkeypatch: pytest.MonkeyPatch, opening: bytes
) -> None:
    """A list that no window takes is an overflow before its ids become objects."""
    monkeypatch.setattr("brim.server.routes.completions.decode", None)
    closing = b"]]" if b"1" in opening else b"]"
    data = b'{"prompt":' + opening + b"7," * 600_000 + b"7" + closing + b',"model":"small"}'
    reply = await client.exchange("POST", "/v1/completions", [data]).run()
    assert reply.status == 400
    assert reply.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(("num_items", "status"), [(262_139, 200), (262_200, 400)])
async def test_template_variables_are_at_most_a_megabyte(
    client: Client, num_items: int, status: int
) -> None:
    """Numbers that take twice their room in a frame cannot outgrow it."""
    data = b'{"a":[' + b"1.5," * num_items + b"1.5]}"
    head = b'{"model":"small","messages":[{"role":"user","content":"Hi"}],"chat_template_kwargs":'
    reply = await client.exchange("POST", CHAT, [head + data + b"}"]).run()
    assert reply.status == status
    if status == 400:
        assert reply.json()["error"]["param"] == "chat_template_kwargs"


@pytest.mark.parametrize("data", [b"[" * 2**20, b'{"model":1}' + b" " * 2**20, b"x" * 2**20])
async def test_a_large_body_that_is_wrong_is_told_as_a_small_one(
    client: Client, data: bytes
) -> None:
    """The first look leaves everything but lengths to decoding."""
    reply = await client.exchange("POST", CHAT, [data]).run()
    assert (reply.status, reply.json()["error"]["code"]) == (400, "invalid_request")
