"""The published description: complete, and consistent with the app."""

import re
from pathlib import Path
from typing import Any

import jsonschema_rs
import msgspec
import pytest
from support.scripted import Client, chat_body

from brim.server.openapi import decimal_below, describe
from brim.server.wire import openai, options, responses

pytestmark = pytest.mark.anyio


def references(node: object) -> set[str]:
    if isinstance(node, dict):
        found = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
        return found.union(*(references(value) for value in node.values()))
    return set().union(*(references(item) for item in node)) if isinstance(node, list) else set()


async def test_every_route_is_described_and_every_reference_resolves(client: Client) -> None:
    """The document has the app's routes, no others, and points at nothing that is missing."""
    document = (await client.get("/openapi.json")).json()
    routes = {route.path.replace(":path", "") for route in client.app.routes}  # type: ignore[attr-defined]
    assert set(document["paths"]) == routes
    schemas = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert references(document) <= schemas


async def test_the_served_models_are_the_values_of_model(client: Client) -> None:
    """Whoever reads the description sees which names can be used."""
    schemas = (await client.get("/openapi.json")).json()["components"]["schemas"]
    assert schemas["ChatCompletionRequest"]["properties"]["model"]["enum"] == ["small"]


@pytest.mark.parametrize(
    "kind",
    [
        openai.ChatCompletionRequest,
        openai.CompletionRequest,
        openai.ChatMessage,
        openai.StreamOptions,
        options.BrimOptions,
        options.CacheChoice,
        responses.BrimInfo,
        responses.BrimCache,
        responses.BrimOverflow,
        responses.BrimRemovedTurn,
        responses.BrimMovedLine,
    ],
)
def test_the_page_about_the_interface_names_every_field(kind: type[msgspec.Struct]) -> None:
    """No field can be added without a word in docs/api.md."""
    page = (Path(__file__).parents[3] / "docs" / "api.md").read_text()
    words = set(re.findall(r"[a-z_]+", page))
    assert set(kind.__struct_fields__) - words == set()


def test_a_server_without_models_is_described_too() -> None:
    """Before any model is known the document is still valid."""
    assert describe([])["openapi"] == "3.1.0"


@pytest.mark.parametrize(
    ("fields", "allowed"),
    [
        ({"top_logprobs": 2}, False),
        ({"top_logprobs": 2, "logprobs": False}, False),
        ({"top_logprobs": 2, "logprobs": True}, True),
        ({"top_logprobs": None}, True),
        ({"stream_options": {}}, False),
        ({"stream_options": {}, "stream": True}, True),
        ({"logit_bias": {"4095": 1}}, True),
        ({"logit_bias": {"4096": 1}}, False),
        ({"logit_bias": {"01": 1}}, False),
    ],
)
async def test_rules_between_fields_are_described_as_they_are_applied(
    client: Client, fields: dict[str, Any], allowed: bool
) -> None:
    """What one field's schema cannot say is in the description too, and the server agrees."""
    schema = (await client.get("/openapi.json")).json()
    root = {"$ref": "#/components/schemas/ChatCompletionRequest", **schema}
    assert jsonschema_rs.is_valid(root, chat_body(**fields)) is allowed
    assert ((await client.chat(**fields)).status == 200) is allowed


@pytest.mark.parametrize("limit", [1, 2, 9, 10, 11, 100, 101, 321, 1000])
def test_the_pattern_of_token_ids_matches_exactly_the_vocabulary(limit: int) -> None:
    """`decimal_below` matches 0 to limit - 1 in plain decimal and nothing else."""
    pattern = re.compile(decimal_below(limit))
    matched = [number for number in range(3 * limit + 20) if pattern.fullmatch(str(number))]
    assert matched == list(range(limit))
    assert not pattern.fullmatch("00")
