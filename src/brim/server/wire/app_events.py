"""What an app is told while it runs: events in words that say nothing of others.

The operator's log names every app and model and why each had to go.  An app gets its own budget,
models that it may use, and how short memory and power are; causes are left out where they could
name somebody else.
"""

from enum import StrEnum
from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from brim.core.event import Event, EventKind
from brim.core.machine import Pressure
from brim.core.stance import PowerMode, Stance
from brim.server.caller import Caller


class AppEventKind(StrEnum):
    """What happened; apps may branch on these words, so they stay."""

    MEMORY_SHORT = "memory short"
    """New answers may be shorter, or refused for a while; what runs is finished."""
    MEMORY_FREE = "memory free"
    """Memory is not short any more, or was not when the stream began."""
    POWER_SAVING = "power saving"
    """On battery, short of power, or hot: answers come slower and background work may wait."""
    POWER_FULL = "power full"
    MODEL_LOADING = "model loading"
    MODEL_LOADED = "model loaded"
    MODEL_LEAVING = "model leaving"
    """It will be out of memory soon, unless it is used."""
    MODEL_UNLOADED = "model unloaded"
    """The next request for it waits until it is loaded again."""
    MODEL_FAILED = "model failed"
    """Its process died; it is started again unless that happens too often."""
    BUDGET_TIGHTENING = "budget tightening"
    BUDGET_EXHAUSTED = "budget exhausted"


Level = Literal["warning", "critical", "battery", "saving", "hot"]


class AppEvent(msgspec.Struct, frozen=True, kw_only=True):
    """The data of one event of `GET /brim/v1/events`."""

    at_unix_s: float
    kind: AppEventKind
    reason: str = ""
    """In words, for people."""
    model: str | UnsetType = UNSET
    """With events about a model."""
    level: Level | UnsetType = UNSET
    """How short memory is, or what keeps power low."""
    admits: bool | UnsetType = UNSET
    """With `memory short`: false where new requests are answered with 503 for now."""
    loads: bool | UnsetType = UNSET
    """With `memory short`: false where models that are out of memory stay there for now."""
    runs_background: bool | UnsetType = UNSET
    """False where background requests wait."""
    max_answer_tokens: int | UnsetType | None = UNSET
    """Bound of new answers that give no `max_tokens`; null where only the settings bound them."""
    retry_after_s: float | UnsetType = UNSET
    """When to ask again, where something is refused."""
    detail: dict[str, str | int | float | bool] | UnsetType = UNSET
    """Of a budget: which one, how much is used, and when it renews."""


_OF_MODELS = {
    EventKind.MODEL_LOADING: AppEventKind.MODEL_LOADING,
    EventKind.MODEL_LOADED: AppEventKind.MODEL_LOADED,
    EventKind.MODEL_LEAVING: AppEventKind.MODEL_LEAVING,
    EventKind.MODEL_UNLOADED: AppEventKind.MODEL_UNLOADED,
    EventKind.WORKER_DIED: AppEventKind.MODEL_FAILED,
    EventKind.MODEL_QUARANTINED: AppEventKind.MODEL_FAILED,
}
_OF_BUDGETS = {
    EventKind.BUDGET_TIGHTENING: AppEventKind.BUDGET_TIGHTENING,
    EventKind.BUDGET_EXHAUSTED: AppEventKind.BUDGET_EXHAUSTED,
}
_POWER_LEVELS: dict[PowerMode, Level] = {
    PowerMode.BATTERY: "battery",
    PowerMode.SAVING: "saving",
    PowerMode.HOT: "hot",
}
_REASONS = {
    EventKind.MODEL_LEAVING: "it will be out of memory soon, unless it is used",
    EventKind.MODEL_UNLOADED: "its next request loads it again",
    EventKind.WORKER_DIED: "its process died and is being restarted",
    EventKind.MODEL_QUARANTINED: "its process died too often; the operator has to look at it",
}


def concerning(event: Event, caller: Caller) -> AppEvent | None:
    """What a caller is told of an event; None where it is none of its business.

    Changes of the stance are told by `of_stance` instead.

    Example:
        >>> gone = Event(at_unix_s=1.0, kind=EventKind.MODEL_UNLOADED, model="chat", cause="x")
        >>> concerning(gone, Caller()).reason
        'its next request loads it again'
    """
    if event.kind in _OF_BUDGETS:
        if event.app != caller.app_name:
            return None
        return AppEvent(
            at_unix_s=event.at_unix_s,
            kind=_OF_BUDGETS[event.kind],
            reason=event.cause,
            detail=event.detail,
        )
    if event.kind not in _OF_MODELS or not caller.may_use(event.model):
        return None
    return AppEvent(
        at_unix_s=event.at_unix_s,
        kind=_OF_MODELS[event.kind],
        reason=_REASONS.get(event.kind, ""),
        model=event.model,
    )


def of_stance(stance: Stance, told: Stance | None, at_unix_s: float) -> list[AppEvent]:
    """What has changed since a caller was last told.

    Args:
        stance: What holds now.
        told: What it was told; None for nothing yet.
        at_unix_s: When.
    """
    events = []
    for describe in (_memory, _power):
        event = describe(stance, at_unix_s)
        if told is None or not _is_same(event, describe(told, at_unix_s)):
            events.append(event)
    return events


def _is_same(event: AppEvent, told: AppEvent) -> bool:
    """Whether two say the same; readings that move in the reason are no news."""
    return event == msgspec.structs.replace(told, reason=event.reason)


def _memory(stance: Stance, at_unix_s: float) -> AppEvent:
    if stance.memory is Pressure.NORMAL and stance.admits and stance.loads:
        return AppEvent(at_unix_s=at_unix_s, kind=AppEventKind.MEMORY_FREE)
    return AppEvent(
        at_unix_s=at_unix_s,
        kind=AppEventKind.MEMORY_SHORT,
        reason=stance.reason,
        level="critical" if stance.memory is Pressure.CRITICAL else "warning",
        admits=stance.admits,
        loads=stance.loads,
        runs_background=stance.work.runs_background,
        max_answer_tokens=stance.max_answer_tokens,
        retry_after_s=stance.retry_after_s,
    )


def _power(stance: Stance, at_unix_s: float) -> AppEvent:
    if stance.power is PowerMode.FULL:
        return AppEvent(at_unix_s=at_unix_s, kind=AppEventKind.POWER_FULL)
    return AppEvent(
        at_unix_s=at_unix_s,
        kind=AppEventKind.POWER_SAVING,
        reason=stance.reason,
        level=_POWER_LEVELS[stance.power],
        runs_background=stance.work.runs_background,
        max_answer_tokens=stance.max_answer_tokens,
    )
