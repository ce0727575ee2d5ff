"""A scenario beside a server: its time, its requests, and what is written down."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.looks import loaded
from support.models import plan_for

from brim.apps.registry import Registry
from brim.cli.app import main
from brim.cli.records import open_records
from brim.cli.simulation import Simulation
from brim.core.answer import Delta
from brim.core.event import Event, EventKind
from brim.core.request import Request
from brim.core.stance import Stance
from brim.errors import Busy, NotFound
from brim.governor.readings import ModelReading
from brim.machine.scenario import parse_scenario
from brim.machine.simulated import SimulatedMachine

SCENARIO = """
machine = "M4:10:16"
[[step]]
at_s = 0
[[model]]
name = "toy"
is_pinned = true
idle_unload_s = 45
weights_bytes = 1
kv_tokens = 8
kv_token_bytes = 2
[[model]]
name = "absent"
weights_bytes = 1
kv_tokens = 8
kv_token_bytes = 2
[[request]]
at_s = 2
model = "toy"
prompt_tokens = 3
answer_tokens = 4
[[request]]
at_s = 3
model = "absent"
prompt_tokens = 3
answer_tokens = 4
[[request]]
at_s = 4
model = "toy"
prompt_tokens = 100_000
answer_tokens = 100_000
"""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def simulated(speed: float) -> Simulation:
    scenario = parse_scenario(SCENARIO, where="x.toml")
    return Simulation(scenario, speed, SimulatedMachine(scenario, lambda: 0.0))


class Answers:
    """A runtime that refuses so many requests before it takes one."""

    def __init__(self, *refusals: Exception) -> None:
        self.refusals = list(refusals)
        self.asked: list[Request] = []

    async def submit(self, request: Request) -> AsyncIterator[list[Delta]]:
        self.asked.append(request)
        if self.refusals:
            raise self.refusals.pop(0)

        async def answer() -> AsyncIterator[list[Delta]]:
            yield []

        return answer()


@pytest.mark.anyio
async def test_requests_go_to_models_that_are_served(capsys: pytest.CaptureFixture[str]) -> None:
    """Each at its time, bounded by its window; those of other models are left out, and so told."""
    runtime = Answers()
    await simulated(1e6).ask(runtime, [plan_for("toy")])  # type: ignore[arg-type]
    first, second = runtime.asked
    assert (first.model, first.prompt, first.max_tokens) == ("toy", "so so so", 4)
    assert second.prompt is not None
    assert (len(second.prompt.split()), second.max_tokens) == (512 // 8, 512 // 4)
    told = "brim: simulated: requests for 'absent' are left out; to serve it, add -m absent=demo\n"
    assert capsys.readouterr().err == told


@pytest.mark.anyio
async def test_a_request_comes_again_when_it_is_told_to() -> None:
    """A refusal that time mends is waited out; another is given up with a word."""
    runtime = Answers(Busy("not now", retry_after_s=15.0), NotFound("no such model"))
    await simulated(1e6).ask(runtime, [plan_for("toy")])  # type: ignore[arg-type]
    assert len({request.request_id for request in runtime.asked}) == 2
    assert len(runtime.asked) == 3


def test_its_time_runs_from_when_it_begins() -> None:
    """Nothing happens before, and then a second is as many as the speed says."""
    now_s = 100.0
    scenario = parse_scenario(SCENARIO, where="x.toml")
    behind = SimulatedMachine(scenario, lambda: 0.0)
    simulation = Simulation(scenario, 20.0, behind, clock=lambda: now_s)
    assert simulation.now_s() == 0.0
    simulation.begin()
    now_s += 3.0
    assert simulation.now_s() == 60.0


class Hands:
    def models(self) -> tuple[ModelReading, ...]:
        return tuple(loaded(name, idle_s=4.0, idle_unload_s=180.0) for name in ("toy", "other"))

    async def set_stance(self, stance: Stance) -> None:
        raise NotImplementedError

    async def drop_idle_kv(self, model: str) -> int:
        return 7

    async def grow_kv(self, model: str) -> None:
        raise NotImplementedError

    async def unload(self, model: str, cause: str) -> bool:
        return (model, cause) == ("chat", "idle")

    async def measure(self, model: str) -> int:
        return 9


def test_models_are_pinned_and_idle_as_the_scenario_has_it() -> None:
    """The governor sees models as described, idle for longer; what it does reaches real ones."""
    staged = simulated(20.0).staged(Hands())
    toy, other = staged.models()
    assert (toy.idle_s, toy.is_pinned, toy.idle_unload_s) == (80.0, True, 45.0)
    assert (other.idle_s, other.is_pinned, other.idle_unload_s) == (80.0, False, 180.0)

    async def act() -> tuple[int, bool, int]:
        unloaded = await staged.unload("chat", "idle")
        return await staged.drop_idle_kv("chat"), unloaded, await staged.measure("chat")

    assert asyncio.run(act()) == (7, True, 9)


def test_what_happens_is_kept_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A server's start and end frame its events; each of the others is one line on stderr."""
    apps = Registry(tmp_path / "apps.sqlite")
    with open_records(tmp_path, apps, is_simulated=True) as records:
        records.events.record(
            Event(
                at_unix_s=1.0,
                kind=EventKind.KV_SHRUNK,
                model="chat",
                cause="the system reports warning pressure",
                before_bytes=9,
                after_bytes=4,
                detail={"dropped_tokens": 3},
                is_simulated=True,
            )
        )
    apps.close()
    kinds = [event.kind for event in records.events.events()]
    assert kinds == [EventKind.SERVER_STARTED, EventKind.KV_SHRUNK, EventKind.SERVER_STOPPED]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(
        'kv_shrunk model=chat cause="the system reports warning pressure" '
        "before_bytes=9 after_bytes=4 dropped_tokens=3 simulated=True"
    )


def test_wrong_simulations_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """A speed without a scenario is bad usage; a scenario that is not there cannot be served."""
    assert main(["serve", "--simulate-speed", "3"]) == 2
    assert "give one with --simulate FILE" in capsys.readouterr().err
    assert main(["serve", "--simulate", "none.toml"]) == 1
    assert "the scenario none.toml cannot be read" in capsys.readouterr().err
