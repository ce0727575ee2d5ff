"""Past errors of forecasts: how they are counted in, and how they are forgotten."""

import pytest

from brim.core.memory import MemoryTerms
from brim.ledger.correction import (
    HALF_LIFE_LOADS,
    MAX_CORRECTION,
    PastErrors,
    corrected,
    correction,
)

TERMS = MemoryTerms(
    weights_bytes=1000, kv_bytes=2000, compute_bytes=3000, overhead_bytes=4000, repacked_bytes=500
)


def test_without_history_nothing_changes() -> None:
    """The planner's word stands where nothing was measured."""
    assert corrected(TERMS, PastErrors()) is TERMS


def test_terms_move_towards_what_was_measured() -> None:
    """Loads that agree outweigh the planner more and more, in both directions."""
    factors = [correction([1.2] * num_loads) for num_loads in (1, 2, 4, 16)]
    assert factors == sorted(factors)
    assert 1.09 < factors[0] < 1.1
    assert 1.16 < factors[-1] < 1.2
    assert correction([1 / 1.2] * 4) == pytest.approx(1 / factors[2])


def test_the_newest_load_counts_most() -> None:
    """Of two opposite errors the newer one decides the direction."""
    assert correction([1.1, 1 / 1.1]) > 1 > correction([1 / 1.1, 1.1])


def test_a_wrong_measurement_is_bounded_and_forgotten() -> None:
    """One absurd figure costs a quarter at most, and good loads wear it out."""
    assert correction([1000.0]) == MAX_CORRECTION
    assert correction([0.0001]) == 1 / MAX_CORRECTION
    assert correction([*[1.0] * 12, 1000.0]) < 1.02


def test_a_wrong_measurement_never_blocks_for_ever() -> None:
    """Without a single load in between, every refusal makes it count less."""
    factors = [correction([1000.0], num_refused) for num_refused in range(0, 60, HALF_LIFE_LOADS)]
    assert factors == sorted(factors, reverse=True)
    assert factors[-1] < 1.0001


def test_each_term_has_its_own_error() -> None:
    """A term without history stays; the repacked copy is nobody's report and stays."""
    past = PastErrors(ratios={"kv_bytes": (1.1,), "compute_bytes": ()})
    result = corrected(TERMS, past)
    assert result.kv_bytes == round(2000 * correction([1.1]))
    assert (result.weights_bytes, result.compute_bytes, result.repacked_bytes) == (1000, 3000, 500)


def test_a_total_above_the_terms_becomes_overhead_and_one_below_changes_nothing() -> None:
    """Pages that were not touched are no proof that less is needed."""
    above = corrected(TERMS, PastErrors(ratios={"total_bytes": (1.1,)}))
    assert above.total_bytes == round(TERMS.total_bytes * correction([1.1]))
    assert above.overhead_bytes > TERMS.overhead_bytes
    assert corrected(TERMS, PastErrors(ratios={"total_bytes": (0.5,)})) == TERMS
