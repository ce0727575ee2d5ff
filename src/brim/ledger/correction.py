"""Counts what earlier forecasts of a model got wrong into the next one.

Pure: the history comes in as ratios, the planner's own forecast stays as it was beside the
corrected one.  `history` keeps the measurements.
"""

import math
from collections.abc import Mapping, Sequence

import msgspec

from brim.core.memory import MemoryTerms

HALF_LIFE_LOADS = 4
"""Loads after which a measurement counts half: engines and options change with updates, and about
ten loads later nothing of an old one should be left to see."""

PRIOR_LOADS = 1.0
"""Weight of the planner's own word, as if one load had confirmed it: a single measurement moves a
term halfway, four that agree most of the way."""

MAX_STEP = 2.0
"""A single ratio counts as at most this, or one over it: what is further off was something else,
such as a process that held another model."""

MAX_CORRECTION = 1.25
"""The most by which a term grows, and one over it the most by which it shrinks.  Forecasts are
published within 3 % of the footprint; an error beyond a quarter is a defect to mend in the planner,
not one to hide here."""

TERMS = ("weights_bytes", "kv_bytes", "compute_bytes")
"""Terms that a backend reports by itself."""

TOTAL = "total_bytes"
"""What the system says of the whole process."""


class PastErrors(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one model on one engine and machine."""

    ratios: dict[str, tuple[float, ...]] = {}
    """Term -> measured over planned, newest first."""
    num_refused: int = 0
    """Times since the newest measurement that only the correction stood in the way of a load."""


NO_ERRORS = PastErrors()


def correction(ratios: Sequence[float], num_refused: int = 0) -> float:
    """The factor for a term's next forecast.

    A mean of the ratios' logarithms: each load that followed a measurement, and each load that was
    refused on its account, makes it count less.  So a wrong measurement that keeps a model out is
    forgotten by asking again.

    Args:
        ratios: Measured over planned, newest first.
        num_refused: As in `PastErrors`.

    Returns:
        From 1 / MAX_CORRECTION to MAX_CORRECTION; 1 without history.

    Example:
        >>> correction([])
        1.0
        >>> round(correction([1.1]), 3), round(correction([1.1] * 20), 3)
        (1.049, 1.085)
        >>> correction([50.0]), round(correction([50.0], num_refused=24), 2)
        (1.25, 1.01)
    """
    total, weights = 0.0, PRIOR_LOADS
    for age, ratio in enumerate(ratios):
        weight = 0.5 ** ((age + num_refused) / HALF_LIFE_LOADS)
        bounded = min(max(ratio, 1 / MAX_STEP), MAX_STEP)
        total += weight * math.log(bounded)
        weights += weight
    factor = math.exp(total / weights)
    return min(max(factor, 1 / MAX_CORRECTION), MAX_CORRECTION)


def corrected(terms: MemoryTerms, past: PastErrors) -> MemoryTerms:
    """The forecast with past errors counted in.

    A total that was measured above the sum of its terms raises the overhead; one below lowers
    nothing, since pages that were not touched yet are no proof.
    """
    if not past.ratios:
        return terms
    factors = _factors(past)
    changed = {
        name: round(getattr(terms, name) * factors[name]) for name in TERMS if name in factors
    }
    result = msgspec.structs.replace(terms, **changed)
    least_bytes = round(terms.total_bytes * max(1.0, factors.get(TOTAL, 1.0)))
    missing_bytes = max(0, least_bytes - result.total_bytes) if TOTAL in factors else 0
    return msgspec.structs.replace(result, overhead_bytes=result.overhead_bytes + missing_bytes)


def _factors(past: PastErrors) -> Mapping[str, float]:
    return {
        name: correction(ratios, past.num_refused) for name, ratios in past.ratios.items() if ratios
    }
