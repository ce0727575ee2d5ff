"""Samples to figures."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brim.bench.stats import pairwise_ratios, percentile, spread, summarise

samples = st.lists(st.floats(min_value=0.001, max_value=1e6), min_size=1, max_size=50)


@given(samples)
def test_a_summary_is_ordered(values: list[float]) -> None:
    """Minimum, quartiles, median and maximum never cross."""
    found = summarise(values)
    ordered = [
        found.minimum,
        found.first_quartile,
        found.median,
        found.third_quartile,
        found.maximum,
    ]
    assert all(low <= high * (1 + 1e-9) for low, high in itertools.pairwise(ordered))
    assert found.num_samples == len(values)


def test_one_outlier_moves_the_mean_and_neither_the_median_nor_the_middle_half() -> None:
    """The figures that the tables quote hold when one sample of many is spoilt."""
    calm, spoilt = summarise([10.0] * 9), summarise([10.0] * 8 + [1000.0])
    assert spoilt.median == calm.median
    assert spoilt.interquartile_range == calm.interquartile_range
    assert spoilt.mean > 10 * calm.mean


def test_percentiles_lie_between_neighbours() -> None:
    """A percentile between two samples is interpolated, and the ends are the extremes."""
    assert percentile([4.0, 1.0, 2.0], 0) == 1.0
    assert percentile([4.0, 1.0, 2.0], 100) == 4.0
    assert percentile([4.0, 1.0, 2.0], 75) == 3.0


def test_ratios_are_taken_within_pairs() -> None:
    """A machine at half speed in the second pair leaves both ratios at 0.9."""
    assert pairwise_ratios([90.0, 45.0], [100.0, 50.0]) == [0.9, 0.9]


@pytest.mark.parametrize(
    ("figures", "references"), [([1.0], [1.0, 2.0]), ([1.0], [0.0]), ([1.0], [-1.0])]
)
def test_pairs_that_give_no_ratio_are_refused(
    figures: list[float], references: list[float]
) -> None:
    """Unequal lengths and references of zero or less are errors, not infinities."""
    with pytest.raises(ValueError, match=r"paired|ratio"):
        pairwise_ratios(figures, references)


def test_no_samples_give_no_summary() -> None:
    """An empty list of samples is an error rather than a zero."""
    with pytest.raises(ValueError, match="no samples"):
        summarise([])


def test_a_figure_is_shown_with_its_range() -> None:
    """The text of a figure is its median with minimum and maximum in brackets."""
    assert spread(summarise([1.0, 3.0, 2.0]), digits=1) == "2.0 (1.0-3.0)"
