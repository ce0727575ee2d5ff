"""From counters to rates."""

from brim.core.machine import Conditions
from brim.governor.swap_rates import SwapRates


def counted(moved_in: int | None, moved_out: int | None) -> Conditions:
    return Conditions(swapped_in_bytes=moved_in, swapped_out_bytes=moved_out)


def test_looks_in_quick_succession_are_one() -> None:
    """Over a tenth of a second a burst is no rate: the last one stands until half a second."""
    rates = SwapRates()
    rates.after(counted(0, 0), 0.0)
    assert rates.after(counted(100, 200), 1.0) == (100.0, 200.0)
    assert rates.after(counted(9100, 9200), 1.1) == (100.0, 200.0)
    assert rates.after(counted(9100, 9200), 2.0) == (9000.0, 9000.0)


def test_a_counter_that_is_missing_or_runs_backwards_gives_no_rate() -> None:
    """It is another counter then, and the next reading counts from there."""
    rates = SwapRates()
    rates.after(counted(500, None), 0.0)
    assert rates.after(counted(400, 100), 1.0) == (None, None)
    assert rates.after(counted(600, 300), 2.0) == (200.0, 200.0)
