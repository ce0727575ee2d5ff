"""What the machine is and has free, as far as the OS says: None is never a guess."""

import msgspec


class MachineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One reading of the machine's memory and processors."""

    name: str
    system: str
    """'linux' or 'darwin'."""
    ram_bytes: int
    """Physical memory, or the cgroup's limit where that is lower."""
    others_bytes: int
    """What everything else on the machine really uses now."""
    gpu_limit_bytes: int | None = None
    """What the OS lets the GPU keep resident; None where no GPU shares the memory."""
    performance_cores: int = 1
    """Processors this process may run on, without the slowest tier where tiers exist."""
    sources: dict[str, str] = {}
    """Where each figure came from, for `brim machine` and error messages."""
