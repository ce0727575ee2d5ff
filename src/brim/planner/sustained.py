"""What stays of a machine's speed once it is warm."""

from typing import NamedTuple

from brim.core.forecast import SpeedRange
from brim.core.machine import Cooling


class SustainedFactor(NamedTuple):
    """Share of the cool machine's speed that is left, and when."""

    low: float
    expected: float
    high: float
    reason: str


FACTORS = {
    # Practitioners' reports: a fanless Mac loses 20 to 40 % after 30 to 90 s of full GPU load.
    Cooling.FANLESS: SustainedFactor(
        0.6, 0.7, 0.8, "no fan: 20 to 40 % slower after 30 to 90 s of load"
    ),
    # Reports give 20 to 30 %; one instrumented run of a 16-inch M5 Max lost 16 % in five prompts.
    Cooling.COMPACT: SustainedFactor(
        0.7, 0.75, 0.8, "a laptop or small desktop: 20 to 30 % slower after minutes of load"
    ),
    Cooling.DESKTOP: SustainedFactor(1.0, 1.0, 1.0, "a desktop's fans keep the burst speed"),
}


def sustained_range(burst: SpeedRange, cooling: Cooling | None) -> tuple[SpeedRange | None, str]:
    """Decode speed after minutes of load, and why; None where the cooling is not known.

    Args:
        burst: Speed of the cool machine.
        cooling: How the machine is cooled.

    Example:
        >>> burst = SpeedRange(low=18, expected=20, high=22)
        >>> sustained_range(burst, Cooling.FANLESS)[0].expected
        14.0
        >>> sustained_range(burst, None)
        (None, 'how this machine is cooled is not known')
    """
    if cooling is None:
        return None, "how this machine is cooled is not known"
    factor = FACTORS[cooling]
    sustained = SpeedRange(
        low=burst.low * factor.low,
        expected=burst.expected * factor.expected,
        high=burst.high * factor.high,
    )
    return sustained, factor.reason
