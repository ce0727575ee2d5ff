"""`python -m brim.bench.calibrate.child`: loads stand-ins and times them, one order a line.

A process of its own, because thread settings count from the moment that a backend's libraries are
loaded: whoever starts it sets the environment.  Orders and answers are JSON lines on standard
input and output; between orders it sleeps.
"""

import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from brim.bench.speed import SAMPLING
from brim.core.answer import ErrorInfo
from brim.core.plan import Plan
from brim.core.step import Feed, StepPlan
from brim.engine import factory
from brim.engine.base import Engine
from brim.errors import BrimError

WARM_TOKENS = 4
"""Decoded and not counted before each timed decode: caches and lazily allocated buffers."""


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What to time on one model under one combination of load options."""

    plan: Plan
    prompts: tuple[int, ...] = ()
    """Lengths of prompts to time from an empty sequence."""
    repetitions: int = 1
    """Times that each prompt is read."""
    depths: tuple[int, ...] = ()
    """Tokens in the sequence where decode is timed; filling up to there is timed too."""
    num_generate: int = 0
    """Tokens decoded, each of them timed, at each depth; 0 only fills."""
    only_repacked: bool = False
    """Time nothing where the engine rearranged no weights: they were timed as they are."""
    kept_kv: str = ""
    """A file for the filled KV, read before filling and written after it; one for each combination
    of model, KV types and flash attention."""
    refill: bool = False
    """Fill even where the file is there, because filling is to be timed; then replace it."""


class Timed(msgspec.Struct, frozen=True, kw_only=True):
    """Samples of one prompt length or of decode at one depth."""

    num_prompt: int = 0
    depth: int = 0
    samples_s: tuple[float, ...]
    """Of decode, seconds for each token."""

    @property
    def seconds(self) -> float:
        """Median of the samples."""
        return statistics.median(self.samples_s)


class Ran(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to an order."""

    load_s: float = 0.0
    dirty_weights_bytes: int = 0
    """Weights that are not mapped: what the engine rearranged."""
    prefill: tuple[Timed, ...] = ()
    decode: tuple[Timed, ...] = ()
    error: ErrorInfo | None = None
    """Why there are no figures."""


def run(order: Order) -> Ran:
    """Load, time and unload.

    Raises:
        BrimError: The engine cannot do what is asked.
    """
    start_s = time.perf_counter()
    engine = factory.create(order.plan.engine)
    try:
        engine.load(order.plan)
        load_s = time.perf_counter() - start_s
        footprint = engine.footprint()
        dirty_bytes = footprint.weights_bytes - footprint.mapped_weights_bytes
        if order.only_repacked and not dirty_bytes:
            return Ran(load_s=load_s)
        _warm(engine, order)
        prefill = [_prompt(engine, order, length) for length in order.prompts]
        filled, decode = _walk(engine, order)
    finally:
        engine.shutdown()
    return Ran(
        load_s=load_s,
        dirty_weights_bytes=dirty_bytes,
        prefill=(*prefill, *filled),
        decode=tuple(decode),
    )


def _walk(engine: Engine, order: Order) -> tuple[list[Timed], list[Timed]]:
    """Fill a sequence to the largest depth, then decode at each, the deepest first."""
    if not order.depths:
        return [], []
    seq_id, kept = engine.open(SAMPLING), Path(order.kept_kv)
    if order.kept_kv and kept.exists() and not order.refill:
        engine.import_kv(seq_id, kept.read_bytes())
    filled = list(_fill(engine, order, seq_id, max(order.depths)))
    if order.kept_kv and filled:
        with engine.export_kv(seq_id) as block:
            kept.write_bytes(block)
    if not order.num_generate:
        return filled, []
    deepest_first = sorted(order.depths, reverse=True)
    return filled, [_decode(engine, order, seq_id, depth) for depth in deepest_first][::-1]


def _warm(engine: Engine, order: Order) -> None:
    """Touch every weight and the whole of the buffers, one full chunk at most."""
    reads_prompts = not Path(order.kept_kv).is_file() or order.refill
    largest = max((*order.prompts, *(order.depths if reads_prompts else ()), 1))
    seq_id = engine.open(SAMPLING)
    _feed(engine, seq_id, min(largest, order.plan.max_batch_tokens), sample=True)
    engine.close(seq_id)


def _prompt(engine: Engine, order: Order, length: int) -> Timed:
    """Read a prompt of `length` tokens to its first drawn token."""
    samples = []
    for _ in range(order.repetitions):
        seq_id = engine.open(SAMPLING)
        start_s = time.perf_counter()
        for begin in range(0, length, order.plan.max_batch_tokens):
            rows = min(length - begin, order.plan.max_batch_tokens)
            _feed(engine, seq_id, rows, sample=begin + rows == length)
        samples.append(time.perf_counter() - start_s)
        engine.close(seq_id)
    return Timed(num_prompt=length, samples_s=tuple(samples))


def _fill(engine: Engine, order: Order, seq_id: int, depth: int) -> Iterator[Timed]:
    """Feed up to `depth`, chunk by chunk."""
    while (held := engine.num_tokens(seq_id)) < depth:
        rows = min(depth - held, order.plan.max_batch_tokens)
        start_s = time.perf_counter()
        _feed(engine, seq_id, rows, sample=True)
        sample_s = time.perf_counter() - start_s
        yield Timed(num_prompt=rows, depth=held, samples_s=(sample_s,))


def _decode(engine: Engine, order: Order, seq_id: int, depth: int) -> Timed:
    """Time each of some tokens, and cut them off again."""
    engine.truncate(seq_id, depth)
    samples, token = [], 0
    for _ in range(WARM_TOKENS + order.num_generate):
        start_s = time.perf_counter()
        token = engine.step(StepPlan((Feed(seq_id, (token,)),))).sampled[0].token
        samples.append(time.perf_counter() - start_s)
    engine.truncate(seq_id, depth)
    return Timed(depth=depth, samples_s=tuple(samples[WARM_TOKENS:]))


def _feed(engine: Engine, seq_id: int, rows: int, *, sample: bool) -> None:
    """Tokens that differ, so that no two rows of a batch are the same."""
    held, size = engine.num_tokens(seq_id), engine.tokenizer.vocab_size
    tokens = tuple((held + i) * 7919 % size for i in range(rows))
    engine.step(StepPlan((Feed(seq_id, tokens, sample=sample),)))


def main() -> None:
    """Answer orders until the end of input; a failed one is answered with its error."""
    for line in sys.stdin.buffer:
        order = msgspec.json.decode(line, type=Order)
        try:
            ran = run(order)
        except BrimError as error:
            ran = Ran(error=ErrorInfo.of(error))
        sys.stdout.buffer.write(msgspec.json.encode(ran) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
