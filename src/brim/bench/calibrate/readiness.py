"""Whether the machine is in a state in which measuring it means anything."""

from brim.core.machine import Conditions, Pressure, ThermalState

MAX_BUSY = 0.10
"""Share of the processors that others may use: above a desktop's background, below any real work.

Threads that wait for each other lose far more than their share to a busy neighbour.
"""

MAX_STALLED_PERCENT = 5.0
"""Time in which some task waited for memory; an idle machine has none."""

MAX_COMPRESSOR_RATIO = 1.0
"""Above it macOS itself begins to warn."""


def objections(before: Conditions, after: Conditions | None = None) -> tuple[str, ...]:
    """Why this machine should not be measured now, each with its reading; empty where it may.

    Args:
        before: One reading.
        after: A later one, which tells whether the machine swaps.
    """
    now = after or before
    found = []
    if now.busy_fraction is not None and now.busy_fraction > MAX_BUSY:
        found.append(f"other programs use {now.busy_fraction:.0%} of the processors")
    if now.thermal not in (None, ThermalState.NOMINAL):
        found.append(f"it is hot (thermal state {now.thermal})")
    if now.is_throttled:
        found.append("its processors are throttled")
    if now.is_low_power:
        found.append("it is in low-power mode")
    if now.pressure not in (None, Pressure.NORMAL):
        found.append(f"memory pressure is {now.pressure}")
    if now.stalled_percent is not None and now.stalled_percent > MAX_STALLED_PERCENT:
        found.append(f"programs waited for memory {now.stalled_percent:.0f} % of the time")
    if now.compressor_ratio is not None and now.compressor_ratio > MAX_COMPRESSOR_RATIO:
        found.append(f"more memory is compressed than not (ratio {now.compressor_ratio:.1f})")
    if swapped := _swapped_bytes(before, now):
        found.append(f"it is swapping ({swapped / 2**20:.0f} MiB just now)")
    return tuple(found)


def _swapped_bytes(before: Conditions, after: Conditions) -> int:
    """Bytes that went out to swap between two readings."""
    if before.swapped_out_bytes is None or after.swapped_out_bytes is None:
        return 0
    return max(0, after.swapped_out_bytes - before.swapped_out_bytes)
