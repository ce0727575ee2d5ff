"""What the governor may do, as values; `loop.Actuator` does it."""

from enum import StrEnum

import msgspec

from brim.core.stance import Stance


class ActionKind(StrEnum):
    """In the order of how much they hurt."""

    SET_STANCE = "set stance"
    ANNOUNCE_LEAVING = "announce leaving"
    """Tell apps that an idle model will go soon; nothing is done to it."""
    GROW_KV = "grow kv"
    DROP_IDLE_KV = "drop idle kv"
    """Idle sequences go, what is worth it to disk first, and the pool shrinks to what runs."""
    UNLOAD = "unload"
    """Only a model without anything in flight."""


class Action(msgspec.Struct, frozen=True, kw_only=True):
    """One step, and why."""

    kind: ActionKind
    cause: str
    """In words, with the reading: 'the system reports warning pressure'."""
    model: str = ""
    stance: Stance | None = None
    """With SET_STANCE."""
    leaves_in_s: float | None = None
    """With ANNOUNCE_LEAVING."""
