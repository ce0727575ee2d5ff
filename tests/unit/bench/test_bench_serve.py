"""Reading answers and comparing servers."""

import asyncio
import json
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import pytest

from brim.bench.answers import Answered, read_answer
from brim.bench.client import Endpoint, Reply
from brim.bench.serve import Report, Round, compare, reach, rows
from brim.bench.workload import RecordedRequest, Turn
from brim.errors import ConfigError, InvalidRequest

Scripted = Callable[..., AbstractAsyncContextManager[Endpoint]]

REQUESTS = [
    RecordedRequest(id="a", max_tokens=3, prompt="one"),
    RecordedRequest(id="b", max_tokens=2, messages=(Turn("user", "two"),)),
]


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


def compared(scripted: Scripted, bodies: list[dict[str, object]], *, repetitions: int) -> Report:
    async def main() -> Report:
        async with scripted(server(bodies)) as endpoint:
            return await compare(
                [named(endpoint, "one"), named(endpoint, "two")],
                REQUESTS,
                concurrencies=[2],
                repetitions=repetitions,
            )

    return asyncio.run(main())


def test_every_server_gets_the_same_requests_and_ratios_are_to_the_first(
    scripted: Scripted,
) -> None:
    """Equal servers get equal bodies, and only the second one has ratios."""
    bodies: list[dict[str, object]] = []
    report = compared(scripted, bodies, repetitions=1)
    one, two = bodies[2:4], bodies[4:6]
    assert sorted(map(str, one)) == sorted(map(str, two))
    assert {str(body["path"]) for body in one} == {"/v1/completions", "/v1/chat/completions"}
    assert all(body["temperature"] == 0 and body["ignore_eos"] is True for body in one)
    found = {(row.endpoint, row.figure): row for row in report.rows}
    assert found["two", "num_completion_tokens"].value.median == 5
    assert found["two", "num_errors"].value.median == 0
    assert found["one", "output_tok_s"].ratio is None
    assert found["two", "output_tok_s"].ratio is not None


def test_servers_take_turns_and_the_order_changes(scripted: Scripted) -> None:
    """The second repetition begins with the other server and with new prompts."""
    bodies: list[dict[str, object]] = []
    report = compared(scripted, bodies, repetitions=2)
    order = [(one.repetition, one.endpoint) for one in report.rounds]
    assert order == [(0, "one"), (0, "two"), (1, "two"), (1, "one")]
    prompts = [str(body["prompt"]) for body in bodies[2:] if "prompt" in body]
    assert prompts[0] == prompts[1] != prompts[2] == prompts[3]


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
    ("head", "body", "complaint"),
    [
        ("503 Service Unavailable", b"", "not ready yet"),
        ("404 Not Found", b"no", "lists no models .status 404."),
        ("200 OK", b'{"data": []}', "lists no models"),
    ],
)
def test_a_server_without_a_model_is_named(
    scripted: Scripted, head: str, body: bytes, complaint: str
) -> None:
    """Loading and having none are told apart, each with what to do."""
    answer = f"HTTP/1.1 {head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body

    async def main() -> None:
        async with scripted(lambda _path, _body: [answer]) as endpoint:
            await reach(endpoint)

    with pytest.raises(ConfigError, match=complaint):
        asyncio.run(main())


def test_two_endpoints_of_one_name_are_refused() -> None:
    """Rows could not be told apart."""
    twice = [Endpoint.parse("a=http://h"), Endpoint.parse("a=http://g")]
    with pytest.raises(ConfigError, match="same name"):
        asyncio.run(compare(twice, REQUESTS))


def test_a_round_without_answers_gives_counts_and_no_figures() -> None:
    """Errors leave rates out rather than making them zero."""
    bad = Answered(request_id="a", duration_s=1.0, error="status 503: busy")
    good = Answered(
        request_id="a", duration_s=1.0, ttft_s=0.1, time_per_token_s=0.1, longest_gap_s=0.1,
        num_completion_tokens=2,
    )  # fmt: skip
    rounds = [
        Round(endpoint=name, concurrency=1, repetition=0, wall_s=1.0, answers=(answer,))
        for name, answer in (("one", good), ("two", bad))
    ]
    found = {(row.endpoint, row.figure): row for row in rows(rounds, "one")}
    assert found["two", "num_errors"].value.median == 1
    assert found["two", "num_errors"].ratio is None
    assert ("two", "output_tok_s") not in found
    assert found["one", "output_tok_s"].value.median == 2
