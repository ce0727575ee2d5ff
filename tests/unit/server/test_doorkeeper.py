"""Who is let in, and to which routes."""

import hmac

import pytest
from support.scripted import Client, Reply, ScriptedRuntime, chat_body

from brim.core.app import App
from brim.core.request import Request
from brim.errors import ConfigError
from brim.runtime.api import ModelState
from brim.server.app import build_app
from brim.server.auth import Doorkeeper, check_exposed, requires_keys

pytestmark = pytest.mark.anyio

KEY = "brim-mail-key"
TOKEN = "operator-token"
MAIL = App(name="mail", models=("small",))
OPERATOR_ROUTES = [
    "/brim/ps",
    "/brim/ledger",
    "/brim/stance",
    "/brim/events?follow=false",
    "/metrics",
]
CLIENT_ROUTES = ["/v1/models", "/v1/models/small", "/openapi.json", "/nowhere", "/brim/v1/nothing"]


def keeper(*, requires_key: bool, token: str = TOKEN) -> Doorkeeper:
    return Doorkeeper({KEY: MAIL}.get, requires_key=requires_key, operator_token=token)


@pytest.fixture
def closed(runtime: ScriptedRuntime) -> Client:
    """A server on which everybody needs a key."""
    return Client(build_app(runtime, doorkeeper=keeper(requires_key=True)))


@pytest.fixture
def local(runtime: ScriptedRuntime) -> Client:
    """A server on loopback as it is by default."""
    return Client(build_app(runtime, doorkeeper=keeper(requires_key=False)))


async def ask(client: Client, path: str, **headers: str) -> Reply:
    path, _, query = path.partition("?")
    exchange = client.exchange("GET", path, headers=headers)
    exchange._scope["query_string"] = query.encode()
    return await exchange.run()


@pytest.mark.parametrize("path", [*CLIENT_ROUTES, *OPERATOR_ROUTES])
async def test_a_closed_server_wants_a_key_everywhere(closed: Client, path: str) -> None:
    """Without a key, every route but /health is 401 and says where to get one."""
    for headers in ({}, {"authorization": "Bearer sk-of-another-service"}):
        reply = await ask(closed, path, **headers)
        assert reply.status == 401
        assert reply.json()["error"]["code"] == "invalid_api_key"
        assert "brim" in reply.json()["error"]["message"]
        assert reply.headers["www-authenticate"] == "Bearer"


async def test_health_is_everybodys_and_names_nothing(
    closed: Client, runtime: ScriptedRuntime
) -> None:
    """A load balancer needs no key, and learns the state but no model's name."""
    assert (await closed.get("/health")).json() == {"status": "ok"}
    runtime.states = [ModelState.QUARANTINED]
    stranger = await closed.get("/health")
    assert (stranger.status, stranger.json()) == (503, {"status": "failed", "models": {}})
    assert (await closed.get("/health", authorization=f"Bearer {KEY}")).json()["models"]


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {KEY}"},
        {"authorization": f"bearer  {KEY} "},
        {"authorization": KEY},
        {"x-api-key": KEY},
        {"authorization": "Bearer sk-none", "x-api-key": KEY},
    ],
)
async def test_an_app_is_known_by_its_key_in_either_header(
    closed: Client, headers: dict[str, str]
) -> None:
    """OpenAI's and Anthropic's clients both get in with a brim key."""
    assert (await ask(closed, "/v1/models", **headers)).status == 200


async def test_a_key_of_brims_form_that_nobody_has_is_refused_on_loopback_too(
    local: Client,
) -> None:
    """A mistyped or revoked key does not make an app a stranger without bounds."""
    reply = await ask(local, "/v1/models", authorization="Bearer brim-unknown")
    assert reply.status == 401
    assert "brim apps add" in reply.json()["error"]["message"]
    for key in ("", "sk-anything", "ollama"):
        assert (await ask(local, "/v1/models", authorization=f"Bearer {key}")).status == 200


@pytest.mark.parametrize("path", OPERATOR_ROUTES)
async def test_operator_routes_are_not_for_apps(local: Client, closed: Client, path: str) -> None:
    """An app's key is 403 there; nobody in particular may look on loopback, the token anywhere."""
    for client in (local, closed):
        reply = await ask(client, path, authorization=f"Bearer {KEY}")
        assert reply.status == 403
        assert "operator" in reply.json()["error"]["message"]
        assert (await ask(client, path, authorization=f"Bearer {TOKEN}")).status == 200
    assert (await ask(local, path)).status == 200
    assert (await ask(closed, path)).status == 401


@pytest.mark.parametrize("path", OPERATOR_ROUTES)
async def test_a_line_feed_opens_no_operator_route(closed: Client, path: str) -> None:
    """The router takes "/brim/ps%0A" for "/brim/ps", and so does the gate."""
    bare, _, query = path.partition("?")
    reply = await ask(closed, f"{bare}\n?{query}", authorization=f"Bearer {KEY}")
    assert reply.status == 403


async def test_the_token_opens_what_is_for_clients(closed: Client) -> None:
    """The operator's commands may ask for models and answers as well."""
    reply = await closed.post("/v1/chat/completions", chat_body(), authorization=f"Bearer {TOKEN}")
    assert reply.status == 200


async def test_an_empty_token_opens_nothing(runtime: ScriptedRuntime) -> None:
    """A server without a token has no operator, whatever is sent."""
    client = Client(build_app(runtime, doorkeeper=keeper(requires_key=True, token="")))
    for sent in ("", "Bearer", "Bearer "):
        assert (await ask(client, "/brim/ps", authorization=sent)).status == 401


async def test_the_token_is_compared_in_constant_time(
    closed: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither length nor first difference decides how long it takes: hmac does the comparing."""
    compared: list[tuple[bytes, bytes]] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return real(a, b)

    real = hmac.compare_digest
    monkeypatch.setattr("brim.server.auth.hmac.compare_digest", compare)
    await ask(closed, "/brim/ps", authorization="Bearer operator-tokem")
    assert compared == [(b"operator-tokem", TOKEN.encode())]


async def test_keys_may_hold_any_bytes(closed: Client) -> None:
    """Headers are bytes; a key outside ASCII is wrong, not a crash."""
    exchange = closed.exchange("GET", "/v1/models")
    exchange._scope["headers"].append((b"authorization", b"Bearer brim-\xff\x80"))
    assert (await exchange.run()).status == 401


async def test_a_refusal_comes_before_the_body_is_read(
    closed: Client, runtime: ScriptedRuntime
) -> None:
    """Who has no key cannot make the server hold or decode a body."""
    exchange = closed.exchange("POST", "/v1/chat/completions", [b"x" * 1000] * 3)
    assert (await exchange.run()).status == 401
    assert len(exchange._body) == 3
    assert not runtime.answers


async def test_an_apps_name_reaches_the_request(local: Client, runtime: ScriptedRuntime) -> None:
    """The gateway's meter learns whose each request is, and nobody's has no name."""
    seen: list[Request] = []

    async def note(request: Request) -> None:
        seen.append(request)

    runtime.before_submit = note
    await local.post("/v1/chat/completions", chat_body(), authorization=f"Bearer {KEY}")
    await local.post("/v1/chat/completions", chat_body(), authorization="Bearer sk-1")
    assert [request.app for request in seen] == ["mail", ""]


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "192.168.0.9", "fe80::1"])
def test_an_exposed_server_without_apps_does_not_start(address: str) -> None:
    """Where other machines reach the server it wants apps first, and says the command."""
    assert requires_keys(address, False)
    with pytest.raises(ConfigError, match="brim apps add"):
        check_exposed(address, has_apps=False)
    check_exposed(address, has_apps=True)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "::ffff:127.0.0.1"])
def test_a_server_on_loopback_starts_without_apps(address: str) -> None:
    """This machine's own programs need no key, unless the setting says so."""
    check_exposed(address, has_apps=False)
    assert not requires_keys(address, False)
    assert requires_keys(address, True)
