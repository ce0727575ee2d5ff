"""Models, health, ps, unknown routes, and who is kept away."""

import msgspec
import pytest
from support.scripted import Client, ScriptedRuntime

from brim.core.machine import MachineSpec
from brim.core.memory import MemoryTerms
from brim.core.stance import Stance
from brim.ledger.account import Account
from brim.ledger.entry import Statement
from brim.runtime.api import ModelState, ModelStatus
from brim.server.app import build_app
from brim.server.guard import served_hosts

pytestmark = pytest.mark.anyio


async def test_models_are_listed_in_openais_shape(client: Client) -> None:
    """/v1/models lists every model as an object of type model."""
    reply = await client.get("/v1/models")
    model = {"id": "small", "object": "model", "created": 1_700_000_000, "owned_by": "brim"}
    assert reply.json() == {"object": "list", "data": [model]}
    assert (await client.get("/v1/models/small")).json() == model


async def test_an_unknown_model_is_404(client: Client) -> None:
    """A name that is not served, slashes and all, is model_not_found."""
    reply = await client.get("/v1/models/org/other")
    assert reply.status == 404
    assert reply.json()["error"]["code"] == "model_not_found"
    assert "org/other" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("states", "draining", "status", "word"),
    [
        ([ModelState.READY], False, 200, "ok"),
        ([], False, 200, "ok"),
        ([ModelState.READY, ModelState.UNLOADED], False, 200, "ok"),
        ([ModelState.READY, ModelState.STARTING], False, 503, "loading"),
        ([ModelState.RESTARTING, ModelState.QUARANTINED], False, 503, "loading"),
        ([ModelState.QUARANTINED], False, 503, "failed"),
        ([ModelState.STOPPED], False, 503, "failed"),
        ([ModelState.READY], True, 503, "draining"),
    ],
)
async def test_health_is_200_only_when_requests_would_be_taken(
    client: Client,
    runtime: ScriptedRuntime,
    states: list[ModelState],
    draining: bool,
    status: int,
    word: str,
) -> None:
    """Health says ok, loading, failed or draining, with every model's state unless it is ok."""
    runtime.states, runtime.draining = states, draining
    reply = await client.get("/health")
    assert (reply.status, reply.json()["status"]) == (status, word)
    assert ("models" in reply.json()) == (status != 200)


async def test_ps_is_a_list_of_model_status_without_the_template(client: Client) -> None:
    """/brim/ps decodes to ModelStatus, plan and footprint included."""
    reply = await client.get("/brim/ps")
    (status,) = msgspec.json.decode(reply.body, type=list[ModelStatus])
    assert status.state is ModelState.READY
    assert status.plan.memory.total_bytes == 17
    assert status.footprint is not None
    assert status.plan.model.chat_template is None


async def test_the_ledger_is_a_statement(client: Client, runtime: ScriptedRuntime) -> None:
    """/brim/ledger decodes to the account's statement, and is null before anything was asked."""
    assert (await client.get("/brim/ledger")).json() is None
    account = Account()
    terms = MemoryTerms(weights_bytes=2, kv_bytes=3, compute_bytes=5, overhead_bytes=7)
    machine = MachineSpec(name="m", system="linux", ram_bytes=16 * 10**9, others_bytes=10**9)
    account.grant("small", terms, machine)
    runtime.account = account.statement(machine)
    reply = await client.get("/brim/ledger")
    assert msgspec.json.decode(reply.body, type=Statement) == runtime.account
    assert reply.json()["kv_committed_bytes"] == 3


async def test_the_stance_is_the_runtimes(client: Client, runtime: ScriptedRuntime) -> None:
    """/brim/stance decodes to what the governor allows."""
    runtime.current_stance = Stance(reason="memory is short", admits=False)
    reply = await client.get("/brim/stance")
    assert msgspec.json.decode(reply.body, type=Stance) == runtime.current_stance


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/embeddings", "/health/", "/v1/completions/"])
async def test_an_unknown_route_is_404_in_openais_shape(client: Client, path: str) -> None:
    """No redirects and no plain text: the error says what was asked for."""
    reply = await client.get(path)
    assert reply.status == 404
    assert reply.json()["error"]["code"] == "not_found"
    assert f"GET {path}" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/v1/chat/completions", "POST"),
        ("DELETE", "/v1/completions", "POST"),
        ("POST", "/health", "GET, HEAD"),
    ],
)
async def test_a_wrong_method_is_405_with_the_right_one(
    client: Client, method: str, path: str, allow: str
) -> None:
    """405 has Allow, and the sentence names the method to use."""
    reply = await client.exchange(method, path).run()
    assert reply.status == 405
    assert sorted(reply.headers["allow"].split(", ")) == allow.split(", ")
    assert f"use {allow}" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    "host",
    ["localhost", "127.0.0.1:2746", "[::1]:2746", "LOCALHOST:80", "app.localhost", "localhost."],
)
async def test_names_of_this_machine_are_served(client: Client, host: str) -> None:
    """Every loopback name, with or without port, is a valid Host."""
    assert (await client.get("/health", host=host)).status == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:2746", "127.0.0.1.evil.example", "192.168.0.9", "[::1", ""],
)
async def test_other_names_are_refused(client: Client, host: str) -> None:
    """A name that someone pointed at this machine (DNS rebinding) gets 403 on every route."""
    for path in ("/health", "/v1/models", "/nowhere"):
        reply = await client.get(path, host=host)
        assert reply.status == 403
        assert "127.0.0.1" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:3000", 200),
        ("http://127.0.0.1:2746", 200),
        ("https://evil.example", 403),
        ("null", 403),
        ("http://localhost.evil.example", 403),
        ("https://app.example", 200),
        ("https://app.example:8443", 403),
    ],
)
async def test_web_pages_of_other_sites_are_refused(
    runtime: ScriptedRuntime, origin: str, status: int
) -> None:
    """A browser's Origin must be this machine's or one that the operator named."""
    client = Client(build_app(runtime, allowed_origins=["https://app.example"]))
    reply = await client.get("/health", origin=origin)
    assert reply.status == status


@pytest.mark.parametrize(
    ("typed", "bound"),
    [
        ("Localhost", "127.0.0.1"),
        ("::ffff:127.0.0.1", "::ffff:127.0.0.1"),
        ("Studio.", "127.0.1.1"),
        ("0:0:0:0:0:0:0:1", "::1"),
    ],
)
async def test_every_spelling_of_loopback_is_guarded(
    runtime: ScriptedRuntime, typed: str, bound: str
) -> None:
    """The bound address decides: a foreign name is refused, the typed one and the usual work."""
    client = Client(build_app(runtime, allowed_hosts=served_hosts(typed, bound)))
    assert (await client.get("/health", host="evil.example")).status == 403
    for host in (typed if ":" not in typed else f"[{typed}]", "127.0.0.1:2746", "[::1]"):
        assert (await client.get("/health", host=host)).status == 200


@pytest.mark.parametrize("bound", ["127.0.0.1", "0.0.0.0"])
async def test_hosts_that_the_operator_names_are_served_and_no_others(
    runtime: ScriptedRuntime, bound: str
) -> None:
    """`server.allowed_hosts` adds names on loopback, and closes the list elsewhere."""
    hosts = served_hosts(bound, bound, ["Studio.LAN"])
    client = Client(build_app(runtime, allowed_hosts=hosts))
    assert (await client.get("/health", host="studio.lan:2746")).status == 200
    assert (await client.get("/health", host="localhost")).status == 200
    refusal = await client.get("/health", host="evil.example")
    assert refusal.status == 403
    assert "server.allowed_hosts" in refusal.json()["error"]["message"]
    refusal = await client.get("/health", origin="https://evil.example")
    assert "server.allowed_origins" in refusal.json()["error"]["message"]


async def test_a_public_server_takes_every_name_but_only_its_own_pages(
    runtime: ScriptedRuntime,
) -> None:
    """Bound to the network, any Host goes, and an Origin must be of the same host."""
    client = Client(build_app(runtime, allowed_hosts=served_hosts("0.0.0.0", "0.0.0.0")))
    assert (await client.get("/health", host="studio.lan")).status == 200
    for origin, status in (("http://studio.lan:8080", 200), ("http://evil.example", 403)):
        reply = await client.get("/health", host="studio.lan", origin=origin)
        assert reply.status == status


async def test_model_names_with_odd_characters_make_safe_headers(
    client: Client, runtime: ScriptedRuntime
) -> None:
    """A line break or an accent in a name is percent-encoded in `x-brim-model`."""
    runtime.name = "mödel\r\nx: y"
    reply = await client.chat(model=runtime.name)
    assert reply.headers["x-brim-model"] == "m%C3%B6del%0D%0Ax: y"
    assert reply.json()["model"] == runtime.name
