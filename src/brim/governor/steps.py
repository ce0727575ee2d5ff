"""One action from start to proof: measured before, done, measured after, and recorded.

Nothing that goes wrong in an action gets out of here: it is an event, and the policy, which sees at
its next look that nothing changed, tries again later.
"""

import asyncio
from collections.abc import Callable

import msgspec

from brim.core.event import Event, EventKind
from brim.governor.actions import Action, ActionKind
from brim.governor.actuator import Actuator
from brim.governor.readings import ModelReading
from brim.telemetry.event_log import EventLog

ACTION_LIMIT_S = 120.0
"""Writing a large pool's worth of KV to a slow disk takes a minute; what takes longer hangs."""

POLL_S = 0.1
"""Between two measurements of a footprint that should fall: one walks 10 to 30 ms of page tables.
"""

KV_PROOF_S = 1.0
"""A pool's memory is unmapped when its context is freed; the system's figures follow within this.
"""

UNLOAD_PROOF_S = 5.0
"""A process of many gigabytes takes the system a second or two to take apart."""

MAX_UNLOADS = 3
UNLOAD_AGAIN_S = 1.0

GIVEN_BACK = 0.9
"""Of a footprint, that an unload has to give back at least: the rest may be a new worker, or pages
that are being taken apart."""


class Steps:
    """Does the actions on models and records all of them.

    Args:
        actuator: Does them.
        events: Where they are recorded.
        unix_clock: What events are stamped with.
    """

    def __init__(
        self,
        actuator: Actuator,
        events: EventLog,
        *,
        unix_clock: Callable[[], float],
    ) -> None:
        self.is_simulated = False
        self._actuator = actuator
        self._events = events
        self._unix_clock = unix_clock
        self._failed_stance: Action | None = None
        self._unloading: set[str] = set()
        self._told: set[str] = set()
        """Models whose unload was recorded since they were last in memory."""

    async def do(self, action: Action, model: ModelReading) -> None:
        """Do one action on a model and record what came of it; never raises."""
        try:
            async with asyncio.timeout(ACTION_LIMIT_S):
                if action.kind is ActionKind.DROP_IDLE_KV:
                    await self._drop_idle_kv(action, model)
                elif action.kind is ActionKind.GROW_KV:
                    await self._grow_kv(action, model)
                elif action.kind is ActionKind.UNLOAD:
                    await self._unload(action, model)
        except Exception as exc:
            self.record_failure(action, exc)

    def record_stance(self, action: Action, watts: float | None) -> None:
        """Record that something else is allowed from now on."""
        stance = action.stance
        assert stance is not None, "a stance action carries one"
        self._record(
            EventKind.STANCE_CHANGED,
            action,
            before_watts=watts,
            detail={
                "memory": stance.memory.value,
                "power": stance.power.value,
                "admits": stance.admits,
                "loads": stance.loads,
                "pace_fraction": stance.work.pace_fraction,
                "runs_background": stance.work.runs_background,
            },
        )

    def record_watts(self, action: Action, before_watts: float, after_watts: float) -> None:
        """Record what a stance did to the power drawn."""
        stance = action.stance
        assert stance is not None, "a stance action carries one"
        self._record(
            EventKind.STANCE_MEASURED,
            action,
            before_watts=before_watts,
            after_watts=after_watts,
            detail={"power": stance.power.value},
        )

    def record_leaving(self, action: Action) -> None:
        """Record that a model leaves soon."""
        left_s = action.leaves_in_s or 0.0
        self._record(EventKind.MODEL_LEAVING, action, detail={"leaves_in_s": round(left_s, 1)})

    def record_failure(self, action: Action, error: Exception) -> None:
        """Record that an action failed; a stance that fails again and again is recorded once."""
        if action.kind is ActionKind.SET_STANCE:
            if action is self._failed_stance:
                return
            self._failed_stance = action
        words = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        self._record(
            EventKind.ACTION_FAILED, action, detail={"action": action.kind.value, "error": words}
        )

    async def _drop_idle_kv(self, action: Action, model: ModelReading) -> None:
        start_s, before = _now_s(), await self._actuator.measure(model.name)
        num_dropped = await self._actuator.drop_idle_kv(model.name)
        pool_tokens = self._pool_tokens(model)
        freed_bytes = max(0, model.kv_pool_tokens - pool_tokens) * model.kv_token_bytes
        # Half: the new pool's cells are counted in as they are touched.
        after = await self._fallen(model.name, before - freed_bytes // 2, KV_PROOF_S)
        has_shrunk = pool_tokens < model.kv_pool_tokens
        if not has_shrunk and not num_dropped:
            return
        self._record(
            EventKind.KV_SHRUNK if has_shrunk else EventKind.IDLE_KV_DROPPED,
            action,
            before_bytes=before,
            after_bytes=after,
            took_s=_now_s() - start_s,
            detail={
                "pool_tokens_before": model.kv_pool_tokens,
                "pool_tokens_after": pool_tokens,
                "dropped_tokens": num_dropped,
            },
        )

    async def _grow_kv(self, action: Action, model: ModelReading) -> None:
        start_s, before = _now_s(), await self._actuator.measure(model.name)
        await self._actuator.grow_kv(model.name)
        pool_tokens = self._pool_tokens(model)
        if pool_tokens <= model.kv_pool_tokens:
            return
        self._record(
            EventKind.KV_GROWN,
            action,
            before_bytes=before,
            after_bytes=await self._actuator.measure(model.name),
            took_s=_now_s() - start_s,
            detail={
                "pool_tokens_before": model.kv_pool_tokens,
                "pool_tokens_after": pool_tokens,
            },
        )

    async def _unload(self, action: Action, model: ModelReading) -> None:
        """Unload a model, and prove that its memory came back; harder where it did not."""
        self._unloading.add(model.name)
        others = {each.name: each for each in self._actuator.models() if each.is_loaded}
        self._told.difference_update(others)
        try:
            if await self._unload_one(action, model):
                for name in self._gone_with_it(others):
                    await self._prove_unload(action, others[name], others[name].resident_bytes)
        finally:
            self._unloading.discard(model.name)

    async def _unload_one(self, action: Action, model: ModelReading) -> bool:
        start_s, before = _now_s(), await self._actuator.measure(model.name)
        for attempt in range(MAX_UNLOADS):
            if attempt:
                await asyncio.sleep(UNLOAD_AGAIN_S)
            is_done = await self._actuator.unload(model.name, action.cause)
            if not is_done and (not self._has_left(model.name) or self._is_told(model, attempt)):
                return False  # it is in use by now, or its partner's unload has told of it
            if await self._prove_unload(action, model, before, start_s):
                return True
        return True

    async def _prove_unload(
        self,
        action: Action,
        model: ModelReading,
        before: int | None,
        start_s: float | None = None,
    ) -> bool:
        """Record what became of a model's memory; whether it came back."""
        self._told.add(model.name)
        most_bytes = int((before or 0) * (1 - GIVEN_BACK))
        after: int | None = await self._fallen(
            model.name, most_bytes, UNLOAD_PROOF_S, or_else=self._is_back
        )
        if self._is_back(model.name):
            after = None  # what is measured now is the next worker's
        has_fallen = after is None or after <= most_bytes
        self._record(
            EventKind.MODEL_UNLOADED if has_fallen else EventKind.UNLOAD_FAILED,
            msgspec.structs.replace(action, model=model.name),
            before_bytes=before,
            after_bytes=after,
            took_s=None if start_s is None else _now_s() - start_s,
            detail={"idle_s": round(model.idle_s, 1)},
        )
        return has_fallen

    def _gone_with_it(self, others: dict[str, ModelReading]) -> list[str]:
        """Models that left in the same act: the other one of a pair."""
        known = self._unloading | self._told
        return [name for name in others if name not in known and self._has_left(name)]

    def _is_told(self, model: ModelReading, attempt: int) -> bool:
        return not attempt and model.name in self._told

    def _has_left(self, name: str) -> bool:
        found = self._reading_of(name)
        return found is None or not (found.is_loaded or found.is_loading)

    async def _fallen(
        self,
        model: str,
        most_bytes: int,
        within_s: float,
        *,
        or_else: Callable[[str], bool] = lambda _: False,
    ) -> int:
        """The footprint once it is at most this, or as it is after that long, or when `or_else`."""
        end_s = _now_s() + within_s
        while True:
            now_bytes = await self._actuator.measure(model)
            if now_bytes <= most_bytes or _now_s() >= end_s or or_else(model):
                return now_bytes
            await asyncio.sleep(POLL_S)

    def _pool_tokens(self, model: ModelReading) -> int:
        found = self._reading_of(model.name)
        return model.kv_pool_tokens if found is None else found.kv_pool_tokens

    def _is_back(self, name: str) -> bool:
        return not self._has_left(name)

    def _reading_of(self, name: str) -> ModelReading | None:
        return next((model for model in self._actuator.models() if model.name == name), None)

    def _record(
        self,
        kind: EventKind,
        action: Action,
        *,
        before_bytes: int | None = None,
        after_bytes: int | None = None,
        before_watts: float | None = None,
        after_watts: float | None = None,
        took_s: float | None = None,
        detail: dict[str, str | int | float | bool] | None = None,
    ) -> None:
        self._events.record(
            Event(
                at_unix_s=self._unix_clock(),
                kind=kind,
                cause=action.cause,
                model=action.model,
                before_bytes=before_bytes,
                after_bytes=after_bytes,
                before_watts=before_watts,
                after_watts=after_watts,
                took_s=took_s,
                detail=detail or {},
                is_simulated=self.is_simulated,
            )
        )


def _now_s() -> float:
    """By the event loop's clock: what processes take is no faster where a scenario is."""
    return asyncio.get_running_loop().time()
