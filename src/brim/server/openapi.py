"""The OpenAPI 3.1 description, made from the schemas that decode and encode.

What a JSON schema of one field cannot say (two fields that need each other) is added here, so that
a body which the description allows is not refused by `wire.convert`.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from brim import __version__
from brim.core.event import Event
from brim.core.stance import Stance
from brim.ledger.entry import Statement
from brim.runtime.api import ModelStatus
from brim.server import limits
from brim.server.wire import openai, responses
from brim.server.wire.app_events import AppEvent

_REF = "#/components/schemas/{name}"
_JSON = "application/json"
_TYPES: tuple[type, ...] = (
    openai.ChatCompletionRequest,
    openai.CompletionRequest,
    responses.ChatCompletion,
    responses.ChatCompletionChunk,
    responses.Completion,
    responses.ErrorBody,
    responses.ModelList,
    responses.ModelObject,
    responses.Health,
    responses.AppUsage,
    AppEvent,
    Event,
    ModelStatus,
    Stance,
    Statement,
)

_ERRORS = {
    "400": "The request cannot be served as it stands; `param` names the field.",
    "401": "The key is no app's, or there is none where one is required.",
    "403": "The Host or Origin header is not served here, the route is the operator's, or force is "
    "not allowed.",
    "404": "No such model.",
    "408": "The body did not arrive in time.",
    "413": "The body is too large.",
    "429": "The app's budget of today is used up, or it asks too often or for too much at once; "
    "see Retry-After.",
    "500": "The engine or brim failed.",
    "503": "Not now: loading, draining, a full queue or no memory; see Retry-After.",
    "507": "It never fits this machine as asked.",
}


def describe(models: Sequence[ModelStatus]) -> dict[str, Any]:
    """The whole document; the names of the served models are its only variable part."""
    _, components = msgspec.json.schema_components(_TYPES, ref_template=_REF)
    _refine(components, models)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "brim",
            "version": __version__,
            "description": "Local language models in OpenAI's shapes; docs/api.md has the fields.",
        },
        "paths": _paths(),
        "components": {"schemas": components},
    }


def _paths() -> dict[str, Any]:
    chat = _post(
        "Answer a conversation",
        openai.ChatCompletionRequest,
        responses.ChatCompletion,
        responses.ChatCompletionChunk,
    )
    plain = _post(
        "Continue a text", openai.CompletionRequest, responses.Completion, responses.Completion
    )
    model_name = {
        "name": "model",
        "in": "path",
        "required": True,
        "schema": {"type": "string", "minLength": 1},
    }
    statuses = {"type": "array", "items": _ref(ModelStatus)}
    health = {
        "200": _response("Every model is ready.", _ref(responses.Health)),
        "403": _error("403"),
        "503": _response("Requests would be refused now.", _ref(responses.Health)),
    }
    return {
        "/v1/chat/completions": {"post": chat},
        "/v1/completions": {"post": plain},
        "/v1/models": {"get": _get("The served models", _ref(responses.ModelList))},
        "/v1/models/{model}": {
            "parameters": [model_name],
            "get": _get("One served model", _ref(responses.ModelObject), "404"),
        },
        "/health": {"get": {"summary": "Whether requests are taken", "responses": health}},
        "/brim/ps": {"get": _get("State, plan and footprint of each model", statuses)},
        "/brim/ledger": {
            "get": _get(
                "The account of the machine's memory; null while nothing was asked of it",
                {"anyOf": [_ref(Statement), {"type": "null"}]},
            )
        },
        "/brim/stance": {"get": _get("What the governor allows at the moment", _ref(Stance))},
        "/brim/events": {
            "get": _events("Everything that happens, for the operator", Event, _QUERY)
        },
        "/brim/v1/usage": {
            "get": _get("What the app that asks has used today", _ref(responses.AppUsage))
        },
        "/brim/v1/events": {"get": _events("What concerns the app that asks", AppEvent, [])},
        "/metrics": {
            "get": {
                "summary": "Counters and gauges in Prometheus' text format",
                "responses": {
                    "200": {"description": "OK", "content": {"text/plain": {}}},
                    "401": _error("401"),
                    "403": _error("403"),
                },
            }
        },
        "/openapi.json": {"get": _get("This document", {"type": "object"})},
    }


def _post(summary: str, body: type, whole: type, chunk: type) -> dict[str, Any]:
    ok = {
        "description": "The answer; with `stream`, events whose data is a "
        f"{chunk.__name__}, then `[DONE]`.",
        "content": {
            _JSON: {"schema": _ref(whole)},
            "text/event-stream": {},
        },
    }
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {_JSON: {"schema": _ref(body)}}},
        "responses": {"200": ok, **{status: _error(status) for status in _ERRORS}},
    }


_QUERY: list[dict[str, Any]] = [
    {
        "name": "since",
        "in": "query",
        "description": "Unix seconds; older events are left out.",
        "schema": {"type": "number"},
    },
    {
        "name": "follow",
        "in": "query",
        "description": "false answers with a list of what is kept.",
        "schema": {"type": "boolean"},
    },
]


def _events(summary: str, kind: type, parameters: list[dict[str, Any]]) -> dict[str, Any]:
    ok = {
        "description": f"An endless stream of events whose data is a {kind.__name__}.",
        "content": {"text/event-stream": {}, _JSON: {"schema": {"type": "array"}}},
    }
    found = {"200": ok} | {status: _error(status) for status in ("400", "401", "403", "429")}
    return {"summary": summary, "parameters": parameters, "responses": found}


def _get(summary: str, schema: dict[str, Any], *errors: str) -> dict[str, Any]:
    found = {"200": _response("OK", schema), "401": _error("401"), "403": _error("403")}
    return {
        "summary": summary,
        "responses": found | {status: _error(status) for status in errors},
    }


def _error(status: str) -> dict[str, Any]:
    return _response(_ERRORS[status], _ref(responses.ErrorBody))


def _response(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {_JSON: {"schema": schema}}}


def _ref(kind: type) -> dict[str, Any]:
    return {"$ref": _REF.format(name=kind.__name__)}


def _refine(components: dict[str, Any], models: Sequence[ModelStatus]) -> None:
    names = [status.name for status in models]
    vocab_size = min((status.plan.model.vocab_size for status in models), default=limits.MAX_TOKENS)
    chat = components["ChatCompletionRequest"]
    plain = components["CompletionRequest"]
    for schema in (chat, plain):
        if names:
            schema["properties"]["model"] = {"type": "string", "enum": names}
        schema["properties"]["logit_bias"]["anyOf"][0]["propertyNames"] = {
            "pattern": f"^({decimal_below(vocab_size)})$"
        }
        schema.setdefault("allOf", []).append(_needs("stream_options", "stream"))
    chat["allOf"].append(_needs("top_logprobs", "logprobs"))
    components["ChatMessage"]["allOf"] = _message_rules()
    plain["properties"]["prompt"] = _prompt_schema(vocab_size)


def _needs(name: str, switch: str) -> dict[str, Any]:
    """`name` may be given only with `switch`: true."""
    return {
        "if": {"properties": {name: {"not": {"type": "null"}}}, "required": [name]},
        "then": {"properties": {switch: {"const": True}}, "required": [switch]},
    }


def _message_rules() -> list[dict[str, Any]]:
    """Content may be missing beside tool calls alone, and some fields are the model's."""
    calls = {
        "properties": {"tool_calls": {"type": "array", "minItems": 1}},
        "required": ["tool_calls"],
    }
    content = {"properties": {"content": {"not": {"type": "null"}}}, "required": ["content"]}
    by_model = {"properties": {"role": {"const": "assistant"}}}
    rules = [
        {
            "if": {"properties": {name: {"not": {"type": "null"}}}, "required": [name]},
            "then": by_model,
        }
        for name in ("reasoning_content", "reasoning", "tool_calls")
    ]
    return [{"if": {"not": calls}, "then": content}, *rules]


def _prompt_schema(vocab_size: int) -> dict[str, Any]:
    token = {"type": "integer", "minimum": 0, "maximum": vocab_size - 1}
    tokens = {"type": "array", "items": token, "minItems": 1}
    several = {"minItems": 1, "maxItems": limits.MAX_PROMPTS}
    return {
        "description": "One text, several, one list of token ids, or several.",
        "anyOf": [
            {"type": "string"},
            {"type": "array", "items": {"type": "string"}, **several},
            tokens,
            {"type": "array", "items": tokens, **several},
        ],
    }


def decimal_below(limit: int) -> str:
    """A pattern of the integers 0 to `limit` - 1 in plain decimal, for keys of `logit_bias`.

    Example:
        >>> decimal_below(321)
        '0|[1-9]|[1-9][0-9]|[1-2][0-9]{2}|3[0-1][0-9]|320'
    """
    last = str(limit - 1)
    shorter = ["0", *(f"[1-9]{_digits(n - 1)}" for n in range(1, len(last)))]
    equal = []
    for position, digit in enumerate(last):
        lowest, highest = (1 if position == 0 else 0), int(digit) - 1
        if lowest <= highest:
            rest = _digits(len(last) - position - 1)
            equal.append(f"{last[:position]}[{lowest}-{highest}]{rest}")
    return "|".join([*shorter, *equal, last])


def _digits(count: int) -> str:
    return "" if count == 0 else "[0-9]" if count == 1 else f"[0-9]{{{count}}}"
