"""What the policy sees: the machine's conditions, and the models as they stand."""

import msgspec

from brim.core.machine import Conditions


class ModelReading(msgspec.Struct, frozen=True, kw_only=True):
    """One known model."""

    name: str
    is_loaded: bool
    is_loading: bool = False
    num_in_flight: int = 0
    """Requests admitted or on their way in; while there are any it is never unloaded."""
    num_waiting: int = 0
    """Requests that wait for it to be loaded."""
    idle_s: float = 0.0
    """Since its last request ended; 0 while one is in flight."""
    resident_bytes: int | None = None
    kv_pool_tokens: int = 0
    """Cells that its pool has now; 0 where it is not loaded."""
    kv_plan_tokens: int = 0
    """Cells that its plan gives it."""
    kv_idle_tokens: int = 0
    """Cells that only idle sequences hold."""
    kv_needed_tokens: int = 0
    """Cells that running requests hold or were promised: no pool may be smaller."""
    kv_token_bytes: int = 0
    """Bytes of one cell."""
    can_resize_kv: bool = True
    is_pinned: bool = False
    """An operator or an app wants it kept: idleness does not unload it, pressure does last."""
    idle_unload_s: float | None = None
    """Idle time after which it leaves; None: never for that."""
    is_changing: bool = False
    """An action of the governor on it is under way; set by the loop."""

    @property
    def kv_excess_tokens(self) -> int:
        """Cells that its pool could give back now."""
        return max(0, self.kv_pool_tokens - self.kv_needed_tokens)


class Readings(msgspec.Struct, frozen=True, kw_only=True):
    """One look at everything."""

    at_s: float
    """By a monotonic clock."""
    conditions: Conditions
    ram_bytes: int | None = None
    """Of the machine, or of the control group that binds us: what `available_bytes` is a part of.
    """
    swapped_in_bytes_per_s: float | None = None
    """Since the last look; None where the system does not count, or at the first look."""
    swapped_out_bytes_per_s: float | None = None
    refaulted_bytes_per_s: float | None = None
    """Of files that memory had dropped and that were read again."""
    major_faults_per_s: float | None = None
    """How often our own processes waited for the disk to get at their memory."""
    watts: float | None = None
    """Drawn by the chip, where the machine can tell."""
    models: tuple[ModelReading, ...] = ()
