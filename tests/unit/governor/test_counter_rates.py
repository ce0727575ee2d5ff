"""From counters to rates."""

from brim.core.machine import Conditions
from brim.governor.counter_rates import CounterRates, Rates


def counted(moved_in: int | None, moved_out: int | None) -> Conditions:
    return Conditions(swapped_in_bytes=moved_in, swapped_out_bytes=moved_out)


def test_looks_in_quick_succession_are_one() -> None:
    """Over a tenth of a second a burst is no rate: the last one stands until half a second."""
    rates = CounterRates()
    rates.after(counted(0, 0), 0.0)
    assert rates.after(counted(100, 200), 1.0)[:2] == (100.0, 200.0)
    assert rates.after(counted(9100, 9200), 1.1)[:2] == (100.0, 200.0)
    assert rates.after(counted(9100, 9200), 2.0)[:2] == (9000.0, 9000.0)


def test_a_counter_that_is_missing_or_runs_backwards_gives_no_rate() -> None:
    """It is another counter then, and the next reading counts from there."""
    rates = CounterRates()
    rates.after(counted(500, None), 0.0)
    assert rates.after(counted(400, 100), 1.0) == Rates()
    assert rates.after(counted(600, 300), 2.0)[:2] == (200.0, 200.0)


def test_what_is_read_again_and_who_waits_for_it_are_rates() -> None:
    """Both counters are held against the reading before, each by itself."""
    rates = CounterRates()
    rates.after(Conditions(refaulted_bytes=1000, major_faults=7), 0.0)
    found = rates.after(Conditions(refaulted_bytes=9000, major_faults=7), 2.0)
    assert found == Rates(refaulted_bytes_per_s=4000.0, major_faults_per_s=0.0)
