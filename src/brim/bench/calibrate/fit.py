"""Turns samples into seconds for each unit of work, with none below zero.

Residuals count relative to the sample, since a forecast's error is a ratio.  The best of a case's
rounds stands for it: what disturbs a machine only ever adds time.  How far the other rounds and
the fit itself lie from that is kept as quantiles, which become a forecast's low and high.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from brim.bench.stats import percentile
from brim.core.calibration import FittedCosts, LoadCosts, LoadSample, LoadSetting, SpeedSample
from brim.planner.speed_terms import KvTypes, decode_terms, prefill_terms

Terms = Mapping[str, float]

QUANTILES = (5.0, 95.0)
"""Nine in ten measurements should lie within low and high."""

MAX_RATIO = 1.5
"""Bound of the upper quantile: beyond it, a measurement was of something else as well."""

DISTURBED_RATIO = 1.1
"""A case that took this much longer than fitted begins to count less: more than two undisturbed
runs differ by, on a 2-core VM."""

REWEIGHTINGS = 6
"""Turns after which weights no longer move by a percent."""

CACHED_BYTES = 64 * 1024 * 1024
"""Below it a stand-in's weights may stay in a last-level cache from token to token."""

CACHED = "cached bytes"
"""The unit of such weights; no model that anyone would plan for has it."""

MIN_SPREAD = 0.12
"""A machine is never steadier than this from one minute to the next, whatever one run shows: two
calibrations of an idle 2-core VM, eight minutes apart, differed by 12 % in the median sample."""


def non_negative_least_squares(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The x with no negative element that brings `matrix @ x` nearest to `target`.

    Args:
        matrix: Shape (samples, terms).
        target: Shape (samples,).

    Source: Lawson and Hanson, Solving Least Squares Problems (1974), chapter 23.
    """
    num_terms = matrix.shape[1]
    solution, is_free = np.zeros(num_terms), np.zeros(num_terms, dtype=bool)
    tolerance = 1e-12 * float(np.abs(matrix).max(initial=1.0)) * num_terms
    # Each turn frees one term or ends; the bound only guards against cycles by rounding.
    for _ in range(3 * num_terms):
        gradient = matrix.T @ (target - matrix @ solution)
        gradient[is_free] = -np.inf
        if is_free.all() or gradient.max() <= tolerance:
            break
        is_free[int(gradient.argmax())] = True
        solution = _free_solution(matrix, target, solution, is_free)
    return solution


def _free_solution(
    matrix: np.ndarray, target: np.ndarray, solution: np.ndarray, is_free: np.ndarray
) -> np.ndarray:
    """Least squares over the free terms; those that would become negative are held at zero."""
    while is_free.any():
        candidate = np.zeros_like(solution)
        candidate[is_free] = np.linalg.lstsq(matrix[:, is_free], target, rcond=None)[0]
        if (candidate[is_free] > 0).all():
            return candidate
        falling = is_free & (candidate <= 0)
        steps = solution[falling] / np.maximum(solution[falling] - candidate[falling], 1e-300)
        solution = solution + steps.min() * (candidate - solution)
        is_free &= solution > 1e-15 * float(np.abs(solution).max(initial=0.0))
        solution[~is_free] = 0.0
    return solution


def fit_terms(cases: Sequence[tuple[Terms, float]]) -> dict[str, float]:
    """Seconds a unit from (amounts, seconds) of many cases.

    Cases that took longer than the others make likely were disturbed and count less, turn by turn.
    A term that every case has in the same amount as another cannot be told from it; which of the
    two gets the time does not matter then.
    """
    names = sorted({name for terms, _ in cases for name, amount in terms.items() if amount})
    matrix = np.array([[terms.get(name, 0.0) / s for name in names] for terms, s in cases])
    # Amounts span ten orders of magnitude; columns of one size keep the solution exact.
    scale = np.abs(matrix).max(axis=0)
    matrix /= scale
    weights = found = np.ones(len(cases))
    for _ in range(REWEIGHTINGS):
        found = non_negative_least_squares(matrix * weights[:, None], weights)
        weights = np.minimum(1.0, (matrix @ found + 1e-9) * DISTURBED_RATIO) ** 2
    return {name: float(value) for name, value in zip(names, found / scale, strict=True)}


def fit_costs(samples: Sequence[SpeedSample]) -> tuple[FittedCosts, ...]:
    """Costs for each combination of threads and waiting under which decode was timed."""
    decoded = [sample for sample in samples if not sample.num_prompt]
    groups = dict.fromkeys(
        (s.setting.num_threads, s.setting.num_batch_threads, s.setting.wait_policy) for s in decoded
    )
    read = {
        policy: [s for s in samples if s.num_prompt and s.setting.wait_policy == policy]
        for policy in dict.fromkeys(policy for _, _, policy in groups)
    }
    base = max(read, key=lambda policy: len(read[policy]))
    prompt_costs = fit_terms(_cases(read[base], _amounts))
    found = []
    for num_threads, num_batch_threads, policy in groups:
        mine = [
            s
            for s in decoded
            if (s.setting.num_threads, s.setting.wait_policy) == (num_threads, policy)
        ]
        decode_s = fit_terms(_cases(mine, _amounts))
        factor = _factor(read[policy], prompt_costs)
        prefill_s = {name: cost * factor for name, cost in prompt_costs.items()}
        decode_low, decode_high = _ratios(mine, decode_s)
        prefill_low, prefill_high = _ratios(read[policy] or read[base], prefill_s)
        found.append(
            FittedCosts(
                num_threads=num_threads,
                num_batch_threads=num_batch_threads,
                wait_policy=policy,
                decode_s={name: cost for name, cost in decode_s.items() if name != CACHED},
                prefill_s=prefill_s,
                decode_ratio_low=decode_low,
                decode_ratio_high=decode_high,
                prefill_ratio_low=prefill_low,
                prefill_ratio_high=prefill_high,
            )
        )
    return tuple(found)


def fit_load(
    samples: Sequence[LoadSample], *, start_s: float, disk_bytes_per_s: float | None
) -> LoadCosts:
    """What getting a model ready takes.

    Args:
        samples: Loads in a process that had loaded before.
        start_s: What the first load of a process took longer, from the process's start.
        disk_bytes_per_s: As measured.
    """
    cases = [
        (
            {
                "fixed": 1.0,
                "vocabulary": float(sample.vocab_size),
                "mapped": float(sample.weights_bytes),
                "repacked": float(sample.repacked_bytes),
            },
            sample.seconds,
        )
        for sample in samples
    ]
    costs = fit_terms(cases)

    def rate(term: str) -> float | None:
        # JSON has no infinity; at a terabyte a second a model takes no time either.
        return 1 / max(costs[term], 1e-12) if term in costs else None

    return LoadCosts(
        fixed_s=costs.get("fixed", 0.0) + start_s,
        per_token_of_vocabulary_s=costs.get("vocabulary", 0.0),
        mapped_bytes_per_s=rate("mapped") or 1e12,
        repacked_bytes_per_s=rate("repacked"),
        disk_bytes_per_s=disk_bytes_per_s,
    )


def _amounts(sample: SpeedSample) -> Terms:
    """Units of a sample; weights that fit into a cache have a unit of their own.

    They are read faster than memory gives them, which would pass for fixed costs of nothing.
    """
    setting = sample.setting
    kv = KvTypes(setting.kv_type_k, setting.kv_type_v, setting.flash_attention)
    if not sample.num_prompt:
        terms = decode_terms(
            sample.shape,
            kv=kv,
            repack_weights=setting.repack_weights,
            # The timed tokens are appended one by one.
            depth_tokens=sample.depth + sample.num_generate // 2,
        )
        if sample.shape.weights_bytes >= CACHED_BYTES:
            return terms
        rest = {name: amount for name, amount in terms.items() if not name.startswith("bytes ")}
        return rest | {CACHED: float(sample.shape.active_bytes)}
    return prefill_terms(
        sample.shape,
        kv=kv,
        repack_weights=setting.repack_weights,
        depth_tokens=sample.depth,
        prompt_tokens=sample.num_prompt,
        micro_batch_tokens=setting.micro_batch_tokens,
    )


def _cases(
    samples: Iterable[SpeedSample], amounts: Callable[[SpeedSample], Terms]
) -> list[tuple[Terms, float]]:
    """One case for each distinct thing that was timed, with its best round."""
    best: dict[tuple[str, LoadSetting, int, int], SpeedSample] = {}
    for sample in samples:
        key = (sample.model, sample.setting, sample.num_prompt, sample.depth)
        if key not in best or sample.seconds < best[key].seconds:
            best[key] = sample
    return [(amounts(sample), sample.seconds) for sample in best.values()]


def _seconds(terms: Terms, costs: Mapping[str, float]) -> float:
    return sum(amount * costs.get(name, 0.0) for name, amount in terms.items())


def _factor(samples: Sequence[SpeedSample], costs: Mapping[str, float]) -> float:
    """How much longer than `costs` say these samples took, by their median; 1 without any."""
    ratios = [seconds / _seconds(terms, costs) for terms, seconds in _cases(samples, _amounts)]
    return percentile(ratios, 50) if ratios else 1.0


def _ratios(samples: Sequence[SpeedSample], costs: Mapping[str, float]) -> tuple[float, float]:
    """Quantiles of measured over fitted seconds, over every round."""
    ratios = [sample.seconds / _seconds(_amounts(sample), costs) for sample in samples]
    low, high = (percentile(ratios, percent) for percent in QUANTILES)
    return min(low, 1 - MIN_SPREAD), min(MAX_RATIO, max(high, 1 + MIN_SPREAD))
