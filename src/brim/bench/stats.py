"""Samples to figures: medians and spreads, because shared machines drift and have outliers."""

import statistics
from collections.abc import Sequence

import msgspec


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """One figure's samples in short; quote the median, and the range to say how noisy it was."""

    median: float
    minimum: float
    maximum: float
    first_quartile: float
    third_quartile: float
    mean: float
    stddev: float
    """Of the samples (n - 1); 0 for a single one."""
    num_samples: int

    @property
    def interquartile_range(self) -> float:
        """Width of the middle half of the samples: a spread that one outlier does not move."""
        return self.third_quartile - self.first_quartile


def summarise(samples: Sequence[float]) -> Summary:
    """Median, range, quartiles, mean and deviation of at least one sample.

    Raises:
        ValueError: There are no samples.

    Example:
        >>> summarise([1.0, 2.0, 9.0]).median
        2.0
    """
    if not samples:
        raise ValueError("no samples to summarise")
    return Summary(
        median=statistics.median(samples),
        minimum=min(samples),
        maximum=max(samples),
        first_quartile=percentile(samples, 25),
        third_quartile=percentile(samples, 75),
        mean=statistics.fmean(samples),
        stddev=statistics.stdev(samples) if len(samples) > 1 else 0.0,
        num_samples=len(samples),
    )


def percentile(samples: Sequence[float], percent: float) -> float:
    """The value below which `percent` of the samples lie, linear between neighbours.

    Raises:
        ValueError: There are no samples, or `percent` is outside 0 to 100.

    Example:
        >>> percentile([10.0, 20.0, 30.0], 75)
        25.0
    """
    if not samples or not 0 <= percent <= 100:
        raise ValueError("a percentile needs samples and a percentage from 0 to 100")
    ordered = sorted(samples)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def pairwise_ratios(figures: Sequence[float], references: Sequence[float]) -> list[float]:
    """Each figure over the reference measured next to it.

    A machine that slows down between two pairs slows both of a pair, so their ratio holds where a
    ratio of two averages would not.

    Raises:
        ValueError: The lengths differ, or a reference is not positive.

    Example:
        >>> pairwise_ratios([9.0, 4.0], [10.0, 5.0])
        [0.9, 0.8]
    """
    if len(figures) != len(references):
        raise ValueError(f"{len(figures)} figures cannot be paired with {len(references)}")
    if any(reference <= 0 for reference in references):
        raise ValueError("a reference of zero or less gives no ratio")
    return [figure / reference for figure, reference in zip(figures, references, strict=True)]


def spread(summary: Summary, digits: int = 2) -> str:
    """`median (min-max)`, as the tables show a figure.

    Example:
        >>> spread(summarise([1.0, 2.0, 9.0]), digits=1)
        '2.0 (1.0-9.0)'
    """
    low, mid, high = (
        f"{value:.{digits}f}" for value in (summary.minimum, summary.median, summary.maximum)
    )
    return f"{mid} ({low}-{high})"
