"""Something that happened to a server and that people or apps want to know: not once a token."""

from enum import StrEnum

import msgspec


class EventKind(StrEnum):
    """What happened; apps may branch on these words, so they stay."""

    STANCE_CHANGED = "stance changed"
    """The governor allows more or less than before."""
    STANCE_MEASURED = "stance measured"
    """What a new power mode did to the power drawn, where the machine can tell."""
    IDLE_KV_DROPPED = "idle kv dropped"
    KV_SHRUNK = "kv shrunk"
    KV_GROWN = "kv grown"
    MODEL_LOADING = "model loading"
    MODEL_LOADED = "model loaded"
    MODEL_LEAVING = "model leaving"
    """It will be unloaded soon unless it is used."""
    MODEL_UNLOADED = "model unloaded"
    UNLOAD_FAILED = "unload failed"
    """The memory did not come back; harder means follow."""
    ACTION_FAILED = "action failed"
    """Something that the governor wanted done could not be; it is tried again later."""
    WORKER_DIED = "worker died"
    MODEL_QUARANTINED = "model quarantined"
    BUDGET_TIGHTENING = "budget tightening"
    BUDGET_EXHAUSTED = "budget exhausted"
    SERVER_STARTED = "server started"
    SERVER_STOPPED = "server stopped"


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One event; figures that nobody measured are None."""

    at_unix_s: float
    kind: EventKind
    cause: str = ""
    """Why, in words, with the reading that led to it."""
    model: str = ""
    app: str = ""
    """Whose business it is alone; empty for everybody who may use `model`."""
    before_bytes: int | None = None
    """Measured footprint before the action, and after it."""
    after_bytes: int | None = None
    before_watts: float | None = None
    after_watts: float | None = None
    took_s: float | None = None
    detail: dict[str, str | int | float | bool] = {}
    is_simulated: bool = False
