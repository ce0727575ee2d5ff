"""What fails or ends in the MLX engine costs as little as can be: loads, passes, draws, closes."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.driver import GREEDY, Run, assert_same, decode, decode_together, feed, generate
from support.mlx_models import family_dir, make_model_dir
from support.models import plan_for

from brim.core.plan import Plan
from brim.core.sampling import SamplingParams
from brim.core.step import Feed, StepPlan
from brim.errors import EngineError, ModelFileError

Load = Callable[[Plan], Any]

PROMPT = [(37 * i * i + 11 * i + 5) % 4096 for i in range(60)]


class Failing:
    """Stands in for a layer; a pass gets as far as here."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, *_arguments: object, **_options: object) -> Any:
        raise ValueError("no such shape")


def layers_of(engine: Any) -> list[Any]:
    layers: list[Any] = engine._decoder._model.model.layers
    return layers


def step_that_fails(engine: Any, feeds: list[Feed]) -> None:
    """A step whose passes end in the last layer, when all others have been fed."""
    layers = layers_of(engine)
    inner, layers[-1] = layers[-1], Failing(layers[-1])
    with pytest.raises(EngineError, match="mlx: ValueError: no such shape"):
        engine.step(StepPlan(feeds))
    layers[-1] = inner


@pytest.mark.parametrize("num_fed", [1, 7])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "deepseek_v3"])
def test_a_pass_that_fails_midway_is_taken_back(load: Load, family: str, num_fed: int) -> None:
    """Layers that were fed when a later one failed forget what they were fed."""
    engine = load(plan_for("mlx", path=family_dir(family)))
    references = [generate(engine, PROMPT, 10), generate(engine, PROMPT[:20], 10)]
    runs = [generate(engine, PROMPT, 5), generate(engine, PROMPT[:20], 5)]
    step_that_fails(engine, [Feed(run.seq_id, [9] * num_fed) for run in runs])
    assert [engine.num_tokens(run.seq_id) for run in runs] == [len(PROMPT) + 4, 24]
    decode_together(engine, runs, 10)
    for reference, run in zip(references, runs, strict=True):
        assert_same(reference, run)


def test_a_failed_pass_ahead_is_taken_back(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the pass ahead of its time had fed to some layers is gone when the step is."""
    engine = load(plan_for("mlx", path=family_dir("llama")))
    reference, run = generate(engine, PROMPT, 10), generate(engine, PROMPT, 5)
    build, layers = engine._decoder.build_ahead, layers_of(engine)

    def fail(*arguments: Any) -> None:
        inner, layers[-1] = layers[-1], Failing(layers[-1])
        try:
            build(*arguments)
        finally:
            layers[-1] = inner

    with monkeypatch.context() as patched:
        patched.setattr(engine._decoder, "build_ahead", fail)
        with pytest.raises(EngineError, match="no such shape"):
            feed(engine, run, [9])
    decode(engine, run, 10)
    assert_same(reference, run)


@pytest.mark.parametrize("family", ["lfm2", "falcon_h1"])
def test_a_recurrent_state_that_was_half_fed_is_given_up(load: Load, family: str) -> None:
    """Nobody can say what a failed pass has left in it; a sequence that was not fed goes on."""
    engine = load(plan_for("mlx", path=family_dir(family)))
    reference = generate(engine, PROMPT, 10)
    spared, lost = generate(engine, PROMPT, 1), generate(engine, PROMPT[:20], 1)
    decode_together(engine, [spared, lost], 5)
    step_that_fails(engine, [Feed(lost.seq_id, [9])])
    with pytest.raises(EngineError, match="close it"):
        feed(engine, lost, [1])
    engine.close(lost.seq_id)
    decode(engine, spared, 10)
    assert_same(reference, spared)


@pytest.mark.parametrize("family", ["llama", "lfm2"])
def test_a_draw_that_nothing_is_left_for_costs_nobody_anything(load: Load, family: str) -> None:
    """It is refused before anything is fed, for states could not be taken back, nor numbers."""
    engine = load(plan_for("mlx", path=family_dir(family)))
    sampling = SamplingParams(temperature=1.0, seed=5)
    reference = generate(engine, PROMPT, 10, sampling)
    run, other = generate(engine, PROMPT, 5, sampling), Run(engine.open(GREEDY))
    engine.step(StepPlan([Feed(other.seq_id, PROMPT[:9], False)]))
    closed = Run(engine.open(SamplingParams(logit_bias=((3, -np.inf),))))
    only = bytearray((engine.tokenizer.vocab_size + 7) // 8)
    only[0] = 1 << 3
    feeds = [Feed(run.seq_id, run.tokens[-1:]), Feed(closed.seq_id, [1, 2], mask=bytes(only))]
    with pytest.raises(EngineError, match="allow no token"):
        engine.step(StepPlan([*feeds, Feed(other.seq_id, [4])]))
    assert engine.num_tokens(closed.seq_id) == 0
    assert engine.num_tokens(other.seq_id) == 9
    decode(engine, run, 10)
    assert_same(reference, run)


def test_closing_never_fails(load: Load) -> None:
    """A pass that was under way for a closed sequence and failed is nobody's trouble any more."""
    import mlx.core as mx

    if mx.default_device() != mx.cpu:
        pytest.skip("only the CPU backend lacks the operation that this relies on")
    engine = load(plan_for("mlx", max_sequences=1))
    reference = generate(engine, PROMPT, 5)
    matrices, rows = mx.zeros((2, 8, 8), mx.bfloat16), mx.zeros((1, 1, 8), mx.bfloat16)
    failing = mx.gather_mm(rows, matrices, rhs_indices=mx.zeros((1,), mx.uint32))
    engine._decoder._awaited.append(failing)
    engine.close(reference.seq_id)
    assert_same(reference, generate(engine, PROMPT, 5))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "deepseek_v3"])
def test_a_closed_sequence_is_not_kept_for_those_that_it_stepped_with(
    load: Load, family: str
) -> None:
    """Its memory is free at once: whoever is admitted in its place reads before the others step."""
    import mlx.core as mx

    engine = load(plan_for("mlx", path=family_dir(family)))
    runs = [generate(engine, PROMPT, 1) for _ in range(8)]
    decode_together(engine, runs, 4)
    mx.synchronize()
    before, kv_bytes = mx.get_active_memory(), engine.footprint().kv_bytes
    for run in runs[1:]:
        engine.close(run.seq_id)
    mx.synchronize()
    assert before - mx.get_active_memory() >= 7 / 8 * kv_bytes
    reference = generate(engine, PROMPT, 8)
    decode(engine, runs[0], 8)
    assert_same(reference, runs[0])


def test_a_fork_takes_what_it_holds_where_no_bound_is_known(load: Load) -> None:
    """A target that was opened without a bound does not take the whole window's cells."""
    engine = load(plan_for("mlx", context_tokens=65_536, kv_tokens=65_536))
    source, target = generate(engine, PROMPT, 1), engine.open(GREEDY)
    before = engine.footprint().kv_bytes
    engine.fork(source.seq_id, target, 50)
    assert engine.footprint().kv_bytes <= 2 * before


def test_logits_are_those_of_the_last_step(load: Load) -> None:
    """A sequence that was not in it has none, rather than another's."""
    engine = load(plan_for("mlx"))
    first, second = generate(engine, PROMPT, 2), generate(engine, PROMPT[:5], 2)
    assert len(engine.logits(second.seq_id)) == engine.tokenizer.vocab_size
    with pytest.raises(EngineError, match="no logits"):
        engine.logits(first.seq_id)


def test_a_model_that_fails_its_first_pass_is_an_error_in_words(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the backend raises when a model is tried out names the engine, and leaves no weights."""
    import mlx.core as mx

    directory = family_dir("llama")

    def fail(*_arguments: object, **_options: object) -> None:
        raise RuntimeError("no kernel for it")

    gc.collect()  # engines of earlier tests
    before = mx.get_active_memory()
    with monkeypatch.context() as patched:
        patched.setattr("brim.engine.mlx.decode.Decoder.decode", fail)
        with pytest.raises(EngineError, match="mlx: RuntimeError: no kernel"):
            load(plan_for("mlx", path=directory))
    gc.collect()
    assert mx.get_active_memory() <= before


def test_a_damaged_tokenizer_is_found_before_weights_are_read(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes a moment to see, and a large model's weights take minutes."""
    directory = make_model_dir(tmp_path / "m", "llama")
    (directory / "tokenizer.json").write_text("{")
    monkeypatch.setattr("brim.engine.mlx.loading.load", lambda _plan: pytest.fail("read weights"))
    with pytest.raises(ModelFileError, match="is damaged"):
        load(plan_for("mlx", path=directory))
