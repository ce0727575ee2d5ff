"""Passes that go ahead of their time: kept when they were wanted, and without a trace when not."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import require_engine
from support.driver import Run, assert_same, decode, feed, generate
from support.mlx_models import make_model_dir
from support.models import plan_for

from brim.core.sampling import SamplingParams
from brim.core.step import Feed, StepPlan
from brim.engine import factory

require_engine("mlx")

GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module", params=["llama", "lfm2"])
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Attention alone, and attention beside recurrent state."""
    path = tmp_path_factory.mktemp("models") / str(request.param)
    return make_model_dir(path, str(request.param))


class Counted:
    """A model that notes how many rows each pass carried."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.rows: list[int] = []

    def __call__(self, tokens: Any, **options: Any) -> Any:
        self.rows.append(tokens.shape[0])
        return self.model(tokens, **options)


@pytest.fixture
def engine(model_dir: Path) -> Iterator[Any]:
    engine = factory.create("mlx")
    engine.load(plan_for("mlx", path=model_dir))
    yield engine
    engine.shutdown()


@pytest.fixture
def passes(engine: Any) -> list[int]:
    """Rows of every decode pass that the engine makes from here on."""
    counted = Counted(engine._decoder._model)
    engine._decoder._model = counted
    return counted.rows


def step(engine: Any, runs: Sequence[Run]) -> None:
    """One decode step of all runs."""
    result = engine.step(StepPlan([Feed(run.seq_id, [run.tokens[-1]]) for run in runs]))
    for run, sampled in zip(runs, result.sampled, strict=True):
        run.tokens.append(sampled.token)


def test_a_pass_that_went_ahead_is_not_made_again(engine: Any, passes: list[int]) -> None:
    """Each step of three sequences makes one pass: the next one's."""
    runs = [generate(engine, [1, 2, 3 + n], 1, GREEDY) for n in range(3)]
    step(engine, runs)
    passes.clear()
    for _ in range(4):
        step(engine, runs)
    assert passes == [3, 3, 3, 3]


def test_the_others_keep_their_rows_when_one_ends(engine: Any, passes: list[int]) -> None:
    """A sequence that is closed costs the ones beside it no second pass, and changes nothing."""
    alone = [generate(engine, [1, 2, 3 + n], 6, GREEDY) for n in range(3)]
    for run in alone:
        engine.close(run.seq_id)
    runs = [generate(engine, [1, 2, 3 + n], 1, GREEDY) for n in range(3)]
    step(engine, runs)
    engine.close(runs[1].seq_id)
    passes.clear()
    left = [runs[0], runs[2]]
    for _ in range(4):
        step(engine, left)
    assert passes == [2, 2, 2, 2]
    assert [run.tokens for run in left] == [alone[0].tokens, alone[2].tokens]


def test_another_token_than_the_drawn_one_is_computed_anew(engine: Any) -> None:
    """What went ahead with the wrong token leaves no trace in the sequence that is fed another."""
    prompt, other = [5, 6, 7, 8], 11
    run = generate(engine, prompt, 1, GREEDY)
    assert run.tokens[0] != other
    fed = Run(run.seq_id)
    feed(engine, fed, [other])
    decode(engine, fed, 5)
    assert_same(generate(engine, [*prompt, other], 5, GREEDY), fed)


def test_a_newcomer_joins_without_a_second_pass_of_the_others(
    engine: Any, passes: list[int]
) -> None:
    """Rows that went ahead are used beside the first step of a sequence that did not."""
    runs = [generate(engine, [1, 2, 3], 1, GREEDY), generate(engine, [4, 5], 1, GREEDY)]
    step(engine, runs)
    newcomer = Run(engine.open(GREEDY))
    engine.step(StepPlan([Feed(newcomer.seq_id, [9, 9], False)]))
    newcomer.tokens.append(9)
    step(engine, runs)
    passes.clear()
    step(engine, [*runs, newcomer])
    assert passes == [1, 3]


def test_a_sequence_at_its_bound_does_not_go_ahead(engine: Any, passes: list[int]) -> None:
    """Nothing is computed behind the last token that a sequence will be fed."""
    run = Run(engine.open(GREEDY, 4))
    feed(engine, run, [1, 2, 3])
    passes.clear()
    feed(engine, run, [run.tokens[-1]])
    assert passes == []
    assert engine._decoder._ahead is None


def test_decoding_copies_no_cache(tmp_path: Path) -> None:
    """Steps write their rows into the sequence's buffers; none of them takes a second copy."""
    import mlx.core as mx

    engine: Any = factory.create("mlx")
    engine.load(plan_for("mlx", path=make_model_dir(tmp_path / "m", "llama"), kv_tokens=100_000))
    run = Run(engine.open(GREEDY, 500))
    feed(engine, run, [1, 2, 3])
    kv_bytes = engine.footprint().kv_bytes
    decode(engine, run, 3)
    mx.synchronize()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    decode(engine, run, 9)
    mx.synchronize()
    assert mx.get_peak_memory() - before < kv_bytes / engine._plan.model.num_layers / 2
    engine.shutdown()


def test_states_that_went_together_part_where_nothing_went_ahead(engine: Any) -> None:
    """Two sequences at their bounds are still joined; what is taken of one has its state."""
    prompts = ([5, 6, 7, 8], [9, 3])
    alone = [generate(engine, prompt, 2, GREEDY) for prompt in prompts]
    runs = [Run(engine.open(GREEDY, len(prompt))) for prompt in prompts]
    pairs = list(zip(runs, prompts, strict=True))
    engine.step(StepPlan([Feed(run.seq_id, prompt[:-1], False) for run, prompt in pairs]))
    engine.step(StepPlan([Feed(run.seq_id, prompt[-1:]) for run, prompt in pairs]))
    assert engine._decoder._ahead is None
    block = engine.export_kv(runs[0].seq_id)
    moved, forked = Run(engine.open(GREEDY)), Run(engine.open(GREEDY))
    engine.import_kv(moved.seq_id, block)
    engine.fork(runs[1].seq_id, forked.seq_id, len(prompts[1]))
    for run, reference in zip((moved, forked), alone, strict=True):
        feed(engine, run, reference.tokens[:1])
        assert np.array_equal(run.logits[0], reference.logits[1])


def test_the_pass_that_draws_waits_for_the_piece_before_it(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started while the piece is under way it would copy the whole cache; another's harms none."""
    run, other = Run(engine.open(GREEDY)), Run(engine.open(GREEDY))
    waits, wait = [], engine._decoder.wait

    def noted() -> None:
        waits.append("a wait")
        wait()

    monkeypatch.setattr(engine._decoder, "wait", noted)
    engine.submit(StepPlan([Feed(other.seq_id, [1, 2, 3], False), Feed(run.seq_id, [4])]))
    assert len(waits) == 0
    engine.collect()
    waits.clear()
    engine.submit(StepPlan([Feed(other.seq_id, [5, 6, 7, 8])]))
    assert len(waits) == 1
    engine.collect()
