"""Models as a scenario describes them, under a real governor: nothing is loaded, nothing random.

It keeps the promises that the runtime makes to the governor (`governor.actuator`), and lets a
scenario's requests through as the stance says: refused ones come again after the time they were
told, background waits, a model that is out of memory is loaded when loads are allowed.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from brim.config.tree import GovernorSettings
from brim.core.event import Event, EventKind
from brim.core.request import Priority
from brim.core.stance import Stance
from brim.governor.loop import Governor
from brim.governor.readings import ModelReading
from brim.machine.scenario import Scenario, ScenarioModel, ScenarioRequest
from brim.machine.simulated import SimulatedMachine
from brim.telemetry.event_log import EventLog
from support.virtual_time import run_virtually

RESIZE_S_PER_GB = 1.5
"""What shrinking may take for each gigabyte that is kept."""


@dataclass
class DescribedModel:
    """One model and where it stands."""

    what: ScenarioModel
    idle_unload_s: float | None
    is_loaded: bool = True
    is_loading: bool = False
    pool_tokens: int = 0
    idle_tokens: int = 0
    needed_tokens: int = 0
    num_in_flight: int = 0
    num_waiting: int = 0
    last_used_s: float = 0.0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def footprint_bytes(self) -> int:
        if not self.is_loaded:
            return 0
        kv_bytes = self.pool_tokens * self.what.kv_token_bytes
        return self.what.weights_bytes + self.what.overhead_bytes + kv_bytes


class DescribedRuntime:
    """An `Actuator` over described models.

    Args:
        scenario: The models, and what is asked of them.
        events: Where loads are recorded.
        settings: For idle times that the scenario leaves out.
        clock: Seconds of the scenario.
    """

    def __init__(
        self,
        scenario: Scenario,
        events: EventLog,
        settings: GovernorSettings,
        clock: Callable[[], float],
    ) -> None:
        self._events = events
        self._clock = clock
        self._stance = Stance()
        self._changed = asyncio.Event()
        self.by_name = {
            model.name: DescribedModel(
                model,
                model.idle_unload_s if model.idle_unload_s is not None else settings.idle_unload_s,
                is_loaded=model.is_loaded,
                pool_tokens=model.kv_tokens if model.is_loaded else 0,
            )
            for model in scenario.models
        }
        self.num_refused = self.num_answered = 0

    def models(self) -> tuple[ModelReading, ...]:
        return tuple(self._reading(name, model) for name, model in self.by_name.items())

    async def set_stance(self, stance: Stance) -> None:
        self._stance = stance
        self._changed.set()
        self._changed = asyncio.Event()

    async def drop_idle_kv(self, model: str) -> int:
        found = self.by_name[model]
        kept_bytes = found.needed_tokens * found.what.kv_token_bytes
        await asyncio.sleep(RESIZE_S_PER_GB * kept_bytes / 1e9)
        dropped, found.idle_tokens = found.idle_tokens, 0
        found.pool_tokens = max(found.needed_tokens, 256)
        return dropped

    async def grow_kv(self, model: str) -> None:
        found = self.by_name[model]
        found.pool_tokens = found.what.kv_tokens

    async def unload(self, model: str, cause: str) -> bool:
        found = self.by_name[model]
        if found.num_in_flight:
            return False
        found.is_loaded, found.pool_tokens, found.idle_tokens = False, 0, 0
        return True

    async def measure(self, model: str) -> int:
        return self.by_name[model].footprint_bytes

    async def play(self, requests: tuple[ScenarioRequest, ...]) -> None:
        """Send every request at its time; returns when all of them have been answered."""
        async with asyncio.TaskGroup() as group:
            for request in requests:
                await asyncio.sleep(max(0.0, request.at_s - self._clock()))
                group.create_task(self._ask(request))

    async def _ask(self, request: ScenarioRequest) -> None:
        while not self._stance.admits:
            self.num_refused += 1
            await asyncio.sleep(self._stance.retry_after_s)
        is_background = request.priority is Priority.BACKGROUND
        while is_background and not self._stance.work.runs_background:
            await self._changed.wait()
        model = self.by_name[request.model]
        model.num_waiting += 1
        async with model.lock:
            while not model.is_loaded:
                await self._load(model, request)
        model.num_waiting -= 1
        await self._answer(model, request)

    async def _load(self, model: DescribedModel, request: ScenarioRequest) -> None:
        while not (self._stance.loads and self._stance.admits):
            await self._changed.wait()
        cause = "a request asks for it"
        self._record(EventKind.MODEL_LOADING, model, cause)
        model.is_loading = True
        await asyncio.sleep(model.what.load_s)
        model.is_loading, model.is_loaded = False, True
        model.pool_tokens, model.last_used_s = model.what.kv_tokens, self._clock()
        self._record(EventKind.MODEL_LOADED, model, cause, model.footprint_bytes)

    async def _answer(self, model: DescribedModel, request: ScenarioRequest) -> None:
        bound = self._stance.max_answer_tokens
        if request.priority is Priority.BACKGROUND:
            bound = self._stance.max_background_answer_tokens
        answer_tokens = min(request.answer_tokens, bound or request.answer_tokens)
        tokens = request.prompt_tokens + answer_tokens
        model.num_in_flight += 1
        model.needed_tokens += tokens
        model.pool_tokens = max(model.pool_tokens, model.needed_tokens)
        busy_s = request.prompt_tokens / model.what.prefill_tok_s
        busy_s += answer_tokens / model.what.decode_tok_s
        await asyncio.sleep(busy_s / self._stance.work.pace_fraction)
        model.num_in_flight -= 1
        model.needed_tokens -= tokens
        model.idle_tokens = min(model.pool_tokens - model.needed_tokens, model.idle_tokens + tokens)
        model.last_used_s = self._clock()
        self.num_answered += 1

    def _reading(self, name: str, model: DescribedModel) -> ModelReading:
        is_idle = not model.num_in_flight
        return ModelReading(
            name=name,
            is_loaded=model.is_loaded,
            is_loading=model.is_loading,
            num_in_flight=model.num_in_flight,
            num_waiting=model.num_waiting,
            idle_s=self._clock() - model.last_used_s if is_idle else 0.0,
            resident_bytes=model.footprint_bytes or None,
            kv_pool_tokens=model.pool_tokens,
            kv_plan_tokens=model.what.kv_tokens,
            kv_idle_tokens=model.idle_tokens,
            kv_needed_tokens=model.needed_tokens,
            kv_token_bytes=model.what.kv_token_bytes,
            is_pinned=model.what.is_pinned,
            idle_unload_s=model.idle_unload_s or None,
        )

    def _record(
        self, kind: EventKind, model: DescribedModel, cause: str, after_bytes: int | None = None
    ) -> None:
        event = Event(
            at_unix_s=self._clock(),
            kind=kind,
            cause=cause,
            model=model.what.name,
            after_bytes=after_bytes,
            is_simulated=True,
        )
        self._events.record(event)


@dataclass(frozen=True)
class Sample:
    """One second of a scenario."""

    at_s: float
    others_bytes: int
    model_bytes: dict[str, int]
    stance: Stance


@dataclass(frozen=True)
class Played:
    """What came of a scenario."""

    events: list[Event]
    """Stamped with seconds of the scenario."""
    samples: list[Sample]
    num_answered: int
    num_refused: int
    """Times that a request was told to come again."""


def play(scenario: Scenario, settings: GovernorSettings | None = None) -> Played:
    """Play a whole scenario: the real policy and loop over described models, in virtual time."""
    return run_virtually(_play(scenario, settings or GovernorSettings()))


async def _play(scenario: Scenario, settings: GovernorSettings) -> Played:
    clock = asyncio.get_running_loop().time
    events = EventLog()
    runtime = DescribedRuntime(scenario, events, settings, clock)
    machine = SimulatedMachine(scenario, clock)
    governor = Governor(
        machine.read_signals,
        runtime,
        events,
        settings,
        clock=clock,
        unix_clock=clock,
        ram_bytes=scenario.machine.ram_bytes,
    )
    playing = asyncio.create_task(runtime.play(scenario.requests))
    samples = []
    while clock() < scenario.end_s:
        await governor.step(machine.read_signals())
        footprints = {name: model.footprint_bytes for name, model in runtime.by_name.items()}
        others_bytes = machine.read_machine().others_bytes
        samples.append(Sample(clock(), others_bytes, footprints, governor.stance))
        await asyncio.sleep(1.0)
    await governor.settle()
    await playing
    return Played(events.events(), samples, runtime.num_answered, runtime.num_refused)


def as_line(event: Event) -> dict[str, Any]:
    """An event as a golden file keeps it."""
    fields: dict[str, Any] = msgspec.to_builtins(event)
    fields["at_s"] = round(fields.pop("at_unix_s"), 3)
    if "took_s" in fields:
        fields["took_s"] = round(fields["took_s"], 3)
    return {"at_s": fields.pop("at_s"), **fields}
