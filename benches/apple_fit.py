"""The arithmetic of fitting the speed constants: log seconds, robust loss, shrinkage, ranges.

A row's seconds are a sum of terms, each times exp(sum of its effects) (brim.planner.apple.terms).
Effects are found by Gauss-Newton on Student-t residuals of log seconds, each with a normal prior:
what few rows tell apart stays near the group it belongs to.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from brim.core.forecast import SpeedShape
from brim.planner.apple.ranges import cell, familiarity, width_effects
from brim.planner.apple.rows import Row
from brim.planner.apple.speed import Constants
from brim.planner.apple.terms import (
    AppleChip,
    Setting,
    Term,
    decode_terms,
    prefill_terms,
)

Array = NDArray[np.float64]

PRIORS = {
    "stall": (math.log(0.12), 1.0),  # DRAM gives 85 to 95 % of its stated bandwidth
    "unpack": (math.log(5.0), 1.2),  # a few instructions for each weight
    "layer": (math.log(0.9), 0.7),  # 80 to 115 us a layer on current engines
    "kv": (math.log(0.3), 0.7),  # KV reads reach 0.75 to 0.85 of the bandwidth
    "reread": (math.log(0.75), 0.5),  # the step from 0.78 to 0.49 of the bandwidth
    "attention": (math.log(2.0), 1.0),  # multiply-adds, softmax and rescaling of each score
    "token": (0.0, 1.0),  # sampling and one round trip, about 100 us
    "expert": (0.0, 0.7),  # MoE layers cost two to three times a dense layer
    "recurrent": (math.log(0.5), 0.7),
    "matrix": (math.log(1.6), 0.5),  # 50 to 78 % of FP32 peak on dense prompts
    "routed": (math.log(0.3), 0.5),
    "tile": (0.0, 1.0),
    "gather": (math.log(0.5), 1.0),
    "square": (math.log(1.5), 0.7),
    "pass": (math.log(0.5), 1.0),
    "request": (math.log(0.05), 1.5),
    "scan": (math.log(2.0), 1.0),
}
"""Mean and standard deviation of each base effect, as logarithms; what they mean is in
planner.apple.terms.  Wide, so that rows and not these decide."""

EXCEPTIONS = {
    # The matrix units of the M5's GPU: an M5 Max prefills at 23 to 62 TFLOPS, an M5 Pro at 22.7,
    # an M5 at 8.5, with FP32 rates of 22.8, 11.4 and 5.7.
    "matrix/all M5": (-0.8, 0.4),
    # The only source of this pair ran a fanless laptop through a long sweep: it was hot, and the
    # generation must not pay for it.
    "matrix/chip M5/mlx-lm": (0.6, 0.4),
}
"""Effects that are known to be far from 0."""

GROUP_SIGMA = 0.25
"""Standard deviation of every further effect (engine, chip, ...).  0.15 to 0.35 give the same
cross-validated error within 0.5 points."""

UNFUSED, FUSED_SIGMA = 1.5, 1.0
"""Mean and standard deviation of the effects of unfused attention: scores written to memory cost up
to ten times as much (KV reads at 0.06 to 0.16 of the bandwidth, 0.43 to 0.75 where it is fused)."""

NOISE = 0.05
"""Scale of a row's own scatter: repeated runs of one source differ by 2 to 8 %."""

FREEDOM = 3.0
"""Degrees of freedom of Student's t: one row in ten is off by far more than the scatter."""

WIDTH_SIGMA = 0.3
"""Standard deviation of the effects on a range's log width: shrinkage, as for speeds."""

COVERAGE = 0.95
"""Share of left-out rows that the ranges are scaled to hold; nine in ten is promised, and rows of
unknown models hold three points less."""


def prior(name: str) -> tuple[float, float]:
    """Mean and standard deviation of an effect before any row is seen."""
    if name.endswith("flash"):
        return (UNFUSED if name.endswith("no flash") else 0.0), FUSED_SIGMA
    return PRIORS.get(name) or EXCEPTIONS.get(name) or (0.0, GROUP_SIGMA)


class Sample(NamedTuple):
    """One row, ready to be fitted."""

    row: Row
    shape: SpeedShape
    chip: AppleChip
    setting: Setting
    num_tokens: int
    """Depth of a decode, length of a prompt."""

    @property
    def cell(self) -> str:
        return cell(self.chip, self.setting.engine)

    def terms(self) -> list[Term]:
        if self.row.kind == "decode":
            return decode_terms(self.shape, self.chip, self.setting, self.num_tokens)
        terms = prefill_terms(self.shape, self.chip, self.setting, self.num_tokens)
        return [Term(term.seconds / self.num_tokens, term.effects) for term in terms]


class Problem:
    """The samples of one kind as matrices.

    `effects` (terms x names) says which effects multiply a term, `owner` (terms) which sample it
    belongs to.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = list(samples)
        names: dict[str, int] = {}
        seconds: list[float] = []
        owner: list[int] = []
        pairs: list[tuple[int, int]] = []
        for index, sample in enumerate(self.samples):
            for term in sample.terms():
                pairs += [
                    (len(seconds), names.setdefault(name, len(names))) for name in term.effects
                ]
                seconds.append(term.seconds)
                owner.append(index)
        self.names = list(names)
        self.seconds = np.array(seconds)
        self.owner = np.array(owner)
        self.effects = np.zeros((len(seconds), len(names)))
        # Adds, as the product does, should a term name an effect twice.
        np.add.at(self.effects, tuple(np.array(pairs).T), 1.0)
        self.measured = np.array([-math.log(sample.row.tok_s or 1.0) for sample in self.samples])
        priors = [prior(name) for name in self.names]
        self.mean, self.sigma = np.array(priors).T

    def log_seconds(self, values: Array) -> tuple[Array, Array]:
        """Log seconds of each sample, and the share that each term has of its sample."""
        parts = self.seconds * np.exp(self.effects @ values)
        total = np.bincount(self.owner, parts, len(self.samples))
        return np.log(total), parts / total[self.owner]

    def errors(self, values: Array) -> Array:
        """Log of forecast over measured speed."""
        found: Array = self.measured - self.log_seconds(values)[0]
        return found

    def fit(self, chosen: NDArray[np.bool_], *, max_steps: int = 60) -> Array:
        """Values of the effects that suit the chosen samples, by damped Gauss-Newton."""
        values: Array = self.mean.copy()
        damping = 1.0
        cost = self._cost(values, chosen)
        for _ in range(max_steps):
            log_seconds, share = self.log_seconds(values)
            slope = np.zeros((len(self.samples), len(values)))
            np.add.at(slope, self.owner, share[:, None] * self.effects)
            scaled = (log_seconds - self.measured) / NOISE
            weight = np.where(chosen, (FREEDOM + 1) / (FREEDOM + scaled**2), 0.0)
            slope /= NOISE
            normal = slope.T @ (slope * weight[:, None]) + np.diag(self.sigma**-2)
            gradient = slope.T @ (weight * scaled) + (values - self.mean) / self.sigma**2
            before = cost
            while damping < 1e6:
                damped = normal + damping * np.diag(np.diag(normal))
                step: Array = values - np.linalg.solve(damped, gradient)
                if (new_cost := self._cost(step, chosen)) < cost:
                    values, cost, damping = step, new_cost, max(damping / 4, 1e-6)
                    break
                damping *= 4
            if before - cost < 1e-6 * abs(before):
                break
        return values

    def _cost(self, values: Array, chosen: NDArray[np.bool_]) -> float:
        scaled = self.errors(values)[chosen] / NOISE
        data = float((FREEDOM + 1) / 2 * np.log1p(scaled**2 / FREEDOM).sum())
        return float(data + 0.5 * (((values - self.mean) / self.sigma) ** 2).sum())


class LeftOut(NamedTuple):
    """What one cross-validation found for each sample."""

    errors: Array
    """Log of forecast over measured speed, by constants that never saw the sample."""
    known: list[str]
    """How familiar the sample's chip and engine were to those constants."""

    def only(self, chosen: NDArray[np.bool_]) -> "LeftOut":
        """The part on some of the samples."""
        known = [self.known[index] for index in np.flatnonzero(chosen)]
        return LeftOut(self.errors[chosen], known)


def cross_validate(problem: Problem, key: Callable[[Sample], Hashable]) -> LeftOut:
    """Forecast every sample by constants fitted to the groups of `key` that it is not in."""
    keys = [key(sample) for sample in problem.samples]
    errors = np.zeros(len(keys))
    known = [""] * len(keys)
    for group in dict.fromkeys(keys):
        inside = np.array([other == group for other in keys])
        errors[inside] = problem.errors(problem.fit(~inside))[inside]
        seen = count_rows(s for s, out in zip(problem.samples, inside, strict=True) if not out)
        for index in np.flatnonzero(inside):
            sample = problem.samples[index]
            known[index] = familiarity(sample.chip, sample.setting.engine, seen)
    return LeftOut(errors, known)


def count_rows(samples: Iterable[Sample]) -> dict[str, int]:
    """Samples by chip, GPU cores and engine; without those whose bin nobody knows."""
    counts: dict[str, int] = {}
    for sample in samples:
        if sample.chip.gpu_cores:
            counts[sample.cell] = counts.get(sample.cell, 0) + 1
    return counts


def folds(num_folds: int, key: Callable[[Sample], str]) -> Callable[[Sample], int]:
    """Spread the values of `key` over a few groups, the same way each time."""

    def fold(sample: Sample) -> int:
        digits = 0
        for letter in key(sample):
            digits = (digits * 131 + ord(letter)) % 1_000_003
        return digits * 7919 % 1_000_003 % num_folds

    return fold


def fit_widths(samples: Sequence[Sample], checks: Sequence[LeftOut]) -> dict[str, float]:
    """Half widths that hold `COVERAGE` of left-out rows, narrower where rows are many and agree.

    The scale of absolute errors is fitted as exp(sum of effects) by a Laplace likelihood with
    shrinkage, then all of them are scaled together.
    """
    names: dict[str, int] = {}
    picked: list[list[int]] = []
    sizes: list[float] = []
    for check in checks:
        for sample, error, known in zip(samples, check.errors, check.known, strict=True):
            effects = width_effects(*sample[1:], known)
            picked.append([names.setdefault(name, len(names)) for name in effects])
            sizes.append(abs(float(error)))
    design = np.zeros((len(sizes), len(names)))
    for index, columns in enumerate(picked):
        design[index, columns] = 1.0
    size = np.array(sizes)
    precision = np.full(len(names), WIDTH_SIGMA**-2)
    precision[names["width"]] = 1e-4
    values = np.zeros(len(names))
    values[names["width"]] = math.log(size.mean())
    for _ in range(100):
        ratio = np.minimum(size / np.exp(design @ values), 6.0)
        gradient = design.T @ (1 - ratio) + precision * values
        normal = design.T @ (design * np.maximum(ratio, 0.2)[:, None]) + np.diag(precision)
        values -= 0.5 * np.linalg.solve(normal, gradient)
    scale = float(np.quantile(size / np.exp(design @ values), COVERAGE))
    values[names["width"]] += math.log(scale)
    return {name: round(float(values[i]), 4) for name, i in names.items()}


def constants_of(problem: Problem, values: Array, widths: dict[str, float]) -> Constants:
    """What ships: effects that matter, to four digits."""
    effects = {
        name: round(float(value), 4)
        for name, value in sorted(zip(problem.names, values, strict=True))
        if abs(value) >= 5e-4
    }
    return Constants(
        effects=effects,
        widths=dict(sorted(widths.items())),
        num_rows=dict(sorted(count_rows(problem.samples).items())),
    )
