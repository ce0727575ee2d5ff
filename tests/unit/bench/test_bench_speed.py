"""Timing an engine, on the toy engine with a clock that counts steps."""

import itertools

import msgspec
import pytest

from brim.bench.speed import Case, Row, Timer, cases, measure
from brim.core.memory import MemoryTerms
from brim.core.model import ModelSpec
from brim.core.plan import Objective, Plan
from brim.core.sampling import SamplingParams
from brim.core.step import StepPlan
from brim.engine.base import Capabilities
from brim.engine.toy import ToyEngine
from brim.errors import InvalidRequest

MODEL = ModelSpec(
    name="toy", paths=(), format="toy", architecture="toy", fingerprint="", num_parameters=0,
    weights_bytes=0, num_layers=1, hidden_size=1, num_heads=1, num_kv_heads=(1,), key_dim=1,
    value_dim=1, vocab_size=259, trained_context_tokens=4096,
)  # fmt: skip

PLAN = Plan(
    model=MODEL, engine="toy", objective=Objective.DECODE, context_tokens=1024, kv_tokens=1024,
    max_sequences=1, max_batch_tokens=64, micro_batch_tokens=64, kv_type_k="f16",
    kv_type_v="f16", flash_attention=False, repack_weights=False, num_threads=1,
    num_batch_threads=1, environment={},
    memory=MemoryTerms(weights_bytes=0, kv_bytes=0, compute_bytes=0, overhead_bytes=0), reasons={},
)  # fmt: skip


class Recording(ToyEngine):
    """The toy engine, keeping the number of rows of each step and where each began."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = []

    def submit(self, plan: StepPlan) -> None:
        (feed,) = plan.feeds
        self.steps.append((self.num_tokens(feed.seq_id), len(feed.tokens)))
        super().submit(plan)


def measured(case: Case, engine: Recording, repetitions: int = 2) -> Row:
    engine.load(PLAN)
    # The warm-up takes 9 s and each run after it 1 s.
    seconds = itertools.chain((0, 9), itertools.count(10))
    (row,) = measure(
        engine, PLAN, [case], repetitions=repetitions, clock=lambda: next(seconds) * 10**9
    )
    assert engine.footprint().kv_bytes == 8 * PLAN.kv_tokens
    return row


def test_a_prompt_is_read_in_the_largest_chunks_from_its_depth() -> None:
    """Each repetition starts at the same depth, which is filled once and not timed."""
    engine = Recording()
    row = measured(Case(num_prompt=100, depth=70), engine)
    filling, timed = [(0, 64), (64, 6)], [(70, 64), (134, 36)]
    assert engine.steps == filling + 3 * timed
    assert row.test == "pp100 @ d70"
    assert row.samples_ts == (100.0, 100.0)


def test_decode_feeds_one_token_a_step() -> None:
    """A generation of 3 tokens is 3 steps of one row after the depth, and a warm-up first."""
    engine = Recording()
    row = measured(Case(num_generate=3, depth=10), engine, repetitions=1)
    assert engine.steps == [(0, 10), *2 * [(10, 1), (11, 1), (12, 1)]]
    assert (row.n_prompt, row.n_gen, row.n_depth) == (0, 3, 10)
    assert row.samples_ns == (1_000_000_000,)
    assert row.median_ts == row.avg_ts == 3.0


def test_a_state_that_cannot_be_cut_is_read_again() -> None:
    """Recurrent models get their depth anew for every repetition."""

    class Uncut(Recording):
        capabilities: Capabilities = msgspec.structs.replace(
            ToyEngine.capabilities, can_truncate=False
        )

    engine = Uncut()
    measured(Case(num_generate=1, depth=5), engine)
    assert engine.steps == 3 * [(0, 5), (5, 1)]


def test_the_sequence_is_closed_when_the_engine_fails() -> None:
    """A failed measurement leaves the engine empty."""

    class Failing(Recording):
        def submit(self, plan: StepPlan) -> None:
            if len(self.steps) == 1:
                raise RuntimeError("broken")
            super().submit(plan)

    engine = Failing()
    with pytest.raises(RuntimeError, match="broken"):
        measured(Case(num_prompt=100), engine)
    # The plan has one sequence: opening it shows that the failed one is gone.
    assert engine.open(SamplingParams()) == 0


def test_a_case_longer_than_the_pool_is_refused() -> None:
    """The message has the numbers, before anything was measured."""
    engine = Recording()
    engine.load(PLAN)
    with pytest.raises(InvalidRequest, match="needs 1030 tokens of KV, the plan has 1024"):
        list(measure(engine, PLAN, [Case(num_prompt=1000, depth=30)], repetitions=1))
    assert engine.steps == []


def test_cases_are_every_length_at_every_depth() -> None:
    """The order is llama-bench's, and a length of 0 leaves the test out."""
    names = [case.name for case in cases([512, 0], [128], [0, 4096])]
    assert names == ["pp512", "tg128", "pp512 @ d4096", "tg128 @ d4096"]


@pytest.mark.parametrize(("prompts", "generates", "depths"), [([-1], [], [0]), ([0], [0], [0])])
def test_lengths_that_measure_nothing_are_refused(
    prompts: list[int], generates: list[int], depths: list[int]
) -> None:
    """Negative lengths and an empty choice are the caller's to mend."""
    with pytest.raises(InvalidRequest):
        cases(prompts, generates, depths)


def test_a_batch_decodes_together_and_counts_every_sequence() -> None:
    """Each of three sequences is filled with tokens of its own, then one row of each a step."""

    class Batched(ToyEngine):
        def __init__(self) -> None:
            self.steps: list[list[int]] = []
            self.fed: list[tuple[int, ...]] = []

        def submit(self, plan: StepPlan) -> None:
            self.steps.append([feed.seq_id for feed in plan.feeds])
            self.fed += [tuple(feed.tokens) for feed in plan.feeds]
            super().submit(plan)

    plan = msgspec.structs.replace(PLAN, max_sequences=3)
    engine = Batched()
    engine.load(plan)
    case = Case(num_generate=2, num_sequences=3, depth=5)
    seconds = itertools.count()
    (row,) = measure(engine, plan, [case], repetitions=1, clock=lambda: next(seconds) * 10**9)
    assert engine.steps == [[0], [1], [2], *4 * [[0, 1, 2]]]
    assert len(set(engine.fed[:3])) == 3
    assert (row.test, row.n_seq, row.median_ts) == ("tg2 x3 @ d5", 3, 6.0)


def test_a_batch_is_copied_where_a_fork_shares_nothing() -> None:
    """Reading the same depth eight times over would take minutes on a CPU."""

    class Copying(Recording):
        capabilities: Capabilities = msgspec.structs.replace(
            ToyEngine.capabilities, forks_share_kv=False
        )

        def submit(self, plan: StepPlan) -> None:
            self.steps.append((len(plan.feeds), plan.num_scheduled_tokens))
            ToyEngine.submit(self, plan)

    plan = msgspec.structs.replace(PLAN, max_sequences=3)
    engine = Copying()
    engine.load(plan)
    Timer(engine, plan).sample_ns(Case(num_generate=1, num_sequences=3, depth=5))
    assert engine.steps == [(1, 5), (3, 3)]
    assert [engine.num_tokens(seq_id) for seq_id in range(3)] == [6, 6, 6]


def test_sequences_are_opened_at_the_length_that_they_reach() -> None:
    """An engine that works ahead then does nothing after the last token of a run."""
    bounds: list[int | None] = []

    class Bounded(Recording):
        def open(self, sampling: SamplingParams, max_tokens: int | None = None) -> int:
            bounds.append(max_tokens)
            return super().open(sampling, max_tokens)

    measured(Case(num_prompt=30, depth=10), Bounded())
    assert bounds == [40]


def test_batches_are_made_of_decode_alone() -> None:
    """A prompt is read by itself; a batch has at least one sequence."""
    names = [case.name for case in cases([512], [32], [0], [1, 8])]
    assert names == ["pp512", "tg32", "tg32 x8"]
    with pytest.raises(InvalidRequest, match="at least one sequence"):
        cases([512], [32], [0], [0])
