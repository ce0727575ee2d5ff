"""What to do about what was read: pure, so that every rule of it can be tested as a table.

    warning    smaller chunks, bounded background answers, no loads for a while; every pool that is
               larger than what runs needs shrinks, and its idle sequences go
    critical   nothing new is admitted, background is held; idle models leave, the least recently
               used first and pinned ones last, busy ones when their answers have ended
    cleared    everything is allowed; pools grow back where they are used, after a steady time
    idle       a model leaves after its idle time, announced before, one at a look; pinned ones stay
    heat, low power, battery    slower and shorter work (see `stances`)

An action that changed nothing is tried again, each time later.  Nothing in flight is ever cut.
"""

from dataclasses import dataclass, field, replace
from typing import TypeVar

from brim.config.tree import GovernorSettings
from brim.core.machine import Pressure
from brim.core.stance import Stance
from brim.governor.actions import Action, ActionKind
from brim.governor.hold import Hold
from brim.governor.levels import Levels
from brim.governor.readings import ModelReading, Readings
from brim.governor.stances import same_rules, stance_for

L = TypeVar("L")

LOADS_AFTER_S = 30.0
"""A warning that has stood for this long without becoming critical is how the machine is used: the
account, which reads what others hold before each load, decides again."""

DROP_AGAIN_S = 10.0
"""Between two shrinkings of one pool in one episode; one costs up to 1.5 s for each GB kept."""

MAX_DROP_AGAIN_S = 160.0

DROP_IDLE_S = 20.0
"""A pool that grew back belongs to a conversation that goes on: people take so long for their next
words.  At a warning it shrinks again when nobody has spoken for longer, or after another minute."""

EXCESS_PART = 8
"""A pool is made anew for one part in this many of its plan at least: less is not worth a pause."""

GROW_AFTER_S = 30.0
"""Of normal readings before pools grow back: three times the hold of the level, so that the memory
that others gave back is still there when it is taken."""

MAX_GROW_AFTER_S = 480.0
FORGIVE_AFTER_S = 600.0
"""Growing that brought pressure back is waited for twice as long, until ten minutes were quiet."""

IN_USE_S = 60.0
"""A model that was used in the last minute is likely to be used again before its idle time."""

UNLOAD_AGAIN_S = 2.0
MAX_UNLOAD_AGAIN_S = 60.0

LOOK_S = 1.0
"""Between two actions of which the first may already have been enough: by the next second the
system's figures show it."""

PINNED_AFTER_S = 2.0
"""Of critical readings before pinned models go: the others' memory has come back by then."""

LEAVING_LEAD_S = 30.0
"""Between the announcement that an idle model leaves and its leaving; half of an idle time that is
shorter than twice this."""


MAX_DOUBLINGS = 10
"""Far beyond every longest wait, and far below where a float ends."""


@dataclass(frozen=True, slots=True)
class Tried:
    """Attempts at one kind of action on one model."""

    num_vain: int = 0
    """In a row that changed nothing."""
    next_s: float = 0.0
    """Not before."""
    pending: int | None = None
    """What the figure that it should change was, until the next look shows what became of it."""

    def issued(self, at_s: float, figure: int, *, wait_s: float, max_wait_s: float) -> "Tried":
        """After one more attempt."""
        wait_s = min(wait_s * 2 ** min(self.num_vain, MAX_DOUBLINGS), max_wait_s)
        return replace(self, next_s=at_s + wait_s, pending=figure)

    def seen(self, *, has_worked: bool) -> "Tried":
        """After a look at what became of the attempt."""
        return replace(self, pending=None, num_vain=0 if has_worked else self.num_vain + 1)


@dataclass(frozen=True, slots=True)
class Record:
    """What was done with one model."""

    drop: Tried = Tried()
    excess_tokens: int = 0
    """Of its pool after it last shrank in this episode: what it cannot do without."""
    grow: Tried = Tried()
    unload: Tried = Tried()
    is_announced: bool = False


@dataclass(frozen=True, slots=True)
class PolicyState:
    """Everything that the policy remembers."""

    levels: Levels = field(default_factory=Levels)
    stance: Stance = field(default_factory=Stance)
    records: dict[str, Record] = field(default_factory=dict)
    last_unload_s: float | None = None
    last_grow_s: float | None = None
    grow_after_s: float = GROW_AFTER_S


def decide(
    state: PolicyState, readings: Readings, settings: GovernorSettings
) -> tuple[PolicyState, tuple[Action, ...]]:
    """What to do now, and what to remember; actions come in the order in which to begin them."""
    levels = state.levels.after(readings, settings)
    records = {
        model.name: _seen(state.records.get(model.name, Record()), model)
        for model in readings.models
    }
    state = _forgiven(replace(state, levels=levels, records=records), readings.at_s)
    look = _Look(state, readings)
    look.set_stance()
    if levels.memory.level is Pressure.CRITICAL:
        look.unload_for_memory()
    # Before pools: a model that leaves gives all of its back, and gets one action at a look.
    look.unload_idle()
    if levels.memory.level is Pressure.NORMAL:
        look.end_episode()
        look.grow_kv()
    else:
        look.drop_idle_kv()
    look.announce_leaving()
    return look.state, tuple(look.actions)


def _seen(record: Record, model: ModelReading) -> Record:
    """A model's record after a look at what became of the last actions on it."""
    if model.is_changing:
        return record
    excess = model.kv_excess_tokens
    if record.drop.pending is not None:
        has_worked = 2 * excess <= record.drop.pending
        kept = excess if has_worked else record.excess_tokens
        drop = record.drop.seen(has_worked=has_worked)
        record = replace(record, drop=drop, excess_tokens=kept)
    if record.grow.pending is not None:
        has_worked = model.kv_pool_tokens > record.grow.pending
        record = replace(record, grow=record.grow.seen(has_worked=has_worked))
    if record.unload.pending is not None:
        record = replace(record, unload=record.unload.seen(has_worked=not model.is_loaded))
    if not model.is_loaded:
        # A model that comes and goes fast is shrunk no more often than one that stays.
        drop, grow = replace(record.drop, pending=None), replace(record.grow, pending=None)
        record = Record(drop=drop, grow=grow, unload=record.unload)
    elif record.is_announced and not _is_leaving(model):
        record = replace(record, is_announced=False)
    return record


def _forgiven(state: PolicyState, at_s: float) -> PolicyState:
    memory = state.levels.memory
    if memory.level is Pressure.NORMAL and at_s - memory.since_s >= FORGIVE_AFTER_S:
        return replace(state, grow_after_s=GROW_AFTER_S)
    return state


def _lead_s(idle_unload_s: float) -> float:
    return min(LEAVING_LEAD_S, idle_unload_s / 2)


def _is_leaving(model: ModelReading) -> bool:
    """Whether its idle time is about to be over."""
    limit_s = model.idle_unload_s
    if limit_s is None or model.is_pinned or not _is_idle(model):
        return False
    return model.idle_s >= limit_s - _lead_s(limit_s)


def _is_idle(model: ModelReading) -> bool:
    """Whether it may be unloaded: in memory, and nobody's answer depends on it."""
    is_settled = model.is_loaded and not model.is_loading and not model.is_changing
    return is_settled and not model.num_in_flight and not model.num_waiting


def _change(hold: Hold[L], before: L) -> str:
    """Why a level is not what it was, in words."""
    rank = hold.order.index
    if rank(hold.level) > rank(before):
        return hold.cause
    fell = f"nothing was at {before} for {hold.hold_s:.0f} s"
    return fell if hold.level == hold.order[0] else f"{fell}; {hold.cause}"


class _Look:
    """One look's decisions; gathers actions and the state that follows from them."""

    def __init__(self, state: PolicyState, readings: Readings) -> None:
        self.state = state
        self.actions: list[Action] = []
        self._readings = readings
        self._at_s = readings.at_s
        self._memory = state.levels.memory

    def set_stance(self) -> None:
        """Change what is allowed where a level changed, and only then."""
        memory, power = self._memory, self.state.levels.power
        stance = stance_for(
            memory.level,
            power.level,
            memory_cause=memory.cause,
            power_cause=power.cause,
            may_load=self._at_s - memory.since_s >= LOADS_AFTER_S,
        )
        before = self.state.stance
        if same_rules(stance, before):
            return
        if before.memory is not stance.memory:
            cause = _change(memory, before.memory)
        elif before.power is not stance.power:
            cause = _change(power, before.power)
        else:
            cause = f"the warning has stood for {LOADS_AFTER_S:.0f} s; the account decides on loads"
        self.state = replace(self.state, stance=stance)
        self.actions.append(Action(kind=ActionKind.SET_STANCE, cause=cause, stance=stance))

    def drop_idle_kv(self) -> None:
        """Shrink every pool that has grown, or stayed, larger than what runs needs."""
        for model in self._readings.models:
            if not model.is_loaded or model.is_loading or not model.can_resize_kv:
                continue
            if model.is_changing or self._is_unloaded_now(model.name):
                continue
            record = self.state.records[model.name]
            worth = max(1, model.kv_plan_tokens // EXCESS_PART)
            excess = model.kv_excess_tokens
            if excess < record.excess_tokens + worth or not self._may_drop_again(record, model):
                continue
            drop = record.drop.issued(
                self._at_s, excess, wait_s=DROP_AGAIN_S, max_wait_s=MAX_DROP_AGAIN_S
            )
            self._remember(model, replace(record, drop=drop))
            self._note_regret()
            self._act(ActionKind.DROP_IDLE_KV, model, self._memory.cause)

    def _may_drop_again(self, record: Record, model: ModelReading) -> bool:
        """Whether a pool's next shrinking is due: what is used is left alone for longer."""
        drop = record.drop
        is_first, was_vain = drop == Tried(), drop.num_vain > 0
        is_used = model.num_in_flight > 0 or model.idle_s < DROP_IDLE_S
        is_spared = is_used and self._memory.level is not Pressure.CRITICAL
        if is_first or was_vain or not is_spared:
            return self._at_s >= drop.next_s
        return self._at_s >= drop.next_s + IN_USE_S

    def unload_for_memory(self) -> None:
        """Unload idle models, the least recently used first; pinned ones when none is left."""
        due = self._unloadable()
        unpinned = [model for model in due if not model.is_pinned]
        for model in unpinned:
            self._unload(model, self._memory.cause)
        is_changing = any(model.is_changing for model in self._readings.models)
        stood_s = self._at_s - self._memory.since_s
        if unpinned or is_changing or stood_s < PINNED_AFTER_S or not self._may_unload_one():
            return
        for model in due[:1]:
            self._unload(model, self._memory.cause)

    def unload_idle(self) -> None:
        """Unload one model whose idle time is over."""
        if not self._may_unload_one():
            return
        for model in self._unloadable():
            limit_s = model.idle_unload_s
            if limit_s is None or model.is_pinned or model.idle_s < limit_s:
                continue
            self._unload(model, f"it was idle for {limit_s:.0f} s")
            return

    def announce_leaving(self) -> None:
        """Tell once of each model that will leave when its idle time is over."""
        for model in self._readings.models:
            record = self.state.records[model.name]
            limit_s = model.idle_unload_s
            if limit_s is None or record.is_announced or not _is_leaving(model):
                continue
            if self._is_unloaded_now(model.name):
                continue
            self._remember(model, replace(record, is_announced=True))
            left_s = max(0.0, limit_s - model.idle_s)
            self._act(
                ActionKind.ANNOUNCE_LEAVING,
                model,
                f"it leaves memory after {limit_s:.0f} s without a request",
                leaves_in_s=left_s,
            )

    def end_episode(self) -> None:
        """Forget what pools could not do without: the next episode is another one."""
        records = self.state.records
        if any(record.excess_tokens or record.drop != Tried() for record in records.values()):
            ended = {
                name: replace(record, excess_tokens=0, drop=Tried())
                for name, record in records.items()
            }
            self.state = replace(self.state, records=ended)

    def grow_kv(self) -> None:
        """Give one model that is used its pool back, once readings have been normal for long."""
        at_s, last_s = self._at_s, self.state.last_grow_s
        if at_s - self._memory.since_s < self.state.grow_after_s:
            return
        if last_s is not None and at_s - last_s < LOOK_S:
            return
        if any(model.is_changing for model in self._readings.models):
            return
        for model in self._readings.models:
            record = self.state.records[model.name]
            is_used = model.num_in_flight > 0 or model.idle_s < IN_USE_S
            is_small = 0 < model.kv_pool_tokens < model.kv_plan_tokens
            if not (model.is_loaded and is_used and is_small and model.can_resize_kv):
                continue
            if model.is_loading or at_s < record.grow.next_s:
                continue
            if self._is_unloaded_now(model.name):
                continue
            grow = record.grow.issued(
                at_s, model.kv_pool_tokens, wait_s=GROW_AFTER_S, max_wait_s=MAX_GROW_AFTER_S
            )
            self._remember(model, replace(record, grow=grow))
            self.state = replace(self.state, last_grow_s=at_s)
            stood_s = self.state.grow_after_s
            self._act(ActionKind.GROW_KV, model, f"memory has been normal for {stood_s:.0f} s")
            return

    def _note_regret(self) -> None:
        """Wait longer before the next growth where the last one may have brought this on."""
        last_s, wait_s = self.state.last_grow_s, self.state.grow_after_s
        if last_s is not None and self._at_s - last_s < 2 * wait_s:
            longer_s = min(2 * wait_s, MAX_GROW_AFTER_S)
            self.state = replace(self.state, grow_after_s=longer_s, last_grow_s=None)

    def _unloadable(self) -> list[ModelReading]:
        """Models that may be unloaded now: the least recently used first, pinned ones behind."""
        due = [
            model
            for model in self._readings.models
            if _is_idle(model)
            and not self._is_unloaded_now(model.name)
            and self._at_s >= self.state.records[model.name].unload.next_s
        ]
        return sorted(due, key=lambda model: (model.is_pinned, -model.idle_s, model.name))

    def _may_unload_one(self) -> bool:
        last_s = self.state.last_unload_s
        return last_s is None or self._at_s - last_s >= LOOK_S

    def _unload(self, model: ModelReading, cause: str) -> None:
        record = self.state.records[model.name]
        unload = record.unload.issued(
            self._at_s, 1, wait_s=UNLOAD_AGAIN_S, max_wait_s=MAX_UNLOAD_AGAIN_S
        )
        self._remember(model, replace(record, unload=unload))
        self.state = replace(self.state, last_unload_s=self._at_s)
        self._act(ActionKind.UNLOAD, model, cause)

    def _is_unloaded_now(self, name: str) -> bool:
        return any(
            action.kind is ActionKind.UNLOAD and action.model == name for action in self.actions
        )

    def _remember(self, model: ModelReading, record: Record) -> None:
        self.state = replace(self.state, records={**self.state.records, model.name: record})

    def _act(
        self, kind: ActionKind, model: ModelReading, cause: str, leaves_in_s: float | None = None
    ) -> None:
        self.actions.append(
            Action(kind=kind, cause=cause, model=model.name, leaves_in_s=leaves_in_s)
        )
