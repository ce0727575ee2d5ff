"""Reading answers and reaching servers."""

import asyncio
import json
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import pytest

from brim.bench.answers import Answered, read_answer, text_times
from brim.bench.client import Endpoint, Reply
from brim.bench.serve import reach
from brim.errors import BrimError, Busy, ConfigError, InvalidRequest

Scripted = Callable[..., AbstractAsyncContextManager[Endpoint]]


def event(text: str, **fields: object) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None} | fields
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


END = event("", finish_reason="length")
USAGE = (
    b'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 4}}\n\n'
    b"data: [DONE]\n\n"
)


def reply(*parts: tuple[float, bytes], status: int = 200, failure: str | None = None) -> Reply:
    return Reply(start_s=1.0, end_s=9.0, status=status, parts=list(parts), failure=failure)


def test_times_run_from_the_request_and_tokens_come_from_usage() -> None:
    """Two chunks that carry four tokens give the time per token over three intervals."""
    found = read_answer("a", reply((2.0, event("x")), (5.0, event("y")), (5.5, END + USAGE)))
    assert found == Answered(
        request_id="a",
        duration_s=8.0,
        ttft_s=1.0,
        time_per_token_s=1.0,
        longest_gap_s=3.0,
        num_prompt_tokens=7,
        num_completion_tokens=4,
        text="xy",
        finish_reason="length",
    )


def test_an_event_without_text_is_not_the_first_token() -> None:
    """The role event that servers send at once does not count as text."""
    role = event("", delta={"role": "assistant"})
    found = read_answer("a", reply((1.5, role), (4.0, event("x")), (4.5, END + USAGE)))
    assert found.ttft_s == 3.0


def test_the_text_of_plain_completions_is_read_too() -> None:
    """`choices[].text` counts as `choices[].delta.content` does."""
    plain = b'data: {"choices": [{"text": "t"}]}\n\n'
    assert read_answer("a", reply((2.0, plain), (3.0, END + USAGE))).text == "t"


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        (reply((2.0, b"no such model"), status=404), "status 404: no such model"),
        (reply((2.0, event("x")), failure="it broke off"), "it broke off"),
        (reply((2.0, event("x") + USAGE)), "ended 0 times"),
        (reply((2.0, END + END + USAGE)), "ended 2 times"),
        (reply((2.0, event("x") + END)), "came: False"),
        (reply((2.0, END + b"data: [DONE]\n\n")), "no usage"),
        (reply((2.0, b'data: {"error": {"message": "gone"}}\n\n')), "gone"),
        (reply((2.0, b"data: {oops\n\n")), "not JSON"),
    ],
)
def test_what_is_not_a_whole_answer_is_an_error(broken: Reply, complaint: str) -> None:
    """A refused, cut, doubled or uncounted stream never counts as an answer."""
    assert complaint in str(read_answer("a", broken).error)


def server(bodies: list[dict[str, object]], *, refuses: str = "") -> Callable[..., list[bytes]]:
    """An OpenAI-compatible script that answers `max_tokens` tokens and keeps what it was sent."""

    def script(path: str, body: bytes) -> list[bytes]:
        fields = json.loads(body)
        bodies.append(fields | {"path": path})
        if refuses and refuses in fields:
            return [b"HTTP/1.1 400 Bad Request\r\nContent-Length: 4\r\n\r\nnope"]
        num_tokens = str(fields["max_tokens"]).encode()
        usage = USAGE.replace(b'"completion_tokens": 4', b'"completion_tokens": ' + num_tokens)
        text = event("x") + event("y") + END + usage
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(text)}\r\n\r\n".encode()
        return [head + text[:40], text[40:]]

    return script


def named(endpoint: Endpoint, name: str) -> Endpoint:
    return Endpoint.parse(f"{name}=http://{endpoint.host}:{endpoint.port}#m")


def test_times_of_text_are_known_while_an_answer_still_comes() -> None:
    """A stream that was dropped within an event gives the times of the events before."""
    dropped = reply((2.0, event("x")), (3.0, event("y") + b'data: {"cho'), failure="dropped")
    assert text_times(dropped) == [2.0, 3.0]


def test_prompt_tokens_from_memory_are_read_where_the_server_says_so() -> None:
    """OpenAI's field is taken, and its absence is told from a zero."""
    told = USAGE.replace(b'"prompt_tokens": 7', b'"prompt_tokens": 7, "prompt_tokens_details": '
                         b'{"cached_tokens": 5}')  # fmt: skip
    assert read_answer("a", reply((2.0, event("x") + END + told))).num_cached_tokens == 5
    assert read_answer("a", reply((2.0, event("x") + END + USAGE))).num_cached_tokens is None


def test_a_server_that_refuses_ignore_eos_is_measured_without_it(scripted: Scripted) -> None:
    """The probe finds out, and the report says so."""

    async def main(refuses: str) -> bool:
        async with scripted(server([], refuses=refuses)) as endpoint:
            return (await reach(named(endpoint, "a"))).takes_ignore_eos

    assert asyncio.run(main("ignore_eos")) is False
    assert asyncio.run(main("")) is True
    with pytest.raises(InvalidRequest, match=r"'a' does not answer .*nope"):
        asyncio.run(main("model"))


@pytest.mark.parametrize(
    ("head", "body", "complaint", "error"),
    [
        ("503 Service Unavailable", b"", "not ready yet", Busy),
        ("404 Not Found", b"no", "lists no models .status 404.", ConfigError),
        ("200 OK", b'{"data": []}', "lists no models", ConfigError),
    ],
)
def test_a_server_without_a_model_is_named(
    scripted: Scripted, head: str, body: bytes, complaint: str, error: type[BrimError]
) -> None:
    """Loading and having none are told apart, each with what to do."""
    answer = f"HTTP/1.1 {head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body

    async def main() -> None:
        async with scripted(lambda _path, _body: [answer]) as endpoint:
            await reach(endpoint)

    with pytest.raises(error, match=complaint):
        asyncio.run(main())


def test_a_server_without_a_chat_template_is_measured_without_chats(scripted: Scripted) -> None:
    """The probe finds out that chats are refused and completions are not."""

    async def main() -> bool:
        async with scripted(server([], refuses="messages")) as endpoint:
            return (await reach(named(endpoint, "a"))).takes_chat

    assert asyncio.run(main()) is False


def test_a_model_that_still_loads_is_not_a_refusal(scripted: Scripted) -> None:
    """503 on a completion means later, as it does on the list of models."""
    answer = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"

    async def main() -> None:
        async with scripted(lambda _path, _body: [answer]) as endpoint:
            await reach(named(endpoint, "a"))

    with pytest.raises(Busy, match="not ready yet"):
        asyncio.run(main())
