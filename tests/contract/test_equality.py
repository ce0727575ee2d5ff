"""The same tokens give the same logits, however they were fed: to the bit in the exact profile."""

import numpy as np
import pytest
from support.driver import Run, assert_same, decode, feed, generate, prefill, record

from brim.core.sampling import SamplingParams
from brim.core.step import Feed, StepPlan
from brim.engine.base import Engine

NUM_TOKENS = 24


def test_batched_equals_alone(engine: Engine, prompt: list[int]) -> None:
    """Eight sequences decoding together draw what each draws alone."""
    prompts = [prompt[i : i + 20 + 7 * i] for i in range(8)]
    alone = []
    for one in prompts:
        run = generate(engine, one, NUM_TOKENS)
        engine.close(run.seq_id)
        alone.append(run)
    together = [generate(engine, one, 1) for one in prompts]
    for _ in range(NUM_TOKENS - 1):
        feeds = [Feed(run.seq_id, [run.tokens[-1]]) for run in together]
        result = engine.step(StepPlan(feeds))
        for run, sampled in zip(together, result.sampled, strict=True):
            record(engine, run, sampled)
    for left, right in zip(alone, together, strict=True):
        assert_same(left, right)


@pytest.mark.parametrize("chunk", [1, 3, 16, 64])
def test_prefill_in_chunks_equals_whole(engine: Engine, prompt: list[int], chunk: int) -> None:
    """A prompt read in chunks of any size gives the run of a prompt read at once."""
    assert_same(
        generate(engine, prompt, NUM_TOKENS), generate(engine, prompt, NUM_TOKENS, chunk=chunk)
    )


def test_decoding_beside_a_prefill_equals_alone(engine: Engine, prompt: list[int]) -> None:
    """A sequence that decodes in the steps of another's prefill is not changed by it, nor it."""
    reference = generate(engine, prompt[:30], NUM_TOKENS)
    long_reference = generate(engine, prompt, 1)
    run, long_run = generate(engine, prompt[:30], 1), Run(engine.open(SamplingParams()))
    for start in range(0, len(prompt), 10):
        is_last = start + 10 >= len(prompt)
        chunk = Feed(long_run.seq_id, prompt[start : start + 10], is_last)
        result = engine.step(StepPlan([Feed(run.seq_id, [run.tokens[-1]]), chunk]))
        record(engine, run, result.sampled[0])
        assert len(result.sampled) == (2 if is_last else 1)
    assert np.array_equal(engine.logits(long_run.seq_id), long_reference.logits[0])
    decode(engine, run, NUM_TOKENS)
    assert_same(reference, run)


def test_exported_and_imported_equals_recomputed(engine: Engine, prompt: list[int]) -> None:
    """A sequence that left memory and came back goes on as if it had stayed."""
    reference = generate(engine, prompt, NUM_TOKENS)
    source = generate(engine, prompt, 5)
    blob = bytes(engine.export_kv(source.seq_id))
    engine.close(source.seq_id)
    target = Run(engine.open(SamplingParams(temperature=0.0)))
    engine.import_kv(target.seq_id, blob)
    assert engine.num_tokens(target.seq_id) == len(prompt) + 4
    target.tokens, target.logits = source.tokens, source.logits
    decode(engine, target, NUM_TOKENS)
    assert_same(reference, target)


def test_a_block_moves_between_engines(make_engine: object, prompt: list[int]) -> None:
    """A block written by one process's engine is read by another's with the same model."""
    make = make_engine
    first, second = make(), make(kv_tokens=1024)  # type: ignore[operator]
    reference = generate(first, prompt, 8)
    run = generate(first, prompt, 2)
    target = Run(second.open(SamplingParams(temperature=0.0)), run.tokens, run.logits)
    second.import_kv(target.seq_id, first.export_kv(run.seq_id))
    decode(second, target, 8)
    assert_same(reference, target)


def test_forked_equals_recomputed(engine: Engine, prompt: list[int]) -> None:
    """A fork of any prefix goes on as if it had read that prefix itself, and so does its source."""
    other = list(reversed(prompt))[:20]
    reference = generate(engine, prompt[:60] + other, NUM_TOKENS)
    source_reference = generate(engine, prompt, NUM_TOKENS)
    source = generate(engine, prompt, 3)
    target = Run(engine.open(SamplingParams(temperature=0.0)))
    engine.fork(source.seq_id, target.seq_id, 60)
    assert engine.num_tokens(target.seq_id) == 60
    prefill(engine, target, other)
    decode(engine, target, NUM_TOKENS)
    decode(engine, source, NUM_TOKENS)
    assert_same(reference, target)
    assert_same(source_reference, source)


def test_a_fork_outlives_its_source(engine: Engine, prompt: list[int]) -> None:
    """Closing the source of a fork takes nothing from the fork."""
    reference = generate(engine, prompt, NUM_TOKENS)
    source = generate(engine, prompt, 1)
    target = Run(engine.open(SamplingParams(temperature=0.0)))
    engine.fork(source.seq_id, target.seq_id, len(prompt) - 1)
    engine.close(source.seq_id)
    feed(engine, target, prompt[-1:])
    decode(engine, target, NUM_TOKENS)
    assert_same(reference, target)


def test_truncated_equals_recomputed(engine: Engine, prompt: list[int]) -> None:
    """A sequence cut back goes on as if the rest had never been read."""
    other = list(reversed(prompt))[:20]
    reference = generate(engine, prompt[:50] + other, NUM_TOKENS)
    run = generate(engine, prompt, 10)
    engine.truncate(run.seq_id, 50)
    assert engine.num_tokens(run.seq_id) == 50
    again = Run(run.seq_id)
    prefill(engine, again, other)
    decode(engine, again, NUM_TOKENS)
    assert_same(reference, again)


def test_resizing_the_pool_changes_no_sequence(engine: Engine, prompt: list[int]) -> None:
    """Sequences survive a smaller and a larger pool, shared cells included."""
    reference = generate(engine, prompt, NUM_TOKENS)
    engine.close(reference.seq_id)
    source = generate(engine, prompt, 2)
    target = Run(engine.open(SamplingParams(temperature=0.0)))
    engine.fork(source.seq_id, target.seq_id, len(prompt) - 1)
    engine.resize_kv(256)
    feed(engine, target, prompt[-1:])
    decode(engine, target, 8)
    engine.resize_kv(1024)
    decode(engine, source, NUM_TOKENS)
    decode(engine, target, NUM_TOKENS)
    assert_same(reference, source)
    assert_same(reference, target)
