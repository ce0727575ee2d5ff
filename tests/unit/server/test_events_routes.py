"""Event streams: what is told to whom, and what becomes of readers that do not read."""

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from support.scripted import Client, Exchange, ScriptedRuntime, running, settle

from brim.core.app import App
from brim.core.event import Event, EventKind
from brim.core.machine import Pressure
from brim.core.stance import PowerMode, Stance, WorkLimits
from brim.server.app import build_app
from brim.server.auth import Doorkeeper
from brim.server.connection import ABORT
from brim.server.routes import events
from brim.telemetry.event_log import NUM_PENDING

pytestmark = pytest.mark.anyio

APPS = {"brim-mail": App(name="mail", models=("small",)), "brim-chat": App(name="chat")}
AS_MAIL = {"authorization": "Bearer brim-mail"}
SHORT = Stance(
    memory=Pressure.CRITICAL,
    reason="memory is short",
    admits=False,
    loads=False,
    work=WorkLimits(runs_background=False),
)


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "LOOK_S", 0.001)


@pytest.fixture
def apps() -> dict[str, App]:
    return dict(APPS)


@pytest.fixture
def client(runtime: ScriptedRuntime, apps: dict[str, App]) -> Client:
    return Client(build_app(runtime, doorkeeper=Doorkeeper(apps.get, requires_key=False)))


def told(exchange: Exchange) -> list[Any]:
    """Data of the events so far."""
    blocks = b"".join(exchange.parts).decode().split("\n\n")
    return [msgspec.json.decode(b[6:]) for b in blocks if b.startswith("data: ")]


async def until(fact: Callable[[], object]) -> None:
    """Wait for a fact; the test's own limit ends a wait in vain."""
    while not fact():  # noqa: ASYNC110 - what is waited for are facts of the code under test
        await asyncio.sleep(0)


def event(kind: EventKind, **fields: Any) -> Event:
    return Event(at_unix_s=100.0, kind=kind, **fields)


async def test_an_app_is_told_how_things_are_and_then_what_changes(
    client: Client, runtime: ScriptedRuntime
) -> None:
    """The first events say how short memory and power are; later ones come with each change."""
    exchange = client.exchange("GET", "/brim/v1/events", headers=AS_MAIL)
    async with running(exchange):
        await until(lambda: len(told(exchange)) == 2)
        assert [each["kind"] for each in told(exchange)] == ["memory free", "power full"]
        assert exchange.headers["content-type"].startswith("text/event-stream")
        runtime.current_stance = SHORT
        await until(lambda: len(told(exchange)) == 3)
        news = told(exchange)[-1]
        assert (news["kind"], news["level"], news["reason"]) == (
            "memory short",
            "critical",
            "memory is short",
        )
        assert (news["admits"], news["loads"], news["runs_background"]) == (False, False, False)
        assert news["retry_after_s"] == 15.0
        # A reading that moves within the level is no news.
        runtime.current_stance = msgspec.structs.replace(SHORT, reason="1.9 GB are free")
        runtime.event_log.record(event(EventKind.MODEL_LOADED, model="small"))
        await until(lambda: len(told(exchange)) == 4)
        assert told(exchange).pop()["kind"] == "model loaded"
        runtime.current_stance = Stance(power=PowerMode.SAVING, reason="low power mode")
        await until(lambda: len(told(exchange)) == 6)
        assert [each["kind"] for each in told(exchange)[4:]] == ["memory free", "power saving"]
        assert told(exchange)[-1]["level"] == "saving"


async def test_an_app_hears_of_its_own_models_and_budget_alone(
    client: Client, runtime: ScriptedRuntime
) -> None:
    """Other models, other apps' budgets, and causes that name others stay out of its stream."""
    exchange = client.exchange("GET", "/brim/v1/events", headers=AS_MAIL)
    async with running(exchange):
        await until(lambda: len(told(exchange)) == 2)
        for each in (
            event(EventKind.MODEL_UNLOADED, model="other", cause="secret"),
            event(EventKind.BUDGET_EXHAUSTED, app="chat", cause="secret"),
            event(EventKind.IDLE_KV_DROPPED, model="small", cause="secret", before_bytes=1),
            event(EventKind.SERVER_STARTED, cause="secret"),
            event(EventKind.STANCE_CHANGED, cause="secret"),
            event(EventKind.MODEL_UNLOADED, model="small", cause="it gave way to secret"),
            event(EventKind.BUDGET_TIGHTENING, app="mail", cause="80 %", detail={"used": 8}),
        ):
            runtime.event_log.record(each)
        await until(lambda: len(told(exchange)) >= 4)
        await settle()
    unloaded, tightening = told(exchange)[2:]
    assert (unloaded["kind"], unloaded["model"]) == ("model unloaded", "small")
    assert (tightening["kind"], tightening["reason"]) == ("budget tightening", "80 %")
    assert tightening["detail"] == {"used": 8}
    assert b"secret" not in b"".join(exchange.parts)


async def test_nobody_in_particular_hears_of_no_apps_budget(
    client: Client, runtime: ScriptedRuntime
) -> None:
    """A client without a key sees every model, as it may use them, and no app."""
    exchange = client.exchange("GET", "/brim/v1/events")
    async with running(exchange):
        await until(lambda: exchange.parts)
        runtime.event_log.record(event(EventKind.BUDGET_EXHAUSTED, app="mail"))
        runtime.event_log.record(event(EventKind.MODEL_LOADED, model="other"))
        await until(lambda: len(told(exchange)) == 3)
    assert told(exchange)[-1]["model"] == "other"


async def test_the_operator_is_told_everything_that_is_kept_and_then_the_rest(
    client: Client, runtime: ScriptedRuntime
) -> None:
    """History comes first, nothing between it and the present is lost, `since` cuts the old."""
    kept = [
        Event(at_unix_s=float(at), kind=EventKind.MODEL_LOADED, cause=f"{at}") for at in (1, 2, 3)
    ]
    for each in kept:
        runtime.event_log.record(each)
    exchange = client.exchange("GET", "/brim/events")
    exchange._scope["query_string"] = b"since=1"
    async with running(exchange):
        await until(lambda: exchange.parts)
        runtime.event_log.record(event(EventKind.WORKER_DIED, model="small"))
        await until(lambda: len(told(exchange)) == 3)
    assert [each["at_unix_s"] for each in told(exchange)] == [2.0, 3.0, 100.0]
    listing = client.exchange("GET", "/brim/events")
    listing._scope["query_string"] = b"since=2&follow=false"
    (found,) = msgspec.json.decode((await listing.run()).body, type=list[Event])[:1]
    assert found == kept[2]


@pytest.mark.parametrize(
    "query",
    [
        b"since=yesterday",
        b"since=nan&follow=false",
        b"since=1e999&follow=false",
        b"follow=maybe",
        b"since=",
    ],
)
async def test_a_query_that_is_none_is_named(client: Client, query: bytes) -> None:
    """A wrong `since` or `follow` is 400 with its name."""
    exchange = client.exchange("GET", "/brim/events")
    exchange._scope["query_string"] = query
    reply = await exchange.run()
    assert reply.status == 400
    assert reply.json()["error"]["param"] == query.decode().partition("=")[0]


async def test_a_quiet_stream_has_comments(runtime: ScriptedRuntime) -> None:
    """Proxies see a sign of life while nothing happens."""
    client = Client(build_app(runtime, heartbeat_s=0.002))
    exchange = client.exchange("GET", "/brim/events")
    async with running(exchange):
        await until(lambda: exchange.parts.count(b": nothing new\n\n") >= 2)


@pytest.mark.parametrize("path", ["/brim/events", "/brim/v1/events"])
async def test_streams_end_when_the_server_drains(
    client: Client, runtime: ScriptedRuntime, path: str
) -> None:
    """A stopping server does not wait for readers, and a draining one takes none."""
    exchange = client.exchange("GET", path)
    async with running(exchange) as task:
        await until(lambda: exchange.parts)
        runtime.draining = True
        assert (await task).status == 200
    assert (await client.get(path)).status == 503


async def test_a_stream_ends_with_its_app(client: Client, apps: dict[str, App]) -> None:
    """An app whose key is taken away is not told another word."""
    exchange = client.exchange("GET", "/brim/v1/events", headers=AS_MAIL)
    async with running(exchange) as task:
        await until(lambda: exchange.parts)
        del apps["brim-mail"]
        await task


async def test_leaving_ends_a_stream_and_frees_its_place(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One stream more than the bound is 429 until a reader has left."""
    monkeypatch.setattr(events, "MAX_STREAMS_EACH", 1)
    first = client.exchange("GET", "/brim/v1/events", headers=AS_MAIL)
    async with running(first) as task:
        await until(lambda: first.parts)
        assert (await client.get("/brim/v1/events", **AS_MAIL)).status == 429
        other = client.exchange("GET", "/brim/v1/events")
        async with running(other):
            await until(lambda: other.parts)
        first.leave()
        await task
        again = client.exchange("GET", "/brim/v1/events", headers=AS_MAIL)
        async with running(again):
            await until(lambda: again.parts)
            assert again.status == 200


async def test_a_reader_that_stalls_is_cut_off(
    runtime: ScriptedRuntime, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who takes nothing for a while loses the connection; nothing is kept for it."""
    monkeypatch.setattr(events, "STALL_S", 0.005)
    client = Client(build_app(runtime))
    exchange = client.exchange("GET", "/brim/v1/events")
    is_cut = asyncio.Event()
    exchange._scope[ABORT] = is_cut.set

    async def hang(_: bytes) -> None:
        await is_cut.wait()

    exchange.on_send = hang
    async with running(exchange) as task:
        await task
    assert is_cut.is_set()


async def test_a_reader_that_falls_behind_is_cut_off(
    client: Client, runtime: ScriptedRuntime
) -> None:
    """A stream never leaves events out: one that is too slow ends after those it had room for."""
    exchange = client.exchange("GET", "/brim/events")
    async with running(exchange) as task:
        await until(lambda: exchange.parts)
        for _ in range(NUM_PENDING + 1):
            runtime.event_log.record(event(EventKind.MODEL_LOADED, model="small"))
        await task
    assert len(told(exchange)) == NUM_PENDING


async def test_only_the_headers_may_be_asked_for(client: Client) -> None:
    """HEAD ends at once: an endless answer without a body would hold a connection for nothing."""
    reply = await client.exchange("HEAD", "/brim/v1/events").run()
    assert (reply.status, reply.body) == (200, b"")
    assert reply.headers["content-type"].startswith("text/event-stream")
