"""What the machine is, has free and feels, as far as the OS says: None is never a guess."""

from enum import StrEnum

import msgspec


class Cooling(StrEnum):
    """How long a machine keeps its speed under load."""

    FANLESS = "fanless"
    COMPACT = "compact"
    """A laptop with fans, or a small desktop."""
    DESKTOP = "desktop"


class MachineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One reading of the machine's memory and processors, or the description of another machine."""

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
    chip: str | None = None
    """The chip as its maker calls it ('M4 Max'); None where it has no entry in the table."""
    gpu_cores: int | None = None
    memory_bandwidth: int | None = None
    """Bytes a second, by the maker; None where nobody says."""
    fp32_flops: int | None = None
    """Of the GPU, a second, by the maker."""
    cooling: Cooling | None = None
    is_at_hand: bool = True
    """Whether this is the machine that runs brim, rather than one that is planned for."""
    is_simulated: bool = False
    """Whether readings come from a scenario; shown wherever they are shown."""
    sources: dict[str, str] = {}
    """Where each figure came from, for `brim machine` and error messages."""


class Pressure(StrEnum):
    """The OS's own level of memory pressure, quoted."""

    NORMAL = "normal"
    WARNING = "warning"
    CRITICAL = "critical"


class ThermalState(StrEnum):
    """How hot the machine says it is; macOS's own five levels."""

    NOMINAL = "nominal"
    MODERATE = "moderate"
    HEAVY = "heavy"
    TRAPPING = "trapping"
    SLEEPING = "sleeping"


class Conditions(msgspec.Struct, frozen=True, kw_only=True):
    """What the machine feels at one moment; whatever the OS does not say is None."""

    pressure: Pressure | None = None
    compressor_ratio: float | None = None
    """macOS: pages in the compressor over pages not compressed; the kernel warns above 1."""
    stalled_percent: float | None = None
    """Linux: share of the last 10 s in which some task waited for memory (PSI some avg10)."""
    available_bytes: int | None = None
    """What can be taken before the system must reclaim or swap: of the machine, or of the control
    group that binds us where that is less."""
    swap_used_bytes: int | None = None
    swapped_out_bytes: int | None = None
    """Since boot; two readings tell whether the machine swaps now."""
    swapped_in_bytes: int | None = None
    refaulted_bytes: int | None = None
    """Linux: of files, such as mapped weights, that memory had dropped and that were read again; of
    the control group that binds us, else of the machine, since boot."""
    major_faults: int | None = None
    """Linux: how often our own processes waited for the disk to get at their memory, since each of
    them began."""
    thermal: ThermalState | None = None
    hottest_celsius: float | None = None
    is_throttled: bool | None = None
    """Whether the processors are held below their speed because of heat or power."""
    is_low_power: bool | None = None
    is_on_battery: bool | None = None
    battery_percent: int | None = None
    busy_fraction: float | None = None
    """Share of all processors that others keep busy, 0 to 1."""
    is_simulated: bool = False
    sources: dict[str, str] = {}
    """Where each figure came from, or why there is none."""
