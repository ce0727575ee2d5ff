"""How many bytes of a machine may be used: one definition, used everywhere."""

import msgspec

from brim.core.machine import MachineSpec

COMFORTABLE_PERCENT = 70
"""Of RAM: what leaves a desktop with its browser responsive."""

RESERVE_BYTES = 1_000_000_000
RESERVE_PERCENT = 5
"""The reserve is the larger of the two: what keeps the system from reclaiming in a hurry."""


class Limit(msgspec.Struct, frozen=True):
    """A bound and the term that sets it."""

    num_bytes: int
    binding: str


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """What all models together may take: up to `comfortable` gladly, up to `tight` with a note."""

    comfortable: Limit
    tight: Limit
    reserve_bytes: int


def budget_of(machine: MachineSpec) -> Budget:
    """The budget by one reading of the machine.

    Example:
        >>> spec = MachineSpec(name="x", system="linux", ram_bytes=16 * 10**9,
        ...                    others_bytes=3 * 10**9)
        >>> budget = budget_of(spec)
        >>> budget.comfortable.binding, budget.tight.num_bytes
        ('0.70 x ram', 12000000000)
    """
    reserve = max(RESERVE_BYTES, machine.ram_bytes * RESERVE_PERCENT // 100)
    free = Limit(
        max(0, machine.ram_bytes - machine.others_bytes - reserve), "ram minus others and reserve"
    )
    limits = [free]
    if machine.gpu_limit_bytes is not None:
        limits.append(Limit(machine.gpu_limit_bytes, "gpu limit"))
    share = Limit(machine.ram_bytes * COMFORTABLE_PERCENT // 100, "0.70 x ram")
    return Budget(
        comfortable=min([*limits, share], key=_size),
        tight=min(limits, key=_size),
        reserve_bytes=reserve,
    )


def _size(limit: Limit) -> int:
    return limit.num_bytes
