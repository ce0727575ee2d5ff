"""The `brim` object of a request: priority, overflow, and whose cache it is."""

from typing import Any

import pytest
from support.scripted import Client, ScriptedRuntime

from brim.core.request import OverflowPolicy, Priority, Request
from brim.server.wire.options import SHARED_NAMESPACE

pytestmark = pytest.mark.anyio


@pytest.fixture
def asked(runtime: ScriptedRuntime) -> list[Request]:
    """What reached the runtime."""
    seen: list[Request] = []

    async def note(request: Request) -> None:
        seen.append(request)

    runtime.before_submit = note
    return seen


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"priority": Priority.INTERACTIVE, "overflow": OverflowPolicy.REJECT}),
        ({"brim": {"priority": "background"}}, {"priority": Priority.BACKGROUND}),
        ({"service_tier": "flex"}, {"priority": Priority.BACKGROUND}),
        ({"service_tier": "default"}, {"priority": Priority.INTERACTIVE}),
        (
            {"service_tier": "flex", "brim": {"priority": "interactive"}},
            {"priority": Priority.INTERACTIVE},
        ),
        ({"brim": {"overflow": "trim"}}, {"overflow": OverflowPolicy.TRIM}),
        ({"brim": {"cache": {"use": False}}}, {"use_cache": False}),
        ({"brim": {"cache": {}}}, {"use_cache": True, "cache_namespace": ""}),
        ({"brim": {"keep_volatile_lines": True}}, {"keep_volatile_lines": True}),
        ({"brim": {"cache": {"share": True}}}, {"cache_namespace": SHARED_NAMESPACE}),
        ({"brim": {"cache": {"namespace": "mail"}}}, {"cache_namespace": "/mail"}),
    ],
)
async def test_options_reach_the_request(
    client: Client, asked: list[Request], fields: dict[str, Any], expected: dict[str, Any]
) -> None:
    """Each option sets its field of the request, on both routes."""
    assert (await client.chat(**fields)).status == 200
    assert (await client.complete(**fields)).status == 200
    for request in asked:
        assert {name: getattr(request, name) for name in expected} == expected


async def test_the_servers_policy_holds_where_a_request_gives_none(
    client: Client, runtime: ScriptedRuntime, asked: list[Request]
) -> None:
    """`models.overflow` is the default of `brim.overflow`, not its bound."""
    runtime.overflow_policy = OverflowPolicy.SUMMARIZE
    await client.chat()
    await client.chat(brim={"overflow": "reject"})
    assert [request.overflow for request in asked] == ["summarize", "reject"]


async def test_no_client_can_name_the_namespace_of_another(
    client: Client, asked: list[Request]
) -> None:
    """Keys part clients, the same key joins them, and the key itself is nowhere in the name."""
    named = {"brim": {"cache": {"namespace": "mail"}}}
    for key, fields in [("one", {}), ("one", {}), ("two", {}), ("one", named), ("two", named)]:
        body = {"model": "small", "messages": [{"role": "user", "content": "Hi"}], **fields}
        await client.post("/v1/chat/completions", body, authorization=f"Bearer {key}")
    await client.chat(**named)
    names = [request.cache_namespace for request in asked]
    assert names[0] == names[1]
    assert len(set(names)) == 5
    assert not any("one" in name or "two" in name for name in names)
    assert names[3] == f"{names[0]}/mail"


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        ({"namespace": "a/b"}, "`brim.cache.namespace`"),
        ({"namespace": "key:1"}, "`brim.cache.namespace`"),
        ({"namespace": ""}, "`brim.cache.namespace`"),
        ({"namespace": "a" * 65}, "`brim.cache.namespace`"),
        ({"share": True, "namespace": "a"}, "leave `namespace` out"),
        ({"shared": True}, "did you mean `share`"),
    ],
)
async def test_a_namespace_that_could_be_anothers_is_refused(
    client: Client, cache: dict[str, Any], message: str
) -> None:
    """What could spell a key's part, and what contradicts itself, is 400 with its name."""
    reply = await client.chat(brim={"cache": cache})
    assert reply.status == 400
    assert message in reply.json()["error"]["message"]


async def test_a_misspelt_option_is_named(client: Client) -> None:
    """Unknown words and values are refused as everywhere."""
    reply = await client.chat(brim={"priority": "urgent"})
    assert (reply.status, reply.json()["error"]["param"]) == (400, "brim.priority")
    reply = await client.chat(brim={"overflows": "trim"})
    assert "did you mean `overflow`" in reply.json()["error"]["message"]
