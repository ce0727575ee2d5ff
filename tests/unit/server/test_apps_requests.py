"""What an app's manifest does to its requests, and what an app gets to see."""

from typing import Any

import pytest
from support.scripted import Client, ScriptedRuntime, chat_body

from brim.apps.meter import Left
from brim.core.app import App, Budgets, Limits, Pair
from brim.core.request import OverflowPolicy, Priority, Request
from brim.errors import Busy, OverBudget, RateLimited
from brim.runtime.api import ModelState
from brim.server.app import build_app
from brim.server.auth import Doorkeeper

pytestmark = pytest.mark.anyio

MAIL = App(
    name="mail",
    priority=Priority.BACKGROUND,
    models=("small",),
    overflow=OverflowPolicy.TRIM,
    max_context_tokens=100,
    budgets=Budgets(tokens=1000, ssd_write_bytes=10**9),
    limits=Limits(max_concurrent=3),
)
CHAT = App(name="chat")
AS_MAIL = {"authorization": "Bearer brim-mail"}
AS_CHAT = {"x-api-key": "brim-chat"}


class Usage:
    """Implements UsageSource with one figure that is told apart."""

    def left(self, app: str) -> Left:
        is_mail = app == "mail"
        return Left(
            day="2026-11-22",
            renews_in_s=60.0,
            used_tokens=300 if is_mail else 7,
            reserved_tokens=100,
            left_tokens=600 if is_mail else None,
            used_energy_j=1.23456,
            left_energy_j=None,
            ssd_written_bytes=5,
            left_ssd_write_bytes=None,
            num_in_flight=1,
        )


@pytest.fixture
def asked(runtime: ScriptedRuntime) -> list[Request]:
    """What reached the runtime."""
    seen: list[Request] = []

    async def note(request: Request) -> None:
        seen.append(request)

    runtime.before_submit = note
    return seen


@pytest.fixture
def client(runtime: ScriptedRuntime) -> Client:
    runtime.states = [ModelState.READY, ModelState.READY]  # small and small1
    keeper = Doorkeeper({"brim-mail": MAIL, "brim-chat": CHAT}.get, requires_key=False)
    return Client(build_app(runtime, doorkeeper=keeper, usage=Usage()))


async def chat(client: Client, headers: dict[str, str], **fields: Any) -> Any:
    return await client.post("/v1/chat/completions", chat_body(**fields), **headers)


async def test_only_granted_models_are_there_for_an_app(client: Client) -> None:
    """A model that was not granted is absent from lists and schemas, and 404 like any other."""
    listed = (await client.get("/v1/models", **AS_MAIL)).json()["data"]
    assert [each["id"] for each in listed] == ["small"]
    assert len((await client.get("/v1/models", **AS_CHAT)).json()["data"]) == 2
    for reply in (
        await client.get("/v1/models/small1", **AS_MAIL),
        await chat(client, AS_MAIL, model="small1"),
    ):
        assert reply.status == 404
        error = reply.json()["error"]
        assert error["code"] == "model_not_found"
        unknown = (await client.get("/v1/models/small9", **AS_MAIL)).json()["error"]
        assert error["message"] == unknown["message"].replace("small9", "small1")
    schema = (await client.get("/openapi.json", **AS_MAIL)).body
    assert b'"small"' in schema
    assert b"small1" not in schema


async def test_large_bodies_name_granted_models_only_too(client: Client) -> None:
    """Decoding on another thread is no way around the grant."""
    reply = await chat(client, AS_MAIL, model="small1", user="x" * 1_100_000)
    assert (reply.status, reply.json()["error"]["code"]) == (404, "model_not_found")


async def test_a_background_app_cannot_ask_to_be_interactive(
    client: Client, asked: list[Request]
) -> None:
    """The manifest's priority is the best that a request gets; others choose."""
    for headers in (AS_MAIL, AS_CHAT):
        await chat(client, headers, brim={"priority": "interactive"})
    await chat(client, AS_CHAT, brim={"priority": "background"})
    priorities = [request.priority for request in asked]
    assert priorities == [Priority.BACKGROUND, Priority.INTERACTIVE, Priority.BACKGROUND]


async def test_the_apps_overflow_and_context_hold(client: Client, asked: list[Request]) -> None:
    """The manifest's policy is the default of its requests, its context their bound."""
    await chat(client, AS_MAIL)
    await chat(client, AS_MAIL, brim={"overflow": "reject"})
    await chat(client, AS_CHAT)
    assert [each.overflow for each in asked] == ["trim", "reject", "reject"]
    assert [each.max_context_tokens for each in asked] == [100, 100, None]
    body = {"model": "small", "prompt": [1] * 101}
    reply = await client.post("/v1/completions", body, **AS_MAIL)
    assert reply.json()["error"]["code"] == "context_length_exceeded"


async def test_an_apps_prompts_are_its_own(client: Client, asked: list[Request]) -> None:
    """The namespace is the app's name, so a rotated key keeps it, and parts stay below it."""
    named = {"brim": {"cache": {"namespace": "in"}}}
    shared = {"brim": {"cache": {"share": True}}}
    for headers, fields in ((AS_MAIL, {}), (AS_MAIL, named), (AS_CHAT, {}), (AS_MAIL, shared)):
        await chat(client, headers, **fields)
    names = [request.cache_namespace for request in asked]
    assert names == ["app:mail", "app:mail/in", "app:chat", "shared"]


@pytest.mark.parametrize("stream", [False, True])
async def test_what_the_budget_leaves_is_in_a_header(client: Client, stream: bool) -> None:
    """An app with a budget of tokens can count down; one without gets no figure."""
    reply = await chat(client, AS_MAIL, stream=stream)
    assert reply.headers["x-brim-budget-tokens-left"] == "600"
    for headers in (AS_CHAT, {}):
        reply = await chat(client, headers, stream=stream)
        assert "x-brim-budget-tokens-left" not in reply.headers


async def test_usage_is_told_to_the_app_alone(client: Client) -> None:
    """Each app sees its own figures and budgets, and nobody in particular sees none."""
    assert (await client.get("/brim/v1/usage", **AS_MAIL)).json() == {
        "app": "mail",
        "day": "2026-11-22",
        "renews_in_s": 60.0,
        "tokens": {"used": 300, "reserved": 100, "budget": 1000, "left": 600},
        "energy_j": {"used": 1.235, "reserved": 0, "budget": None, "left": None},
        "ssd_write_bytes": {"used": 5, "reserved": 0, "budget": 10**9, "left": None},
        "num_in_flight": 1,
        "max_concurrent": 3,
        "requests_per_minute": None,
    }
    other = (await client.get("/brim/v1/usage", **AS_CHAT)).json()
    assert (other["app"], other["tokens"]["used"]) == ("chat", 7)
    reply = await client.get("/brim/v1/usage")
    assert (reply.status, reply.json()["error"]["code"]) == (401, "invalid_api_key")


@pytest.mark.parametrize(
    ("refusal", "kind", "code", "retries"),
    [
        (RateLimited("3 at once", retry_after_s=1.2), "rate_limit_error", "rate_limit_exceeded", 1),
        (OverBudget("used up", retry_after_s=7000), "insufficient_quota", "insufficient_quota", 0),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_limits_are_429_in_openais_words(
    client: Client,
    runtime: ScriptedRuntime,
    refusal: Exception,
    kind: str,
    code: str,
    retries: int,
    stream: bool,
) -> None:
    """Clients branch on type and code; one that is over its budget is told not to try again."""
    runtime.refusal = refusal
    reply = await chat(client, AS_MAIL, stream=stream)
    error = reply.json()["error"]
    assert (reply.status, error["type"], error["code"]) == (429, kind, code)
    assert reply.headers["retry-after"] == ("2" if retries else "7000")
    assert reply.headers.get("x-should-retry") == (None if retries else "false")


@pytest.mark.parametrize(
    ("pair", "expected"),
    [(("small", "small1"), True), (("small", "other"), False), (None, False)],
)
async def test_only_the_granted_draft_may_answer(
    runtime: ScriptedRuntime,
    asked: list[Request],
    pair: tuple[str, str] | None,
    expected: bool,
) -> None:
    """A model that the settings pair with an app's own is no draft that its manifest accepts."""
    pairs = (Pair(target="small", draft="small1"),)
    app = App(name="a", models=("small", "small1"), pairs=pairs, accepts_draft=True)
    runtime.status_fields = {"pair": pair}
    keeper = Doorkeeper({"brim-a": app}.get, requires_key=False)
    await chat(Client(build_app(runtime, doorkeeper=keeper)), {"x-api-key": "brim-a"})
    assert [each.accepts_draft for each in asked] == [expected]


async def test_what_an_app_shares_is_no_way_around_its_write_budget(
    client: Client, asked: list[Request]
) -> None:
    """The shared namespace is nobody's account: who has a budget keeps it in memory alone."""
    shared = {"brim": {"cache": {"share": True}}}
    for headers, fields in ((AS_MAIL, shared), (AS_MAIL, {}), (AS_CHAT, shared), ({}, shared)):
        await chat(client, headers, **fields)
    assert [each.keeps_on_disk for each in asked] == [False, True, True, True]


async def test_prompts_that_an_app_can_never_have_together_are_refused(
    client: Client, asked: list[Request]
) -> None:
    """Each prompt counts as a request: more of them than the limit would be 429 for ever."""
    reply = await client.post("/v1/completions", {"model": "small", "prompt": ["a"] * 4}, **AS_MAIL)
    error = reply.json()["error"]
    assert (reply.status, error["param"]) == (400, "prompt")
    assert "may send 3 together" in error["message"]
    assert not asked
    for headers, number in ((AS_MAIL, 3), (AS_CHAT, 4)):
        body = {"model": "small", "prompt": ["a"] * number}
        assert (await client.post("/v1/completions", body, **headers)).status == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_errors_name_no_model_that_was_not_granted(
    client: Client, runtime: ScriptedRuntime, stream: bool
) -> None:
    """What stands in a model's way is "another model" to an app that has no business with it."""
    why = "model 'small' has no room while small1 works; wait for a smaller one"
    runtime.refusal = Busy(why, retry_after_s=2)
    reply = await chat(client, AS_MAIL, stream=stream)
    assert reply.status == 503
    assert reply.json()["error"]["message"] == why.replace("small1", "another model")
    assert reply.headers["retry-after"] == "2"
    assert (await chat(client, AS_CHAT, stream=stream)).json()["error"]["message"] == why
    assert runtime.refusal.message == why


async def test_errors_within_a_stream_are_as_discreet(
    client: Client, runtime: ScriptedRuntime
) -> None:
    """Neither does an error that comes after the first byte name another's model."""
    runtime.failure = Busy("small1 took the memory", retry_after_s=2)
    reply = await chat(client, AS_MAIL, stream=True)
    assert reply.events()[-1]["error"]["message"] == "another model took the memory"
