"""Any body at all is answered or refused, exactly as the published description says."""

import asyncio
from typing import Any

import jsonschema_rs
import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from support.scripted import Client, Reply, ScriptedRuntime, chat_body

from brim.server.app import build_app
from brim.server.openapi import describe
from brim.server.wire.openai import ChatCompletionRequest, CompletionRequest


def validator(schema: str) -> Any:
    document = describe(ScriptedRuntime().models())
    return jsonschema_rs.validator_for(
        {"$ref": f"#/components/schemas/{schema}", "components": document["components"]}
    )


CHAT = validator("ChatCompletionRequest")
PLAIN = validator("CompletionRequest")
ERROR = validator("ErrorBody")

SCALAR = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 25),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(["", "a", "text", "user", "auto", "small", "json_object", "\x00", "💧"]),
)
JSON = st.recursive(
    SCALAR,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


def mutated(schema: type[msgspec.Struct], **required: object) -> st.SearchStrategy[dict[str, Any]]:
    """Valid bodies in which some fields, known or not, have any JSON value."""
    names = st.one_of(st.sampled_from(schema.__struct_fields__), st.text(max_size=8))
    changes = st.dictionaries(names, JSON, max_size=3)
    return changes.map(lambda change: {**required, **change})


def post(path: str, body: object) -> Reply:
    return asyncio.run(Client(build_app(ScriptedRuntime())).post(path, body))


ANY_BODY = st.one_of(
    mutated(ChatCompletionRequest, **chat_body()).map(lambda body: ("chat/completions", body)),
    mutated(CompletionRequest, model="small", prompt="x").map(lambda body: ("completions", body)),
)


@settings(deadline=None)
@given(ANY_BODY)
def test_any_body_is_answered_or_refused_as_described(case: tuple[str, Any]) -> None:
    """Random bodies give 200 exactly when the published schema allows them, else 400 or 404."""
    route, body = case
    reply = post(f"/v1/{route}", body)
    is_allowed = (CHAT if route.startswith("chat") else PLAIN).is_valid(body)
    assert reply.status == 200 if is_allowed else reply.status in (400, 404)
    if reply.status != 200:
        assert ERROR.is_valid(reply.json())


@settings(deadline=None)
@given(st.data())
def test_damaged_bytes_never_give_500(data: st.DataObject) -> None:
    """Flipped, cut and inserted bytes in a valid body are at worst a 400."""
    valid = msgspec.json.encode(chat_body(stop=["a"], temperature=0.5, logit_bias={"1": 2}))
    position = data.draw(st.integers(0, len(valid)))
    num_removed = data.draw(st.integers(0, 4))
    inserted = data.draw(st.binary(max_size=4))
    damaged = valid[:position] + inserted + valid[position + num_removed :]
    reply = post("/v1/chat/completions", damaged)
    assert reply.status in (200, 400, 404)
