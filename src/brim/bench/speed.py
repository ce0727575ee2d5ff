"""Prefill and decode rates of a loaded engine at several depths, without a server around it.

Rows carry llama-bench's field names (`pp512`, `tg128`, `@ d4096`, `avg_ts`, `samples_ns`, ...), so
that the two can be laid side by side; median and range are added, because a mean hides drift.  One
difference: decode here draws a token from every step, since that is what an answer costs.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence

import msgspec

from brim.bench.stats import summarise
from brim.core.plan import Plan
from brim.core.sampling import SamplingParams
from brim.core.step import Feed, StepPlan
from brim.engine.base import Engine
from brim.errors import InvalidRequest

Progress = Callable[[str], None]
Clock = Callable[[], int]

SAMPLING = SamplingParams(temperature=0.0, ignore_eos=True)
"""Greedy, and never ending early."""

SEED = 1
"""Of the random prompt tokens; their values do not change the work, repeating them does no harm."""


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One thing to time: reading `num_prompt` tokens, or producing `num_generate`, at a depth."""

    num_prompt: int = 0
    num_generate: int = 0
    depth: int = 0
    """Tokens that are in the sequence already, not timed."""

    @property
    def name(self) -> str:
        """llama-bench's name of it.

        Example:
            >>> Case(num_prompt=512, depth=4096).name
            'pp512 @ d4096'
        """
        test = f"pp{self.num_prompt}" if self.num_prompt else f"tg{self.num_generate}"
        return f"{test} @ d{self.depth}" if self.depth else test

    @property
    def num_timed(self) -> int:
        """Tokens that the rate counts."""
        return self.num_prompt or self.num_generate

    @property
    def num_tokens(self) -> int:
        """Cells that the sequence needs."""
        return self.depth + self.num_timed


def cases(prompts: Sequence[int], generates: Sequence[int], depths: Sequence[int]) -> list[Case]:
    """Every prompt and generate length at every depth, in llama-bench's order.

    Raises:
        InvalidRequest: A length or depth is negative, or nothing is left to measure.
    """
    if any(length < 0 for length in (*prompts, *generates, *depths)):
        raise InvalidRequest("lengths and depths are numbers of tokens and cannot be negative")
    found = [
        case
        for depth in depths
        for case in (
            *(Case(num_prompt=length, depth=depth) for length in prompts if length),
            *(Case(num_generate=length, depth=depth) for length in generates if length),
        )
    ]
    if not found:
        raise InvalidRequest("nothing to measure; give at least one --prompt or --generate length")
    return found


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One case's samples under llama-bench's field names; `_ts` is tokens a second."""

    test: str
    model_filename: str
    model_type: str
    model_size: int
    model_n_params: int
    engine: str
    n_threads: int
    n_batch: int
    n_ubatch: int
    type_k: str
    type_v: str
    flash_attn: bool
    repack: bool
    n_prompt: int
    n_gen: int
    n_depth: int
    avg_ns: int
    stddev_ns: int
    avg_ts: float
    stddev_ts: float
    median_ts: float
    min_ts: float
    max_ts: float
    samples_ns: tuple[int, ...]
    samples_ts: tuple[float, ...]


def measure(
    engine: Engine,
    plan: Plan,
    wanted: Sequence[Case],
    *,
    repetitions: int,
    progress: Progress = lambda _: None,
    clock: Clock = time.perf_counter_ns,
) -> Iterator[Row]:
    """Time each case `repetitions` times after one untimed run; yields a row as each is done.

    Raises:
        InvalidRequest: A case is longer than the plan's KV pool; says by how much.
    """
    longest = max(case.num_tokens for case in wanted)
    if longest > plan.kv_tokens:
        raise InvalidRequest(
            f"the longest case needs {longest} tokens of KV, the plan has {plan.kv_tokens}; "
            f"shorten it by {longest - plan.kv_tokens}"
        )
    for case in wanted:
        progress(f"{case.name}: {repetitions} repetitions")
        yield _row(plan, case, _samples_ns(engine, plan, case, repetitions, clock))


def _samples_ns(
    engine: Engine, plan: Plan, case: Case, repetitions: int, clock: Clock
) -> list[int]:
    rng = random.Random(SEED)
    tokens = [rng.randrange(engine.tokenizer.vocab_size) for _ in range(case.num_tokens + 1)]
    samples = []
    seq_id = None
    try:
        # The first run warms caches and lazily allocated buffers; it is not counted.
        for _ in range(repetitions + 1):
            seq_id = _at_depth(engine, plan, seq_id, tokens[: case.depth])
            start_ns = clock()
            if case.num_prompt:
                _prefill(engine, plan, seq_id, tokens[case.depth : case.num_tokens], sample=True)
            else:
                _decode(engine, seq_id, tokens[-1], case.num_generate)
            samples.append(clock() - start_ns)
    finally:
        if seq_id is not None:
            engine.close(seq_id)
    return samples[1:]


def _at_depth(engine: Engine, plan: Plan, seq_id: int | None, tokens: list[int]) -> int:
    """A sequence that holds just `tokens`: the one from the last run cut back where it can be."""
    if seq_id is not None and tokens and engine.capabilities.can_truncate:
        engine.truncate(seq_id, len(tokens))
        return seq_id
    if seq_id is not None:
        engine.close(seq_id)
    seq_id = engine.open(SAMPLING)
    _prefill(engine, plan, seq_id, tokens, sample=False)
    return seq_id


def _prefill(engine: Engine, plan: Plan, seq_id: int, tokens: list[int], *, sample: bool) -> None:
    """Feed in the largest chunks that a step takes; draw a token at the end if asked."""
    for start in range(0, len(tokens), plan.max_batch_tokens):
        chunk = tokens[start : start + plan.max_batch_tokens]
        is_last = start + len(chunk) == len(tokens)
        engine.step(StepPlan((Feed(seq_id, chunk, sample=sample and is_last),)))


def _decode(engine: Engine, seq_id: int, token: int, num_tokens: int) -> None:
    for _ in range(num_tokens):
        token = engine.step(StepPlan((Feed(seq_id, (token,)),))).sampled[0].token


def _row(plan: Plan, case: Case, samples_ns: list[int]) -> Row:
    rates = [case.num_timed * 1e9 / max(sample_ns, 1) for sample_ns in samples_ns]
    time_ns, rate = summarise([float(sample_ns) for sample_ns in samples_ns]), summarise(rates)
    model = plan.model
    return Row(
        test=case.name,
        model_filename=model.paths[0] if model.paths else model.name,
        model_type=f"{model.architecture} {model.quant}".strip(),
        model_size=model.weights_bytes,
        model_n_params=model.num_parameters,
        engine=plan.engine,
        n_threads=plan.num_threads if case.num_generate else plan.num_batch_threads,
        n_batch=plan.max_batch_tokens,
        n_ubatch=plan.micro_batch_tokens,
        type_k=plan.kv_type_k,
        type_v=plan.kv_type_v,
        flash_attn=plan.flash_attention,
        repack=plan.repack_weights,
        n_prompt=case.num_prompt,
        n_gen=case.num_generate,
        n_depth=case.depth,
        avg_ns=round(time_ns.mean),
        stddev_ns=round(time_ns.stddev),
        avg_ts=rate.mean,
        stddev_ts=rate.stddev,
        median_ts=rate.median,
        min_ts=rate.minimum,
        max_ts=rate.maximum,
        samples_ns=tuple(samples_ns),
        samples_ts=tuple(rates),
    )
