"""CORS: pages of the origins that the operator named may use the server from a browser."""

import pytest
from support.scripted import Client, ScriptedRuntime, chat_body

from brim.core.cache import CacheReport, MissReason
from brim.server.app import build_app
from brim.server.auth import Doorkeeper

pytestmark = pytest.mark.anyio

PAGE = "https://app.example"
PREFLIGHT = {"origin": PAGE, "access-control-request-method": "POST"}


@pytest.fixture
def client(runtime: ScriptedRuntime) -> Client:
    keeper = Doorkeeper(lambda key: None, requires_key=False)
    return Client(build_app(runtime, doorkeeper=keeper, allowed_origins=[PAGE]))


async def test_a_preflight_of_an_allowed_page_is_answered(client: Client) -> None:
    """A browser learns that the page may send JSON and a key by POST, and for how long."""
    asked = {"access-control-request-headers": "authorization, content-type,x-stainless-os"}
    reply = await client.exchange(
        "OPTIONS", "/v1/chat/completions", headers=PREFLIGHT | asked
    ).run()
    assert (reply.status, reply.body) == (204, b"")
    assert reply.headers["access-control-allow-origin"] == PAGE
    assert "POST" in reply.headers["access-control-allow-methods"]
    assert reply.headers["access-control-allow-headers"] == asked["access-control-request-headers"]
    assert int(reply.headers["access-control-max-age"]) > 0
    assert reply.headers["vary"] == "Origin"


async def test_a_preflight_needs_no_key(runtime: ScriptedRuntime) -> None:
    """Browsers ask before they send a key, so the question is answered without one."""
    keeper = Doorkeeper(lambda key: None, requires_key=True)
    client = Client(build_app(runtime, doorkeeper=keeper, allowed_origins=[PAGE]))
    assert (await client.exchange("OPTIONS", "/v1/models", headers=PREFLIGHT).run()).status == 204
    reply = await client.get("/v1/models", origin=PAGE)
    assert reply.status == 401
    assert reply.headers["access-control-allow-origin"] == PAGE


@pytest.mark.parametrize("names", ["x" * 3000, "a\r\nset-cookie: b", "*", ""])
async def test_header_names_that_are_none_are_not_repeated(client: Client, names: str) -> None:
    """What a page asks for is allowed only where it is a list of names."""
    asked = PREFLIGHT | {"access-control-request-headers": names}
    reply = await client.exchange("OPTIONS", "/v1/models", headers=asked).run()
    assert "access-control-allow-headers" not in reply.headers


async def test_answers_name_exactly_the_page_that_asked(client: Client) -> None:
    """Whole answers, streams and errors carry the origin, never a wildcard, never credentials."""
    replies = [
        await client.get("/v1/models", origin=PAGE),
        await client.post("/v1/chat/completions", chat_body(stream=True), origin=PAGE),
        await client.post("/v1/chat/completions", b"{", origin=PAGE),
        await client.get("/nowhere", origin=PAGE),
    ]
    assert [reply.status for reply in replies] == [200, 200, 400, 404]
    for reply in replies:
        assert reply.headers["access-control-allow-origin"] == PAGE
        assert "access-control-allow-credentials" not in reply.headers
        assert "retry-after" in reply.headers["access-control-expose-headers"]
        assert reply.headers["vary"] == "Origin"


async def test_a_page_may_read_every_header_of_ours(
    client: Client, runtime: ScriptedRuntime
) -> None:
    """What tells a program something is not kept from a page."""
    runtime.instead_of, runtime.cache = "large", CacheReport(miss=MissReason.NO_ENTRY)
    reply = await client.post("/v1/chat/completions", chat_body(), origin=PAGE)
    readable = set(reply.headers["access-control-expose-headers"].split(", "))
    ours = {name for name in reply.headers if name.startswith("x-")}
    assert {"x-brim-instead-of", "x-brim-cache-reason"} <= ours
    assert ours <= readable


@pytest.mark.parametrize("origin", ["https://evil.example", "https://app.example.evil.example"])
async def test_other_pages_are_told_nothing(client: Client, origin: str) -> None:
    """A foreign origin is refused with its preflight, and no answer lets its page read it."""
    for reply in (
        await client.exchange(
            "OPTIONS", "/v1/models", headers=PREFLIGHT | {"origin": origin}
        ).run(),
        await client.get("/v1/models", origin=origin),
    ):
        assert reply.status == 403
        assert "access-control-allow-origin" not in reply.headers


async def test_pages_of_this_machine_may_not_read_unless_named(client: Client) -> None:
    """A page on localhost may send, as before, and its browser keeps the answer from it."""
    reply = await client.get("/v1/models", origin="http://localhost:3000")
    assert reply.status == 200
    assert "access-control-allow-origin" not in reply.headers
    asked = PREFLIGHT | {"origin": "http://localhost:3000"}
    assert (await client.exchange("OPTIONS", "/v1/models", headers=asked).run()).status == 405


async def test_without_allowed_origins_there_are_no_cors_headers(runtime: ScriptedRuntime) -> None:
    """A server that opens itself to no page says nothing about pages."""
    client = Client(build_app(runtime))
    reply = await client.get("/v1/models")
    assert not [name for name in reply.headers if name.startswith("access-control")]
    assert "vary" not in reply.headers


async def test_private_network_access_is_granted_to_allowed_pages(client: Client) -> None:
    """Browsers that ask whether a page of the internet may reach this machine are answered."""
    asked = PREFLIGHT | {"access-control-request-private-network": "true"}
    reply = await client.exchange("OPTIONS", "/v1/models", headers=asked).run()
    assert reply.headers["access-control-allow-private-network"] == "true"
