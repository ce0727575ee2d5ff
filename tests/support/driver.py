"""Drives an engine as a scheduler would, one call a test step, and keeps the logits."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from brim.core.sampling import SamplingParams
from brim.core.step import Feed, Sampled, StepPlan
from brim.engine.base import Engine

GREEDY = SamplingParams(temperature=0.0)


@dataclass
class Run:
    """One sequence's history: the tokens drawn and the logits behind each of them."""

    seq_id: int
    tokens: list[int] = field(default_factory=list)
    logits: list[NDArray[np.float32]] = field(default_factory=list)
    last: Sampled | None = None


def feed(engine: Engine, run: Run, tokens: Sequence[int], *, mask: bytes | None = None) -> int:
    """One step with one sequence; returns the drawn token."""
    result = engine.step(StepPlan([Feed(run.seq_id, tokens, True, mask)]))
    record(engine, run, result.sampled[0])
    return run.tokens[-1]


def record(engine: Engine, run: Run, sampled: Sampled) -> None:
    """Note what a step drew for a sequence."""
    assert sampled.seq_id == run.seq_id
    run.tokens.append(sampled.token)
    run.logits.append(np.array(engine.logits(run.seq_id)))
    run.last = sampled


def prefill(engine: Engine, run: Run, prompt: Sequence[int], chunk: int | None = None) -> None:
    """Feed a prompt whole or in chunks, sampling after the last token."""
    chunk = chunk or len(prompt)
    for start in range(0, len(prompt), chunk):
        piece = prompt[start : start + chunk]
        if start + chunk < len(prompt):
            engine.step(StepPlan([Feed(run.seq_id, piece, False)]))
        else:
            feed(engine, run, piece)


def decode(engine: Engine, run: Run, num_tokens: int) -> None:
    """Draw until the run holds `num_tokens` tokens."""
    while len(run.tokens) < num_tokens:
        feed(engine, run, [run.tokens[-1]])


def follow(engine: Engine, run: Run, tokens: Sequence[int]) -> Run:
    """Feed these tokens one by one, whatever is drawn; the same run."""
    for token in tokens:
        feed(engine, run, [token])
    return run


def decode_together(engine: Engine, runs: Sequence[Run], num_tokens: int) -> None:
    """Draw in shared steps until each run holds `num_tokens` tokens."""
    while True:
        short = [run for run in runs if len(run.tokens) < num_tokens]
        if not short:
            return
        result = engine.step(StepPlan([Feed(run.seq_id, run.tokens[-1:]) for run in short]))
        for run, sampled in zip(short, result.sampled, strict=True):
            record(engine, run, sampled)


def generate(
    engine: Engine,
    prompt: Sequence[int],
    num_tokens: int,
    sampling: SamplingParams = GREEDY,
    chunk: int | None = None,
) -> Run:
    """A whole run in a sequence of its own, which stays open."""
    run = Run(engine.open(sampling))
    prefill(engine, run, prompt, chunk)
    decode(engine, run, num_tokens)
    return run


def assert_same(left: Run, right: Run, *, rounding: float = 0.0) -> None:
    """Tokens are equal, and logits to the bit, or to the rounding of sums in another order."""
    assert left.tokens == right.tokens
    for step, (a, b) in enumerate(zip(left.logits, right.logits, strict=True)):
        difference = float(np.abs(a - b).max())
        assert difference <= rounding, f"step {step} differs by {difference}"


def assert_close(left: Run, right: Run, *, rounding: float) -> None:
    """Logits differ by rounding at most; near ties may have drawn other tokens."""
    assert len(left.logits) == len(right.logits)
    for step, (a, b) in enumerate(zip(left.logits, right.logits, strict=True)):
        difference = float(np.abs(a - b).max())
        assert difference <= rounding, f"step {step} differs by {difference}"
