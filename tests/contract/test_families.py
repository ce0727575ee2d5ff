"""Every kind of cache keeps the contract, as far as it can be kept: one run for each model family.

Windows, recurrent states and hybrids cannot be cut; for them, capabilities say so, what is left of
the promises holds, and the rest is refused with a sentence.
"""

from collections.abc import Callable, Iterator

import pytest
from conftest import require_engine
from support.driver import (
    GREEDY,
    Run,
    assert_same,
    decode,
    decode_together,
    feed,
    generate,
    prefill,
)
from support.mlx_models import FAMILIES, ROUNDED_CHUNKS, ROUNDING, WINDOW, family_dir
from support.models import plan_for

from brim.core.step import Feed, StepPlan
from brim.engine import factory
from brim.engine.base import Engine
from brim.errors import EngineError

NUM_TOKENS = 12

CUTTABLE = {"llama", "qwen2", "qwen3", "qwen3_moe", "deepseek_v3"}
"""Families whose layers all keep every token."""

PROMPT = [(37 * i * i + 11 * i + 5) % 4096 for i in range(3 * WINDOW)]
"""Three windows of distinct tokens."""


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    require_engine("mlx")
    return str(request.param)


@pytest.fixture
def rounding(family: str) -> float:
    """How far logits may be apart where a prompt was read in other pieces."""
    return ROUNDING if family in ROUNDED_CHUNKS else 0.0


@pytest.fixture
def engine(family: str) -> Iterator[Engine]:
    engine = factory.create("mlx")
    engine.load(plan_for("mlx", path=family_dir(family)))
    yield engine
    engine.shutdown()


def test_capabilities_say_what_each_family_can(engine: Engine, family: str) -> None:
    """A cache that keeps every token can be cut anywhere; all batch; some round by piece."""
    capabilities = engine.capabilities
    assert capabilities.can_truncate == (family in CUTTABLE)
    assert capabilities.can_fork_prefix == (family in CUTTABLE)
    assert capabilities.batches_sequences
    assert capabilities.exact_profile == (family not in ROUNDED_CHUNKS)


def test_batched_equals_alone(engine: Engine) -> None:
    """Sequences before, across and after the window's edge decode together as each does alone."""
    prompts = [PROMPT[i : i + 5 + 12 * i] for i in range(8)]
    alone = []
    for one in prompts:
        run = generate(engine, one, NUM_TOKENS)
        engine.close(run.seq_id)
        alone.append(run)
    together = [generate(engine, one, 1) for one in prompts]
    decode_together(engine, together, NUM_TOKENS)
    for left, right in zip(alone, together, strict=True):
        assert_same(left, right)
    assert len({tuple(run.tokens) for run in alone}) == len(alone)


@pytest.mark.parametrize("chunk", [1, 7, 32, 50])
def test_prefill_in_chunks_equals_whole(engine: Engine, chunk: int, rounding: float) -> None:
    """A prompt read in chunks of any size gives the run of a prompt read at once."""
    whole = generate(engine, PROMPT, NUM_TOKENS)
    chunked = generate(engine, PROMPT, NUM_TOKENS, chunk=chunk)
    assert_same(whole, chunked, rounding=rounding)


def test_decoding_beside_a_prefill_equals_alone(engine: Engine, rounding: float) -> None:
    """A sequence that decodes in the steps of another's prefill is not changed by it, nor it."""
    reference, long_reference = generate(engine, PROMPT[:30], 8), generate(engine, PROMPT, 4)
    run, reader = generate(engine, PROMPT[:30], 1), Run(engine.open(GREEDY))
    for start in range(0, len(PROMPT) - 1, 19):
        chunk = Feed(reader.seq_id, PROMPT[start : min(start + 19, len(PROMPT) - 1)], False)
        result = engine.step(StepPlan([chunk, Feed(run.seq_id, run.tokens[-1:])]))
        run.tokens.append(result.sampled[0].token)
        run.logits.append(engine.logits(run.seq_id).copy())
    decode(engine, run, 8)
    feed(engine, reader, PROMPT[-1:])
    decode(engine, reader, 4)
    assert_same(reference, run)
    assert_same(long_reference, reader, rounding=rounding)


def test_exported_and_imported_equals_recomputed(engine: Engine) -> None:
    """A sequence that left memory and came back goes on as if it had stayed."""
    reference = generate(engine, PROMPT, NUM_TOKENS)
    source = generate(engine, PROMPT, 5)
    blob = bytes(engine.export_kv(source.seq_id))
    engine.close(source.seq_id)
    target = Run(engine.open(GREEDY), source.tokens, source.logits)
    engine.import_kv(target.seq_id, blob)
    assert engine.num_tokens(target.seq_id) == len(PROMPT) + 4
    decode(engine, target, NUM_TOKENS)
    assert_same(reference, target)


def test_a_whole_fork_equals_recomputed(engine: Engine, rounding: float) -> None:
    """A copy of a whole sequence goes its own way, and its source is not changed by that."""
    other = PROMPT[40:52]
    reference = generate(engine, [*PROMPT, *other], NUM_TOKENS)
    source_reference = generate(engine, PROMPT, NUM_TOKENS)
    source = generate(engine, PROMPT, 1)
    target = Run(engine.open(GREEDY))
    engine.fork(source.seq_id, target.seq_id, len(PROMPT))
    assert engine.num_tokens(target.seq_id) == len(PROMPT)
    prefill(engine, target, other)
    decode(engine, source, NUM_TOKENS // 2)
    decode(engine, target, NUM_TOKENS)
    decode(engine, source, NUM_TOKENS)
    assert_same(reference, target, rounding=rounding)
    assert_same(source_reference, source)


def test_a_fork_outlives_its_source(engine: Engine) -> None:
    """Closing the source of a fork takes nothing from the fork."""
    reference = generate(engine, PROMPT, NUM_TOKENS)
    source = Run(engine.open(GREEDY))
    engine.step(StepPlan([Feed(source.seq_id, PROMPT[:-1], False)]))
    target = Run(engine.open(GREEDY))
    engine.fork(source.seq_id, target.seq_id, len(PROMPT) - 1)
    engine.close(source.seq_id)
    generate(engine, PROMPT[20:60], 2)
    feed(engine, target, PROMPT[-1:])
    decode(engine, target, NUM_TOKENS)
    assert_same(reference, target)


def test_a_sequence_starts_anew_after_a_cut_to_nothing(engine: Engine) -> None:
    """Every sequence can be cut to no token at all, and then reads like a new one."""
    reference = generate(engine, PROMPT[:40], NUM_TOKENS)
    run = generate(engine, PROMPT, 6)
    engine.truncate(run.seq_id, 0)
    assert engine.num_tokens(run.seq_id) == 0
    again = Run(run.seq_id)
    prefill(engine, again, PROMPT[:40])
    decode(engine, again, NUM_TOKENS)
    assert_same(reference, again)


def test_cuts_are_made_or_refused(engine: Engine, family: str, rounding: float) -> None:
    """A cut or a fork of a prefix equals recomputing it, or is refused and changes nothing."""
    reference = generate(engine, PROMPT, NUM_TOKENS)
    run, target = generate(engine, PROMPT, 1), Run(engine.open(GREEDY))
    calls: list[tuple[int, Callable[[], None]]] = [
        (target.seq_id, lambda: engine.fork(run.seq_id, target.seq_id, 50)),
        (run.seq_id, lambda: engine.truncate(run.seq_id, 50)),
    ]
    can_keep = engine.can_keep(run.seq_id, 50)
    assert can_keep or family not in CUTTABLE
    for seq_id, call in calls:
        if not can_keep:
            with pytest.raises(EngineError, match=r"whole|cut"):
                call()
            assert engine.num_tokens(run.seq_id) == len(PROMPT)
            assert engine.num_tokens(target.seq_id) == 0
            continue
        call()
        again = Run(seq_id)
        prefill(engine, again, PROMPT[50:])
        decode(engine, again, NUM_TOKENS)
        assert_same(reference, again, rounding=rounding)
    if not can_keep:
        decode(engine, run, NUM_TOKENS)
        assert_same(reference, run)


def test_parts_are_kept_or_refused(engine: Engine, family: str, rounding: float) -> None:
    """A part of a sequence is exported and appended where caches keep every token, or refused."""
    reference = generate(engine, PROMPT, NUM_TOKENS)
    source, target = generate(engine, PROMPT, 1), Run(engine.open(GREEDY))
    assert engine.capabilities.can_export_range == (family in CUTTABLE)
    if family not in CUTTABLE:
        with pytest.raises(EngineError, match="whole"):
            engine.export_kv(source.seq_id, 0, 50)
        with pytest.raises(EngineError, match="whole"):
            engine.export_kv(source.seq_id, 50)
        decode(engine, source, NUM_TOKENS)
        assert_same(reference, source)
        return
    for start, end in ((0, 50), (50, 51), (51, len(PROMPT) - 1)):
        engine.import_kv(target.seq_id, engine.export_kv(source.seq_id, start, end))
    feed(engine, target, PROMPT[-1:])
    decode(engine, target, NUM_TOKENS)
    assert_same(reference, target, rounding=rounding)


def test_a_moved_sequence_goes_on(engine: Engine) -> None:
    """Another sequence that takes over everything draws what the first would have drawn."""
    reference = generate(engine, PROMPT, NUM_TOKENS)
    source = generate(engine, PROMPT, 5)
    target = Run(engine.open(GREEDY, 20), source.tokens, source.logits)
    engine.move(source.seq_id, target.seq_id)
    assert engine.num_tokens(target.seq_id) == len(PROMPT) + 4
    with pytest.raises(EngineError, match="not open"):
        engine.num_tokens(source.seq_id)
    decode(engine, target, NUM_TOKENS)
    assert_same(reference, target)
