"""What stays of the burst speed, by cooling."""

from brim.core.forecast import SpeedRange
from brim.core.machine import Cooling
from brim.planner.sustained import sustained_range

BURST = SpeedRange(low=80, expected=100, high=120)


def test_only_desktops_keep_their_speed() -> None:
    """Fanless loses most, compact some, a desktop nothing."""
    found = {cooling: sustained_range(BURST, cooling)[0] for cooling in Cooling}
    assert found[Cooling.DESKTOP] == BURST
    fanless, compact = found[Cooling.FANLESS], found[Cooling.COMPACT]
    assert fanless is not None
    assert compact is not None
    assert 60 <= fanless.expected <= 80
    assert fanless.expected < compact.expected <= 80
    assert fanless.low < fanless.expected < fanless.high


def test_unknown_cooling_promises_nothing() -> None:
    """Where the cooling is not known there is no sustained figure, and it says why."""
    assert sustained_range(BURST, None) == (None, "how this machine is cooled is not known")
