"""What the published description says of messages is what is accepted."""

from typing import Any

import jsonschema_rs
import msgspec
import pytest
from support.scripted import ScriptedRuntime, chat_body

from brim.errors import BrimError
from brim.server.openapi import describe
from brim.server.wire.convert import chat_call
from brim.server.wire.decode import decode
from brim.server.wire.openai import ChatCompletionRequest

CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}

MESSAGES: list[tuple[dict[str, Any], bool]] = [
    ({"role": "user", "content": "x"}, True),
    ({"role": "user"}, False),
    ({"role": "user", "content": None}, False),
    ({"role": "assistant", "tool_calls": [CALL]}, True),
    ({"role": "assistant", "content": None, "tool_calls": [CALL, CALL]}, True),
    ({"role": "assistant", "content": None, "tool_calls": []}, False),
    ({"role": "assistant", "content": "x", "tool_calls": []}, True),
    ({"role": "assistant", "content": "x", "reasoning_content": "y"}, True),
    ({"role": "assistant", "content": "x", "reasoning": None}, True),
    ({"role": "user", "content": "x", "reasoning": "y"}, False),
    ({"role": "tool", "content": "x", "tool_calls": [CALL]}, False),
    ({"role": "tool", "content": "x", "tool_call_id": "c1", "name": "look"}, True),
    ({"role": "assistant", "tool_calls": [{"function": {"name": ""}}]}, False),
    ({"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}, False),
    ({"role": "assistant", "tool_calls": [{"type": "custom", **CALL, "more": 1}]}, False),
]


@pytest.mark.parametrize(("message", "is_allowed"), MESSAGES)
def test_a_message_is_taken_exactly_where_the_description_allows_it(
    message: dict[str, Any], is_allowed: bool
) -> None:
    """A client that checks its request against the description is not surprised."""
    models = ScriptedRuntime().models()
    document = describe(models)
    schema = {
        "$ref": "#/components/schemas/ChatCompletionRequest",
        "components": document["components"],
    }
    body = {**chat_body(), "messages": [message]}
    assert jsonschema_rs.validator_for(schema).is_valid(body) == is_allowed
    try:
        chat_call(decode(msgspec.json.encode(body), ChatCompletionRequest), models)
    except BrimError as error:
        assert not is_allowed, error.message
    else:
        assert is_allowed
