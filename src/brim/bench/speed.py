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
    """Tokens that are in each sequence already, not timed."""
    num_sequences: int = 1
    """That produce tokens together; a prompt is read alone."""

    @property
    def name(self) -> str:
        """llama-bench's name of it, and how many sequences where there are several.

        Example:
            >>> Case(num_prompt=512, depth=4096).name, Case(num_generate=32, num_sequences=8).name
            ('pp512 @ d4096', 'tg32 x8')
        """
        test = f"pp{self.num_prompt}" if self.num_prompt else f"tg{self.num_generate}"
        if self.num_sequences > 1:
            test += f" x{self.num_sequences}"
        return f"{test} @ d{self.depth}" if self.depth else test

    @property
    def num_timed(self) -> int:
        """Tokens that the rate counts, of all sequences."""
        return (self.num_prompt or self.num_generate) * self.num_sequences

    @property
    def sequence_tokens(self) -> int:
        """Cells that one sequence needs."""
        return self.depth + (self.num_prompt or self.num_generate)

    @property
    def num_tokens(self) -> int:
        """Cells that all sequences need."""
        return self.sequence_tokens * self.num_sequences


def cases(
    prompts: Sequence[int],
    generates: Sequence[int],
    depths: Sequence[int],
    batches: Sequence[int] = (1,),
) -> list[Case]:
    """Every prompt and generate length at every depth, in llama-bench's order.

    Args:
        prompts: Lengths of prompts; 0 is left out.
        generates: Lengths of answers; 0 is left out.
        depths: Tokens that are there before.
        batches: Numbers of sequences that produce tokens together.

    Raises:
        InvalidRequest: A length or depth is negative, or nothing is left to measure.
    """
    if any(length < 0 for length in (*prompts, *generates, *depths)):
        raise InvalidRequest("lengths and depths are numbers of tokens and cannot be negative")
    if any(batch < 1 for batch in batches):
        raise InvalidRequest("a batch has at least one sequence")
    found = [
        case
        for depth in depths
        for case in (
            *(Case(num_prompt=length, depth=depth) for length in prompts if length),
            *(
                Case(num_generate=length, depth=depth, num_sequences=batch)
                for length in generates
                if length
                for batch in batches
            ),
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
    n_seq: int
    """Sequences that produced tokens together; rates count all of theirs."""
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
    check_cases(plan, wanted)
    timer = Timer(engine, plan, clock)
    try:
        for case in wanted:
            progress(f"{case.name}: {repetitions} repetitions")
            # The first run warms caches and lazily allocated buffers; it is not counted.
            samples_ns = [timer.sample_ns(case) for _ in range(repetitions + 1)][1:]
            yield row(plan, case, samples_ns)
    finally:
        timer.close()


def check_cases(plan: Plan, wanted: Sequence[Case]) -> None:
    """Refuse what the plan has no room for, before anything is measured.

    Raises:
        InvalidRequest: A case needs more KV or sequences than the plan has.
    """
    longest = max(case.num_tokens for case in wanted)
    if longest > plan.kv_tokens:
        raise InvalidRequest(
            f"the longest case needs {longest} tokens of KV, the plan has {plan.kv_tokens}; "
            f"shorten it by {longest - plan.kv_tokens}"
        )
    widest = max(case.num_sequences for case in wanted)
    if widest > plan.max_sequences:
        raise InvalidRequest(
            f"a case has {widest} sequences, the plan {plan.max_sequences}; make --batch smaller"
        )


class Timer:
    """Runs cases on a loaded engine; repeats of one find their sequences filled to its depth."""

    def __init__(self, engine: Engine, plan: Plan, clock: Clock = time.perf_counter_ns) -> None:
        self._engine = engine
        self._plan = plan
        self._clock = clock
        self._case: Case | None = None
        self._sequences: list[int] = []

    def sample_ns(self, case: Case) -> int:
        """One run of `case`; the first one of a case includes its warming up."""
        engine = self._engine
        prompts = _tokens(case, engine.tokenizer.vocab_size)
        self._fill(case, prompts)
        start_ns = self._clock()
        if case.num_prompt:
            (seq_id,) = self._sequences
            _prefill(engine, self._plan, seq_id, prompts[0][case.depth : -1], sample=True)
        else:
            _decode(engine, self._sequences, [prompt[-1] for prompt in prompts], case.num_generate)
        return self._clock() - start_ns

    def close(self) -> None:
        """Close what is open."""
        while self._sequences:
            self._engine.close(self._sequences.pop())
        self._case = None

    def _fill(self, case: Case, prompts: list[list[int]]) -> None:
        """Have sequences that hold just the depth: the last run's cut back where they can be."""
        engine, depth = self._engine, case.depth
        can_keep = all(engine.can_keep(seq_id, depth) for seq_id in self._sequences)
        if self._case == case and depth and can_keep:
            for seq_id in self._sequences:
                engine.truncate(seq_id, depth)
            return
        self.close()
        for prompt in prompts:
            # The bound keeps an engine that works ahead from going on after the last token.
            seq_id = engine.open(SAMPLING, case.sequence_tokens)
            self._sequences.append(seq_id)
            if depth and len(self._sequences) > 1 and not engine.capabilities.forks_share_kv:
                # A copy is as much to read as tokens of its own; shared cells are read once.
                engine.fork(self._sequences[0], seq_id, depth)
            else:
                _prefill(engine, self._plan, seq_id, prompt[:depth], sample=False)
        self._case = case


def _tokens(case: Case, vocab_size: int) -> list[list[int]]:
    """Each sequence's tokens, and one more to begin an answer with."""
    rng = random.Random(SEED)
    return [
        [rng.randrange(vocab_size) for _ in range(case.sequence_tokens + 1)]
        for _ in range(case.num_sequences)
    ]


def _prefill(engine: Engine, plan: Plan, seq_id: int, tokens: list[int], *, sample: bool) -> None:
    """Feed in the largest chunks that a step takes; draw a token at the end if asked."""
    for start in range(0, len(tokens), plan.max_batch_tokens):
        chunk = tokens[start : start + plan.max_batch_tokens]
        is_last = start + len(chunk) == len(tokens)
        engine.step(StepPlan((Feed(seq_id, chunk, sample=sample and is_last),)))


def _decode(engine: Engine, sequences: list[int], tokens: list[int], num_tokens: int) -> None:
    for _ in range(num_tokens):
        feeds = [Feed(seq_id, (token,)) for seq_id, token in zip(sequences, tokens, strict=True)]
        tokens = [sampled.token for sampled in engine.step(StepPlan(feeds)).sampled]


def row(plan: Plan, case: Case, samples_ns: Sequence[int]) -> Row:
    """A case's figures, of samples that were taken of it under this plan."""
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
        n_threads=(
            plan.num_threads
            if case.num_generate and case.num_sequences == 1
            else plan.num_batch_threads
        ),
        n_batch=plan.max_batch_tokens,
        n_ubatch=plan.micro_batch_tokens,
        type_k=plan.kv_type_k,
        type_v=plan.kv_type_v,
        flash_attn=plan.flash_attention,
        repack=plan.repack_weights,
        n_prompt=case.num_prompt,
        n_gen=case.num_generate,
        n_depth=case.depth,
        n_seq=case.num_sequences,
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
