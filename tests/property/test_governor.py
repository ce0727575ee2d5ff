"""The governor's policy under any readings, over models that obey, fail and take their time."""

from collections.abc import Callable
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from brim.config.tree import GovernorSettings
from brim.core.machine import Conditions, Pressure, ThermalState
from brim.core.stance import Stance
from brim.governor.actions import Action, ActionKind
from brim.governor.levels import MEMORY_HOLD_S, POWER_HOLD_S, POWER_MODES, PRESSURES
from brim.governor.policy import (
    DROP_AGAIN_S,
    GROW_AFTER_S,
    LOOK_S,
    UNLOAD_AGAIN_S,
    PolicyState,
    decide,
)
from brim.governor.readings import ModelReading, Readings

GIB = 1024**3
PLAN_TOKENS = 4096


@dataclass
class Model:
    """A model as the runtime would have it."""

    name: str
    is_pinned: bool
    idle_unload_s: float | None
    is_loaded: bool = True
    is_loading: bool = False
    num_in_flight: int = 0
    num_waiting: int = 0
    idle_since_s: float = 0.0
    pool_tokens: int = PLAN_TOKENS
    needed_tokens: int = 0
    changes: list[Callable[[], None]] = field(default_factory=list)
    num_looks_left: int = 0

    def reading(self, at_s: float) -> ModelReading:
        return ModelReading(
            name=self.name,
            is_loaded=self.is_loaded,
            is_loading=self.is_loading,
            num_in_flight=self.num_in_flight,
            num_waiting=self.num_waiting,
            idle_s=0.0 if self.num_in_flight else at_s - self.idle_since_s,
            kv_pool_tokens=self.pool_tokens if self.is_loaded else 0,
            kv_plan_tokens=PLAN_TOKENS,
            kv_needed_tokens=self.needed_tokens,
            kv_token_bytes=1024,
            is_pinned=self.is_pinned,
            idle_unload_s=self.idle_unload_s,
            is_changing=self.num_looks_left > 0,
        )

    def happen(self, what: str, at_s: float) -> None:
        """What clients and loads do to it between two looks."""
        if what == "start" and self.is_loaded:
            self.num_in_flight += 1
            self.needed_tokens = min(PLAN_TOKENS, self.needed_tokens + 700)
            self.pool_tokens = max(self.pool_tokens, self.needed_tokens)
        elif what == "end" and self.num_in_flight:
            self.num_in_flight -= 1
            self.idle_since_s = at_s
            self.needed_tokens = 700 * self.num_in_flight
        elif what == "wait" and not self.is_loaded:
            self.num_waiting, self.is_loading = 1, True
        elif what == "load" and self.is_loading:
            self.num_waiting, self.is_loading, self.is_loaded = 0, False, True
            self.pool_tokens, self.idle_since_s = PLAN_TOKENS, at_s
        if self.num_looks_left:
            self.num_looks_left -= 1
            if not self.num_looks_left:
                self.changes.pop()()

    def obey(self, action: Action) -> None:
        if action.kind is ActionKind.UNLOAD and not self.num_in_flight:
            self.is_loaded, self.pool_tokens, self.needed_tokens = False, 0, 0
        elif action.kind is ActionKind.DROP_IDLE_KV and self.is_loaded:
            self.pool_tokens = max(256, self.needed_tokens)
        elif action.kind is ActionKind.GROW_KV and self.is_loaded:
            self.pool_tokens = PLAN_TOKENS


@dataclass
class Run:
    """Looks at a machine, one after the other, with every rule checked at each."""

    models: dict[str, Model]
    settings: GovernorSettings = field(default_factory=GovernorSettings)
    state: PolicyState = field(default_factory=PolicyState)
    at_s: float = 1000.0
    levels: list[tuple[float, Pressure]] = field(default_factory=list)
    last_s: dict[tuple[ActionKind, str], float] = field(default_factory=dict)
    reached_s: dict[str, float] = field(default_factory=dict)
    not_normal_s: float = 0.0
    last_idle_unload_s: float = -1e9

    def look(self, conditions: Conditions, outcome: str = "obeys", **swapped: float | None) -> None:
        before = self.state.stance
        readings = Readings(
            at_s=self.at_s,
            conditions=conditions,
            ram_bytes=16 * GIB,
            swapped_in_bytes_per_s=swapped.get("moved_in"),
            swapped_out_bytes_per_s=swapped.get("moved_out"),
            models=tuple(model.reading(self.at_s) for model in self.models.values()),
        )
        self.state, actions = decide(self.state, readings, self.settings)
        self._check_levels(before, self.state.stance)
        if self.state.stance.memory is not Pressure.NORMAL:
            self.not_normal_s = self.at_s
        stances = [action for action in actions if action.kind is ActionKind.SET_STANCE]
        assert len(stances) == (before != self.state.stance), "one change is told once"
        seen = {model.name: model for model in readings.models}
        for action in actions:
            assert action.cause
            if action.kind is ActionKind.SET_STANCE:
                assert action.stance == self.state.stance
                continue
            self._check_action(action, seen[action.model])
            self._do(action, outcome)

    def _check_levels(self, before: Stance, after: Stance) -> None:
        """A level stands for its hold before it falls."""
        for name, order, hold_s, old, new in (
            ("memory", PRESSURES, MEMORY_HOLD_S, before.memory, after.memory),
            ("power", POWER_MODES, POWER_HOLD_S, before.power, after.power),
        ):
            if order.index(new) < order.index(old):
                assert self.at_s - self.reached_s[name] >= hold_s
            if new is not old:
                self.reached_s[name] = self.at_s

    def _check_action(self, action: Action, model: ModelReading) -> None:
        key = (action.kind, action.model)
        waited_s = self.at_s - self.last_s.get(key, -1e9)
        is_critical = self.state.stance.memory is Pressure.CRITICAL
        assert not model.is_changing, "never two actions on one model"
        assert model.is_loaded, "nothing is done to a model that is not there"
        if action.kind is ActionKind.UNLOAD:
            assert not (model.num_in_flight or model.num_waiting or model.is_loading)
            assert is_critical or not model.is_pinned
            assert waited_s >= UNLOAD_AGAIN_S
            if not is_critical:
                assert model.idle_unload_s is not None
                assert model.idle_s >= model.idle_unload_s
                assert self.at_s - self.last_idle_unload_s >= LOOK_S
                self.last_idle_unload_s = self.at_s
        elif action.kind is ActionKind.DROP_IDLE_KV:
            assert self.state.stance.memory is not Pressure.NORMAL
            assert model.kv_excess_tokens > 0
            if self.last_s.get(key, -1e9) > self.last_normal_s:
                assert waited_s >= DROP_AGAIN_S
        elif action.kind is ActionKind.GROW_KV:
            assert self.at_s - self.not_normal_s >= GROW_AFTER_S, "no growing soon after pressure"
            assert waited_s >= GROW_AFTER_S
        self.last_s[key] = self.at_s

    @property
    def last_normal_s(self) -> float:
        """When memory was last left at normal: an episode begins after it."""
        return max((at_s for at_s, level in self.levels if level is Pressure.NORMAL), default=-1e9)

    def _do(self, action: Action, outcome: str) -> None:
        model = self.models[action.model]
        if action.kind is ActionKind.ANNOUNCE_LEAVING or outcome == "fails":
            return
        if outcome == "obeys":
            model.obey(action)
        else:
            model.num_looks_left = 3
            model.changes.append(lambda: model.obey(action))

    def move(self, seconds: float) -> None:
        self.levels.append((self.at_s, self.state.stance.memory))
        self.at_s += seconds


def maybe(strategy: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    return st.none() | strategy


CONDITIONS = st.builds(
    Conditions,
    pressure=maybe(st.sampled_from(Pressure)),
    compressor_ratio=maybe(st.sampled_from([0.1, 0.65, 0.9, 1.4, 2.0])),
    stalled_percent=maybe(st.sampled_from([0.0, 7.0, 15.0, 30.0, 60.0])),
    available_bytes=maybe(st.sampled_from([100_000_000, 350_000_000, 600_000_000, 9 * GIB])),
    thermal=maybe(st.sampled_from(ThermalState)),
    is_throttled=maybe(st.booleans()),
    is_low_power=maybe(st.booleans()),
    is_on_battery=maybe(st.booleans()),
    battery_percent=maybe(st.sampled_from([5, 20, 80])),
)
RATES = maybe(st.sampled_from([0.0, 1e6, 50e6]))
HAPPENINGS = st.sampled_from(["nothing", "start", "end", "wait", "load"])
LOOKS = st.lists(
    st.tuples(
        st.sampled_from([0.1, 1.0, 1.0, 4.0, 20.0, 40.0]),
        CONDITIONS,
        RATES,
        RATES,
        st.tuples(HAPPENINGS, HAPPENINGS, HAPPENINGS),
        st.sampled_from(["obeys", "obeys", "fails", "slow"]),
    ),
    min_size=1,
    max_size=40,
)


def models() -> dict[str, Model]:
    return {
        model.name: model
        for model in (
            Model("pinned", is_pinned=True, idle_unload_s=30.0),
            Model("leaves", is_pinned=False, idle_unload_s=30.0),
            Model("stays", is_pinned=False, idle_unload_s=None),
        )
    }


def run_of(looks: list[tuple[float, Conditions, float, float, tuple[str, ...], str]]) -> Run:
    run = Run(models())
    for seconds, conditions, moved_in, moved_out, happenings, outcome in looks:
        for model, what in zip(run.models.values(), happenings, strict=True):
            model.happen(what, run.at_s)
        run.look(conditions, outcome, moved_in=moved_in, moved_out=moved_out)
        run.move(seconds)
    return run


@settings(deadline=None)
@given(LOOKS)
def test_no_rule_is_ever_broken(
    looks: list[tuple[float, Conditions, float, float, tuple[str, ...], str]],
) -> None:
    """Nothing in flight is unloaded, nothing flaps, pinned models go at critical alone."""
    run_of(looks)


NORMAL = {
    "compressor_ratio": 0.1,
    "stalled_percent": 0.0,
    "available_bytes": 9 * GIB,
    "is_throttled": False,
    "is_low_power": False,
    "is_on_battery": False,
    "battery_percent": 80,
}


@settings(deadline=None)
@given(LOOKS, st.lists(st.sets(st.sampled_from(sorted(NORMAL))), min_size=1, max_size=8))
def test_normal_readings_lead_to_everything_being_allowed(
    looks: list[tuple[float, Conditions, float, float, tuple[str, ...], str]],
    missing: list[set[str]],
) -> None:
    """Whatever was before and whatever is missing: the stance of the start, pools as planned."""
    run = run_of(looks)
    # Both holds, what a swap storm echoes, and the longest wait of a pool that was grown in vain.
    for second in range(700):
        left_out = missing[second % len(missing)]
        felt = {name: value for name, value in NORMAL.items() if name not in left_out}
        conditions = Conditions(pressure=Pressure.NORMAL, thermal=ThermalState.NOMINAL, **felt)  # type: ignore[arg-type]
        for model in run.models.values():
            model.happen("nothing", run.at_s)
            model.idle_since_s = run.at_s
        run.look(conditions)
        run.move(1.0)
    assert run.state.stance == Stance()
    for model in run.models.values():
        assert model.pool_tokens in (0, PLAN_TOKENS)


@settings(deadline=None)
@given(st.lists(CONDITIONS, max_size=10))
def test_silence_changes_nothing(looks: list[Conditions]) -> None:
    """Looks at a machine that says nothing leave every level where it is."""
    run = Run(models())
    for conditions in looks:
        run.look(conditions)
        run.move(1.0)
    before = run.state.levels
    for _ in range(60):
        run.look(Conditions())
        run.move(1.0)
    assert run.state.levels.memory == before.memory
    assert run.state.levels.power == before.power
