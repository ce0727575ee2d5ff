"""Request bodies: what is refused, with which field and which words."""

import json
from typing import Any

import pytest

from brim.errors import InvalidRequest, Unsupported
from brim.server.wire.decode import decode
from brim.server.wire.openai import UNSUPPORTED, ChatCompletionRequest, CompletionRequest

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
PLAIN: dict[str, Any] = {"model": "m", "prompt": "x"}


def refusal(body: bytes | dict[str, Any], schema: type[Any] = ChatCompletionRequest) -> Any:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(InvalidRequest) as caught:
        decode(data, schema)
    assert "\n" not in caught.value.message
    return caught.value


def test_a_minimal_body_is_taken() -> None:
    """Model and messages are enough; everything else is not given."""
    request = decode(json.dumps(CHAT).encode(), ChatCompletionRequest)
    assert request.model == "m"
    assert request.temperature is None


def test_null_is_the_same_as_absent() -> None:
    """Optional fields may be null, as OpenAI's own client sends them."""
    optional = set(ChatCompletionRequest.__struct_fields__) - {"model", "messages"}
    body = CHAT | dict.fromkeys(optional)
    assert decode(json.dumps(body).encode(), ChatCompletionRequest).model == "m"


@pytest.mark.parametrize(
    ("field", "value", "param", "words"),
    [
        ("temperatures", 1, "temperatures", "did you mean `temperature`?"),
        ("max_token", 5, "max_token", "did you mean `max_tokens`?"),
        ("zzzzzz", 5, "zzzzzz", "docs/api.md"),
        ("temperature", 7, "temperature", "is `7`: expected number <= 5.0"),
        ("temperature", "hot", "temperature", 'is `"hot"`: expected number | null, got string'),
        ("top_p", -0.5, "top_p", "expected number >= 0"),
        ("top_k", -1, "top_k", "expected integer >= 0"),
        ("repeat_penalty", 0, "repeat_penalty", "expected number > 0"),
        ("presence_penalty", 2.5, "presence_penalty", "expected number <= 2"),
        ("n", 9, "n", "expected integer <= 8"),
        ("n", True, "n", "got boolean"),
        ("n", 1.5, "n", "got number"),
        ("seed", 2**32 - 1, "seed", "<= 4294967294"),
        ("max_tokens", 0, "max_tokens", ">= 1"),
        ("max_tokens", 10**30, "max_tokens", "<= 2147483647"),
        ("top_logprobs", 21, "top_logprobs", "<= 20"),
        ("stop", ["a", ""], "stop[1]", "length >= 1"),
        ("stop", ["a"] * 17, "stop", "length <= 16"),
        ("stop", "x" * 257, "stop", "length <= 256"),
        ("logit_bias", {"one": 1}, "logit_bias", "a key of `logit_bias`"),
        ("logit_bias", {"1\n": 1}, "logit_bias", "a key of `logit_bias`"),
        ("logit_bias", {"1": 101}, "logit_bias[...]", "<= 100"),
        ("dry_sequence_breakers", ["x" * 41], "dry_sequence_breakers[0]", "length <= 40"),
        ("messages", [], "messages", "length >= 1"),
        ("messages", [{"role": "bob", "content": ""}], "messages[0].role", "system, developer"),
        (
            "messages",
            [{"role": "assistant", "tool_calls": [{"id": "1"}]}],
            "messages[0].tool_calls[0].function",
            "is missing",
        ),
        (
            "messages",
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "argument": ""}}]}],
            "messages[0].tool_calls[0].function.argument",
            "`arguments`",
        ),
        ("messages", [{"role": "user", "contents": ""}], "messages[0].contents", "`content`"),
        (
            "brim",
            {"priority": "urgent"},
            "brim.priority",
            "expected one of interactive, background",
        ),
        ("brim", {"overflow": "cut"}, "brim.overflow", "one of reject, trim, shift, summarize"),
        ("brim", {"cache": {"namespace": "a/b"}}, "brim.cache.namespace", "letters, digits, dots"),
        ("brim", {"cache": {"namespace": "a\n"}}, "brim.cache.namespace", "letters, digits, dots"),
        (
            "messages",
            [{"role": "user", "content": [{"type": "markdown"}]}],
            "messages[0].content[0].type",
            "expected text",
        ),
        (
            "stream_options",
            {"include_usge": True},
            "stream_options.include_usge",
            "`include_usage`",
        ),
    ],
)
def test_a_wrong_field_is_named_with_what_would_be_right(
    field: str, value: object, param: str, words: str
) -> None:
    """Unknown, mistyped and out-of-range fields give `param` and a message with the numbers."""
    error = refusal(CHAT | {field: value})
    assert error.param == param
    assert words in error.message
    assert not isinstance(error, Unsupported)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("functions", [{}]),
        ("function_call", {"name": "f"}),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {}}),
        ("modalities", ["audio"]),
        ("audio", {"voice": "x"}),
        ("prediction", {"type": "content"}),
        ("reasoning_effort", "high"),
        ("verbosity", "low"),
        ("web_search_options", {}),
        ("store", True),
        ("service_tier", "scale"),
        ("stream_options", {"include_obfuscation": True}),
    ],
)
def test_what_is_not_done_is_refused_with_its_reason(field: str, value: object) -> None:
    """A field that exists in OpenAI's interface but has no effect here is never ignored."""
    error = refusal(CHAT | {field: value})
    assert isinstance(error, Unsupported)
    assert any(reason in error.message for reason in UNSUPPORTED.values())


@pytest.mark.parametrize(("field", "value"), [("echo", True), ("suffix", "}"), ("best_of", 2)])
def test_what_plain_completions_do_not_do_is_refused(field: str, value: object) -> None:
    """`echo`, `suffix` and `best_of` are refused by name."""
    error = refusal(PLAIN | {field: value}, CompletionRequest)
    assert isinstance(error, Unsupported)
    assert error.param == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", []),
        ("tool_choice", "auto"),
        ("response_format", {"type": "text"}),
        ("modalities", ["text"]),
        ("store", False),
        ("service_tier", "auto"),
        ("user", "ada"),
        ("metadata", {"a": "b"}),
        ("parallel_tool_calls", True),
        ("prompt_cache_key", "k"),
    ],
)
def test_values_that_change_nothing_are_taken(field: str, value: object) -> None:
    """What clients send by default, or for their own accounts, is no error."""
    decode(json.dumps(CHAT | {field: value}).encode(), ChatCompletionRequest)


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
@pytest.mark.parametrize("type_first", [True, False])
def test_content_parts_other_than_text_are_refused(kind: str, type_first: bool) -> None:
    """An image in a message gives Unsupported, wherever `type` stands in the part."""
    part = {"type": kind, kind: {}} if type_first else {kind: {}, "type": kind}
    error = refusal(CHAT | {"messages": [{"role": "user", "content": [part]}]})
    assert isinstance(error, Unsupported)
    assert "parts of type text" in error.message


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b"[]", "expected object, got array"),
        (b"null", "expected object, got null"),
        (b'{"model"', "not JSON"),
        (b'{"model":"m",}', "not JSON"),
        (b'{"model":"m","messages":[{"role":"user","content":""}]} x', "not JSON"),
        (b'{"temperature":NaN}', "not JSON"),
        (b'{"temperature":1e999}', "out of range"),
        (b'{"model":"\xff"}', "not UTF-8"),
        (b'{"model":"\\ud800"}', "not JSON"),
        (b'{"max_tokens":' + b"9" * 5000 + b"}", "out of range"),
        (b'{"chat_template_kwargs":' + b'{"a":' * 100_000, "nested too deeply"),
        (b'{"model":' + b"[" * 100_000, "expected string"),
    ],
)
def test_bodies_that_are_no_request_are_refused(body: bytes, words: str) -> None:
    """Broken, foreign, bottomless and oversized JSON is one sentence, never another exception."""
    assert words in refusal(body).message


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"a","model":"b","messages":[{"role":"user","content":""}]}',
        b'{"model":"a","messages":[{"role":"user","content":"","content":"x"}]}',
        b'{"model":"a","m\\u006fdel":"b","messages":[{"role":"user","content":""}]}',
    ],
)
def test_a_field_given_twice_is_refused(body: bytes) -> None:
    """Equal keys in one object are an error at any depth, however they are written."""
    assert "given twice" in refusal(body).message


def test_an_integral_float_is_an_integer() -> None:
    """JSON has one kind of number: 3.0 is taken where an integer is asked for, 3.5 is not."""
    body = CHAT | {"n": 3.0, "temperature": 1}
    request = decode(json.dumps(body).encode(), ChatCompletionRequest)
    assert request.n == 3
    assert isinstance(request.n, int)
    assert "expected integer" in refusal(CHAT | {"n": 3.5}).message


def test_a_long_value_is_not_repeated_whole() -> None:
    """A message stays readable whatever the client sent."""
    assert len(refusal(CHAT | {"temperature": "x" * 10_000}).message) < 200
    assert len(refusal(CHAT | {"y" * 10_000: 1}).message) < 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [{"role": "user", "content": "x"}] * 10_001}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 1025}]},
            "messages[0].content",
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}] * 129}
                ]
            },
            "messages[0].tool_calls",
        ),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "x" * 257}, "stop"),
    ],
    ids=["messages", "parts", "tool calls", "stops", "long stop"],
)
def test_lists_have_bounds(fields: dict[str, object], param: str) -> None:
    """One more turn, part, call or stop string than the bound is refused by name."""
    assert refusal(CHAT | fields).param == param
