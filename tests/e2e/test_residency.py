"""Models that share memory: evicted, loaded on demand, waited for, and never overcommitted.

Workers are real; only the machine's size and what the models are said to need are made up.
"""

import asyncio
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from conftest import require_engine
from support.heavy import GB, LONG, CountingAccount, Readings, heavy, patience, roomy
from support.heavy import heavy_serving as serving
from support.models import DEMO
from support.serving import (
    ENDLESS,
    MACHINE,
    ask,
    collect,
    request,
    settings_with,
    text_of,
    toy_plan,
    until,
)

from brim.cli.serving import fitted
from brim.config.tree import ModelSettings, Settings
from brim.core.answer import FinishReason
from brim.core.event import EventKind
from brim.core.machine import MachineSpec
from brim.core.model import ModelSpec
from brim.core.plan import Plan
from brim.core.units import gib
from brim.errors import Busy, DoesNotFit, EngineError, ModelFileError, Unauthorized
from brim.ledger.account import Account
from brim.ledger.entry import Phase
from brim.ledger.history import ForecastHistory
from brim.planner.fit import Room
from brim.planner.plan import make_plan
from brim.registry.describe import describe_gguf
from brim.runtime import gateway as gateway_module
from brim.runtime import quarantine, residency
from brim.runtime.api import ModelState
from brim.runtime.forecast_errors import subject_of
from brim.runtime.gateway import Gateway
from brim.runtime.quarantine import Quarantine

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_blocking")]


@pytest.fixture
def demo() -> ModelSpec:
    """The embedded model; read here, because files block the loop."""
    require_engine("llamacpp")
    return describe_gguf(DEMO)


def states(gateway: Gateway) -> list[str]:
    return [status.state.value for status in gateway.models()]


async def test_the_least_recently_used_idle_model_gives_way() -> None:
    """A third model is left out at the start; asked for, it takes the place of the oldest."""
    async with serving(heavy("a"), heavy("b"), heavy("c")) as (gateway, account):
        assert states(gateway) == ["ready", "ready", "unloaded"]
        assert "its first request loads it" in gateway.models()[2].reason
        assert set(gateway.grants()) == {"a", "b"}
        for name in ("b", "a"):
            await ask(gateway, request(model=name))
        assert await ask(gateway, request(model="c"))
        assert states(gateway) == ["ready", "unloaded", "ready"]
        evicted = gateway.models()[1]
        assert (evicted.pid, evicted.resident_bytes, evicted.entry) == (None, None, None)
        assert evicted.reason == "it gave way to c; its next request loads it again"
        assert await ask(gateway, request(model="b"))
        assert states(gateway) == ["unloaded", "ready", "ready"]
        assert account.num_grants == {"a": 1, "b": 2, "c": 1}
        assert [entry.phase for entry in account.entries()] == [Phase.LOADED] * 2


async def test_an_answer_that_runs_is_finished_before_its_model_gives_way() -> None:
    """While both others answer, a third waits for the end of one of them, and is served then."""
    async with serving(*map(roomy, "abc")) as (gateway, _):
        working = [await gateway.submit(request(model=name, max_tokens=LONG)) for name in "ab"]
        waiting = asyncio.ensure_future(ask(gateway, request(model="c")))
        for answer in working:
            assert len(text_of((await collect(answer))[0])) == LONG
        assert await waiting


async def test_who_waits_longer_than_the_setting_is_told_what_for() -> None:
    """While both others answer for longer than that: 503, who works, and when to come again."""
    async with serving(*map(roomy, "abc"), settings=patience(0.2)) as (gateway, _):
        working = [await gateway.submit(request(model=name, max_tokens=ENDLESS)) for name in "ab"]
        with pytest.raises(Busy, match="model 'c' has no room while a, b works") as caught:
            await gateway.submit(request(model="c"))
        assert caught.value.retry_after_s is not None
        for answer in working:
            answer.cancel()
        assert await ask(gateway, request(model="a")), "nobody waits for its place any more"


async def test_as_few_models_as_needed_give_way() -> None:
    """A large model takes the place of two; a small one of one."""
    async with serving(heavy("a"), heavy("b"), heavy("large", 9 * GB)) as (gateway, _):
        assert await ask(gateway, request(model="large"))
        assert states(gateway) == ["unloaded", "unloaded", "ready"]
        assert await ask(gateway, request(model="a"))
        assert states(gateway) == ["ready", "unloaded", "unloaded"]


async def test_one_load_serves_everybody_who_waits_for_it() -> None:
    """Eight requests for a model that is out of memory load it once."""
    async with serving(*map(heavy, "abc")) as (gateway, account):
        texts = await asyncio.gather(*(ask(gateway, request(model="c")) for _ in range(8)))
        assert len(set(texts)) == 1
        assert account.num_grants["c"] == 1


async def test_a_request_that_comes_while_the_server_starts_is_served() -> None:
    """It waits for the load that is under way; nothing is loaded twice."""
    account = CountingAccount()
    gateway = Gateway(
        [heavy("a"), heavy("b")], settings=Settings(), account=account, read_machine=Readings()
    )
    starting = asyncio.ensure_future(gateway.start())
    try:
        texts = await asyncio.gather(*(ask(gateway, request(model=name)) for name in "abab"))
        assert all(texts)
        await starting
        assert account.num_grants == {"a": 1, "b": 1}
    finally:
        await asyncio.wait([starting])
        await gateway.stop()


async def test_a_start_that_takes_long_is_said() -> None:
    """A request is told that the model is being loaded, and nothing else happens."""
    gateway = Gateway(
        [heavy("a")],
        settings=patience(0.01),
        account=Account(),
        read_machine=Readings(15 * GB),
    )
    starting = asyncio.ensure_future(gateway.start(wait_s=60.0))
    with pytest.raises(Busy, match="model 'a' is being loaded; try again in 5 s"):
        await gateway.submit(request(model="a"))
    starting.cancel()
    await asyncio.wait([starting])
    with pytest.raises(Busy, match="shutting down"):
        await gateway.submit(request(model="a"))


async def test_a_client_that_leaves_does_not_stop_a_load_that_others_wait_for() -> None:
    """The first who asked is gone, the second is served by the same load."""
    async with serving(*map(heavy, "abc")) as (gateway, account):
        leaving = asyncio.ensure_future(gateway.submit(request(model="c")))
        staying = asyncio.ensure_future(ask(gateway, request(model="c")))
        await until(lambda: "c" in account)
        leaving.cancel()
        await asyncio.wait([leaving])
        assert await staying
        assert account.num_grants["c"] == 1


async def test_models_that_are_asked_for_in_turn_are_all_answered() -> None:
    """Three clients of three models where two have room: each gets its answers, one by one."""
    async with serving(*map(heavy, "abc")) as (gateway, account):

        async def client(name: str) -> None:
            for _ in range(3):
                while True:
                    try:
                        await ask(gateway, request(model=name, max_tokens=5))
                        break
                    except Busy:
                        await asyncio.sleep(0.01)

        await asyncio.gather(*map(client, "abc"))
        assert account.charged_bytes == 10 * GB


async def test_a_model_that_cannot_be_loaded_on_demand_gives_its_memory_back() -> None:
    """The client gets the engine's error, the grant is gone, the others go on.

    The third failure quarantines it.
    """
    require_engine("llamacpp")
    broken = heavy("broken", exact=False)
    model = msgspec.structs.replace(broken.model, paths=(__file__,), format="gguf")
    broken = msgspec.structs.replace(broken, engine="llamacpp", model=model)
    async with serving(heavy("a"), heavy("b"), broken) as (gateway, account):
        for _ in range(2):
            with pytest.raises(ModelFileError):
                await gateway.submit(request(model="broken"))
        assert gateway.models()[2].state is ModelState.UNLOADED
        assert gateway.models()[2].reason.startswith("it could not be loaded: ")
        assert "broken" not in account
        assert await ask(gateway, request(model="a"))
        with pytest.raises(ModelFileError):
            await gateway.submit(request(model="broken"))
        assert await ask(gateway, request(model="b"))
        assert gateway.models()[2].state is ModelState.QUARANTINED
        num_grants = dict(account.num_grants)
        with pytest.raises(EngineError, match="3 times in a row; start brim again"):
            await gateway.submit(request(model="broken"))
        assert account.num_grants == num_grants, "no other model gave way to it once more"


async def test_a_model_in_quarantine_gives_its_memory_and_stays_there() -> None:
    """It has no process to evict; another takes its place, and no request brings it back."""
    settings = settings_with(restart_backoff_s=0.01, deaths_before_quarantine=1)
    async with serving(*map(heavy, "abc"), settings=settings) as (gateway, account):
        pid = gateway.models()[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await until(lambda: gateway.models()[0].state is ModelState.QUARANTINED)
        assert await ask(gateway, request(model="c"))
        assert {entry.name for entry in account.entries()} == {"b", "c"}
        with pytest.raises(EngineError, match=r"quarantined: .*SIGKILL"):
            await gateway.submit(request(model="a"))
        assert states(gateway) == ["quarantined", "ready", "ready"]


async def test_a_model_in_quarantine_is_loaded_anew_once_that_is_due(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its memory was given to another meanwhile, which gives way as to any other model."""
    monkeypatch.setattr(quarantine, "FIRST_WAIT_S", 0.0)
    settings = settings_with(restart_backoff_s=0.01, deaths_before_quarantine=1)
    async with serving(*map(heavy, "abc"), settings=settings) as (gateway, account):
        os.kill(gateway.models()[0].pid or pytest.fail(), signal.SIGKILL)
        await until(lambda: gateway.models()[0].state is ModelState.QUARANTINED)
        assert await ask(gateway, request(model="c"))
        assert "a" not in account
        assert await ask(gateway, request(model="a"))
        assert gateway.models()[0].state is ModelState.READY
        assert len(list(account.entries())) == 2


async def test_a_file_that_was_mended_is_loaded_after_its_quarantine(
    demo: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loads that failed in a row are tried once more when that is due, and no sooner."""
    path = tmp_path / "model.gguf"
    await asyncio.to_thread(path.write_bytes, b"no model")
    model = msgspec.structs.replace(demo, name="broken", paths=(str(path),))
    broken = make_plan(model, MACHINE, engine="llamacpp", context_tokens=256)
    settings = settings_with(deaths_before_quarantine=2)
    async with serving(heavy("a", 6 * GB), heavy("b", 6 * GB), broken, settings=settings) as (
        gateway, _,
    ):  # fmt: skip
        for _ in range(2):
            with pytest.raises(ModelFileError):
                await gateway.submit(request(model="broken"))
        with pytest.raises(EngineError, match=r"2 times in a row; .* in 5 min or later"):
            await gateway.submit(request(model="broken"))
        [event] = [e for e in gateway.event_log.events() if e.kind is EventKind.MODEL_QUARANTINED]
        assert event.detail["tried_again_in_s"] == pytest.approx(300, abs=5)
        monkeypatch.setattr(Quarantine, "is_due", property(lambda quarantine: quarantine.is_on))
        with pytest.raises(ModelFileError):
            await gateway.submit(request(model="broken"))
        assert gateway.models()[2].state is ModelState.QUARANTINED
        assert "in 10 min or later" in gateway.models()[2].reason
        await asyncio.to_thread(shutil.copy, DEMO, path)
        assert await ask(gateway, request(model="broken"))
        assert gateway.models()[2].state is ModelState.READY


async def test_who_waits_for_a_restart_when_the_server_stops_is_told_that() -> None:
    """503 and to send it again, like everybody else, not that the model is at fault."""
    settings = settings_with(restart_backoff_s=60.0)
    async with serving(heavy("a"), settings=settings) as (gateway, _):
        pid = gateway.models()[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await until(lambda: gateway.models()[0].state is ModelState.RESTARTING)
        waiting = asyncio.ensure_future(gateway.submit(request(model="a")))
        for _ in range(3):
            await asyncio.sleep(0)
        await gateway.stop()
        with pytest.raises(Busy, match="shutting down"):
            await waiting


async def test_a_forced_request_has_its_model_loaded_where_it_does_not_fit() -> None:
    """Idle models give way first; beside those that work it is forced in, where that is allowed.

    Who waited for it before, and would not have forced it, is served with it.
    """
    settings = Settings(models=ModelSettings(allow_force=True))
    async with serving(*map(roomy, "abc"), settings=settings) as (gateway, account):
        assert await ask(gateway, request(model="c", force=True))
        assert not account.entry("c").is_forced
        names = [status.name for status in gateway.models() if status.state is ModelState.READY]
        working = [await gateway.submit(request(model=n, max_tokens=ENDLESS)) for n in names]
        [left] = {"a", "b", "c"} - {*names}
        patient = asyncio.ensure_future(ask(gateway, request(model=left)))
        forced = asyncio.ensure_future(ask(gateway, request(model=left, force=True)))
        assert await patient == await forced
        assert account.entry(left).is_forced
        for answer in working:
            answer.cancel()


async def test_stopping_while_a_model_is_being_loaded_tells_those_who_wait() -> None:
    """They get an error of ours, and nothing is left running or granted."""
    async with serving(*map(heavy, "abc")) as (gateway, account):
        waiting = asyncio.ensure_future(gateway.submit(request(model="c")))
        await until(lambda: "c" in account)
        await gateway.stop()
        with pytest.raises(Busy, match="shutting down"):
            await waiting


async def test_a_start_waits_for_memory_that_others_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait is said once, with the reason, and the model is loaded when there is room."""
    monkeypatch.setattr(residency, "WAIT_POLL_S", 0.01)
    readings, said = Readings(15 * GB), list[str]()

    def say(text: str) -> None:
        said.append(text)
        readings.others_bytes = 3 * GB

    async with serving(heavy("a"), read_machine=readings, say=say, wait_s=20.0) as (gateway, _):
        assert states(gateway) == ["ready"]
    assert len(said) == 1
    assert said[0].startswith("waiting for memory, 20 s at most: a needs 4.66 GiB")


@pytest.mark.parametrize(("weights_bytes", "wait_s"), [(5 * GB, 0.05), (50 * GB, 1000.0)])
async def test_a_wait_ends(
    weights_bytes: int, wait_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its limit with a refusal; at once where no waiting would help."""
    monkeypatch.setattr(residency, "WAIT_POLL_S", 0.01)
    with pytest.raises(DoesNotFit, match="a needs"):
        async with serving(
            heavy("a", weights_bytes), read_machine=Readings(15 * GB), wait_s=wait_s
        ):
            pytest.fail("it was started")


@pytest.fixture
def often_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_module, "READ_PERIOD_S", 0.01)
    monkeypatch.setattr(gateway_module, "MEASURE_PERIOD_S", 0.01)


def measured(gateway: Gateway) -> Callable[[], bool]:
    def is_measured() -> bool:
        entry = gateway.models()[0].entry
        return entry is not None and entry.measured_bytes is not None

    return is_measured


@pytest.mark.parametrize("allow_force", [False, True])
@pytest.mark.usefixtures("often_read")
async def test_a_request_without_memory_is_refused_unless_forced(allow_force: bool) -> None:
    """Others took what the model was granted: 503 with the bytes; force passes where allowed."""
    readings = Readings()
    settings = Settings(models=ModelSettings(allow_force=allow_force))
    plan = heavy("toy", 1 * GB, 8 * GB)
    async with serving(plan, read_machine=readings, settings=settings) as (gateway, _):
        await until(measured(gateway))
        assert await ask(gateway, request())
        readings.others_bytes = 14_990_000_000
        await until(lambda: (gateway.statement() or pytest.fail()).others_bytes > 14 * GB)
        with pytest.raises(Busy, match=r"other programs hold memory .* GiB are missing") as caught:
            await gateway.submit(request(max_tokens=400))
        assert caught.value.retry_after_s is not None
        assert ("force" in caught.value.message) is allow_force
        if allow_force:
            assert await ask(gateway, request(max_tokens=400, force=True))
        else:
            with pytest.raises(Unauthorized, match=r"models\.allow_force"):
                await gateway.submit(request(force=True))
        readings.others_bytes = 3 * GB
        await until(lambda: (gateway.statement() or pytest.fail()).others_bytes == 3 * GB)
        assert await ask(gateway, request(max_tokens=400))


@pytest.mark.usefixtures("often_read")
async def test_memory_that_went_while_a_request_waited_is_noticed() -> None:
    """A request that nothing was done for is ended, as it would be refused if it came now."""
    readings = Readings()
    plan = heavy("toy", 1 * GB, 8 * GB, context_tokens=2 * ENDLESS, kv_tokens=2 * ENDLESS)
    async with serving(plan, read_machine=readings) as (gateway, _):
        await until(measured(gateway))
        running = await gateway.submit(request(max_tokens=ENDLESS + ENDLESS // 2))
        waiting = [await gateway.submit(request(max_tokens=ENDLESS)) for _ in range(2)]
        assert gateway.models()[0].num_waiting == 2
        readings.others_bytes = 14_990_000_000
        for answer in waiting:
            error = (await collect(answer))[0][-1].error
            assert error is not None
            assert error.kind == "Busy"
            assert "other programs hold memory" in error.message
        running.cancel()


async def test_force_never_passes_the_pool() -> None:
    """A forced request that no pool could hold is refused like any other."""
    settings = Settings(models=ModelSettings(allow_force=True))
    plan = toy_plan(context_tokens=256, kv_tokens=512, max_sequences=4)
    async with serving(plan, settings=settings) as (gateway, _):
        with pytest.raises(Exception, match="the whole pool has 512"):
            await gateway.submit(request(max_tokens=200, num_choices=4, force=True))


@pytest.mark.usefixtures("often_read")
async def test_a_process_is_held_against_its_forecast_once_its_context_was_filled() -> None:
    """A short answer touches little and proves nothing; one that fills the window counts."""
    async with serving(heavy("toy", 1 * GB, context_tokens=256)) as (gateway, _):
        await ask(gateway, request(max_tokens=5))
        await until(measured(gateway))
        assert "total_bytes" not in [each.term for each in gateway.models()[0].forecast_errors]
        await ask(gateway, request(max_tokens=230))
        await until(lambda: len(gateway.models()[0].forecast_errors) == 4)
        total = gateway.models()[0].forecast_errors[-1]
    assert (total.term, total.planned_bytes) == ("total_bytes", 1 * GB)
    assert 0 < total.measured_bytes < 1 * GB
    assert total.error_percent is not None
    assert total.error_percent > 0


@pytest.mark.usefixtures("often_read")
async def test_what_a_load_took_is_kept_and_counted_in(tmp_path: Path, demo: ModelSpec) -> None:
    """Each term of the demo's load is recorded, shown, and charged with the next load."""
    path = tmp_path / "forecasts.sqlite"
    real = make_plan(demo, MACHINE, engine="llamacpp", max_sequences=2)
    half = msgspec.structs.replace(real.memory, kv_bytes=real.memory.kv_bytes // 2)
    plan = msgspec.structs.replace(real, memory=half)
    name = plan.model.name
    async with serving(plan, history=ForecastHistory(path)) as (gateway, _):
        await ask(gateway, request(model=name, prompt="def f(", max_tokens=5))
        await until(lambda: len(gateway.models()[0].forecast_errors) >= 3)
        errors = {each.term: each for each in gateway.models()[0].forecast_errors}
    assert errors["weights_bytes"].error_percent == pytest.approx(0.0, abs=0.1), (
        "the log has 0.01 MiB"
    )
    assert errors["kv_bytes"].error_percent == pytest.approx(-50.0, abs=0.1)
    # The process as a whole joins them where half of the cache makes it larger than was planned.
    assert set(errors) - {"total_bytes"} == {"weights_bytes", "kv_bytes", "compute_bytes"}
    store = ForecastHistory(path)
    ratios = await asyncio.to_thread(store.past_errors, subject_of(plan, MACHINE))
    await asyncio.to_thread(store.close)
    assert ratios.ratios["kv_bytes"] == pytest.approx((2.0,), abs=0.01)
    async with serving(plan, history=ForecastHistory(path)) as (gateway, account):
        grant = gateway.grants()[name]
        assert grant.planned_bytes == half.total_bytes < grant.asked_bytes
        assert account.entry(name).terms.kv_bytes == pytest.approx(half.kv_bytes * 1.25, abs=2)


async def test_only_a_wrong_measurement_in_the_way_is_worn_out_by_asking(tmp_path: Path) -> None:
    """A history that alone refuses a model lets it in after some tries, without any load."""
    path = tmp_path / "forecasts.sqlite"
    plan = heavy("a", 11 * GB)
    store = ForecastHistory(path)
    terms = {"weights_bytes": (11 * GB, 90 * GB)}
    await asyncio.to_thread(store.record, subject_of(plan, MACHINE), "wrong", terms)
    num_refused = 0
    while True:
        try:
            async with serving(plan, history=store):
                break
        except DoesNotFit:
            num_refused += 1
            assert num_refused < 50
    assert num_refused > 0


@pytest.mark.parametrize("flexible", [True, False])
async def test_a_context_that_nobody_asked_for_gives_way(flexible: bool, demo: ModelSpec) -> None:
    """Where the default does not fit comfortably the demo gets less, and it is said; never more."""
    plan = make_plan(demo, MACHINE, engine="llamacpp", max_sequences=4)
    name, said = plan.model.name, list[str]()
    free = plan.memory.total_bytes - 2 * 2**20
    machine = msgspec.structs.replace(MACHINE, others_bytes=15_000_000_000 - free)
    options = {"read_machine": lambda: machine, "say": said.append}
    if not flexible:
        with pytest.raises(DoesNotFit):
            async with serving(plan, **options):
                pytest.fail("it was started")
        return
    async with serving(plan, fit=fitted, **options) as (gateway, _):
        loaded = gateway.models()[0].plan
        assert loaded.memory.total_bytes <= free
        assert loaded.context_tokens <= plan.context_tokens
        assert (loaded.context_tokens, loaded.kv_type_k) != (plan.context_tokens, plan.kv_type_k)
        answers = await collect(
            await gateway.submit(request(model=name, prompt="def f(", max_tokens=5))
        )
        assert answers[0][-1].finish_reason is FinishReason.LENGTH
    assert loaded.context_tokens == plan.context_tokens
    assert said == [
        f"{name}: {gib(plan.memory.total_bytes)} for a context of "
        f"{plan.context_tokens} with f16 KV is more than fits comfortably, so it gets "
        f"{loaded.kv_type_k} KV, {gib(loaded.memory.total_bytes)} in all"
    ]


async def test_a_context_that_was_made_shorter_is_said_and_in_every_answer() -> None:
    """The operator is told at the start, with the flag that asks for more; clients by the plan."""
    said = list[str]()

    def fit(wish: Plan, machine: MachineSpec, room: Room) -> Plan:
        return msgspec.structs.replace(heavy("a", 4 * GB), context_tokens=256)

    wish = heavy("a", 12 * GB)
    async with serving(wish, fit=fit, say=said.append) as (gateway, _):
        answer = await gateway.submit(request(model="a"))
        assert answer.plan.context_tokens == gateway.models()[0].plan.context_tokens == 256
        await collect(answer)
    assert len(said) == 1
    assert said[0].endswith("it gets a context of 256, 3.73 GiB in all; --ctx asks for more")
