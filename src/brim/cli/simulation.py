"""`brim serve --simulate`: real server, engines and models on a machine that a scenario describes.

What the scenario says is simulated, and marked so wherever it is shown: the machine's size, what
others use, pressure, heat and power.  What worker processes hold is measured.  A faster clock moves
the scenario, the governor and idle times; models take the time that they take.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from brim.cli.errors import say
from brim.core.plan import Plan
from brim.core.request import Request
from brim.core.stance import Stance
from brim.errors import BrimError, CapacityError
from brim.governor.actuator import Actuator
from brim.governor.readings import ModelReading
from brim.machine.interface import Machine
from brim.machine.reading import machine_at_hand
from brim.machine.scenario import Scenario, ScenarioModel, ScenarioRequest, load_scenario
from brim.machine.simulated import SimulatedMachine
from brim.runtime.api import Runtime
from brim.telemetry.events import log_event

WINDOW_PART = 4
"""A scenario's prompt, and its answer, get one part in this many of a model's window at most: what
it describes is often larger than what is at hand."""

MAX_ATTEMPTS = 50
"""Of one request that is told to come again: more are a scenario that never lets it in."""


class Simulation:
    """A scenario that runs beside a server.

    Args:
        scenario: What happens.
        speed: Seconds of the scenario for each second.
        behind: Answers for processes, such as our workers.
        clock: Real seconds, monotonic.
    """

    def __init__(
        self,
        scenario: Scenario,
        speed: float,
        behind: Machine,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.speed = speed
        self._clock = clock
        self._scenario = scenario
        self._begun_s: float | None = None
        self.machine = SimulatedMachine(scenario, self.now_s, behind=behind)

    def say(self, text: str) -> None:
        """Say something to people, marked as simulated."""
        say(f"simulated: {text}")

    def begin(self) -> None:
        """Let its time run, and say so."""
        name, where = self._scenario.machine.name, self._scenario.where
        self.say(f"{name} by {where}, {self.speed:g} times as fast as real")
        self._begun_s = self._clock()

    def now_s(self) -> float:
        """Seconds since it began; 0 before."""
        if self._begun_s is None:
            return 0.0
        return (self._clock() - self._begun_s) * self.speed

    def staged(self, actuator: Actuator) -> Actuator:
        """The same hands over models that are pinned, and leave, as the scenario says.

        Their idle time passes as fast as the scenario's.
        """
        return _Staged(actuator, self.speed, self._scenario.models)

    async def ask(self, runtime: Runtime, plans: Sequence[Plan]) -> None:
        """Send the scenario's requests, each at its time, to those of its models that are there."""
        by_name = {plan.model.name: plan for plan in plans}
        asked_for = {request.model for request in self._scenario.requests}
        for name in sorted(asked_for - by_name.keys()):
            self.say(f"requests for '{name}' are left out; to serve it, add -m {name}=demo")
        async with asyncio.TaskGroup() as group:
            for number, request in enumerate(self._scenario.requests):
                if request.model in by_name:
                    await self._sleep(request.at_s - self.now_s())
                    asked = _asked(request, number, by_name[request.model])
                    group.create_task(self._answer(runtime, asked))

    async def _answer(self, runtime: Runtime, request: Request) -> None:
        """Have one request answered, as a patient client would."""
        for _ in range(MAX_ATTEMPTS):
            try:
                async for _ in await runtime.submit(request):
                    pass
            except CapacityError as error:
                await self._sleep(error.retry_after_s or 1.0)
            except BrimError as error:
                log_event("simulated_request_refused", model=request.model, reason=error.message)
                return
            else:
                return

    async def _sleep(self, seconds: float) -> None:
        """Seconds of the scenario."""
        await asyncio.sleep(max(0.0, seconds) / self.speed)


def open_simulation(path: Path, speed: float) -> Simulation:
    """The simulation that a file describes.

    Raises:
        ConfigError: The file cannot be read, or is wrong.
    """
    return Simulation(load_scenario(path), speed, machine_at_hand())


def _asked(request: ScenarioRequest, number: int, plan: Plan) -> Request:
    most = max(1, plan.context_tokens // WINDOW_PART)
    # A word of two letters and its space are one token of most vocabularies, and never above two.
    words = " ".join(["so"] * min(request.prompt_tokens, most // 2))
    return Request(
        request_id=f"scenario-{number}",
        model=request.model,
        prompt=words,
        max_tokens=min(request.answer_tokens, most),
        priority=request.priority,
    )


class _Staged:
    """See `Simulation.staged`."""

    def __init__(self, actuator: Actuator, speed: float, models: Sequence[ScenarioModel]) -> None:
        self._actuator = actuator
        self._speed = speed
        self._described = {model.name: model for model in models}

    def models(self) -> tuple[ModelReading, ...]:
        return tuple(self._reading(model) for model in self._actuator.models())

    def _reading(self, model: ModelReading) -> ModelReading:
        idle_s, limit_s, is_pinned = model.idle_s * self._speed, model.idle_unload_s, False
        described = self._described.get(model.name)
        if described is not None:
            is_pinned = described.is_pinned
            limit_s = limit_s if described.idle_unload_s is None else described.idle_unload_s
        return msgspec.structs.replace(
            model,
            idle_s=idle_s,
            is_pinned=model.is_pinned or is_pinned,
            idle_unload_s=limit_s or None,
        )

    async def set_stance(self, stance: Stance) -> None:
        await self._actuator.set_stance(stance)

    async def drop_idle_kv(self, model: str) -> int:
        return await self._actuator.drop_idle_kv(model)

    async def grow_kv(self, model: str) -> None:
        await self._actuator.grow_kv(model)

    async def unload(self, model: str, cause: str) -> bool:
        return await self._actuator.unload(model, cause)

    async def measure(self, model: str) -> int:
        return await self._actuator.measure(model)
