"""Sliding windows in llama.cpp's pool: what nobody sees any more is given to others."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.driver import GREEDY, Run, assert_close, follow
from support.models import plan_for

from brim.bench.standin import blueprint, tiny, write
from brim.core.plan import Plan
from brim.core.step import Feed, StepPlan
from brim.engine.base import Engine
from brim.errors import EngineError

Load = Callable[[Plan], Engine]

WINDOW = 64

TOKENS = [5 + (37 * place * place + 11 * place) % 200 for place in range(200)]

ROUNDING = 0.1
"""Prompts of other lengths go through other kernels: 0.03 was seen, and 2.9 without the window."""


@pytest.fixture
def engine(load: Load, tmp_path: Path) -> Engine:
    path = tmp_path / "gemma3.gguf"
    write(path, blueprint(tiny("gemma3", window_tokens=WINDOW), "Q8_0"))
    return load(
        plan_for("llamacpp", path=path, kv_tokens=1024, kv_type="f16", flash_attention=False)
    )


def read(engine: Engine, tokens: list[int]) -> Run:
    """A sequence that has read some tokens."""
    run = Run(engine.open(GREEDY))
    engine.step(StepPlan([Feed(run.seq_id, tokens, False)]))
    return run


def go_on(engine: Engine, run: Run) -> Run:
    """Feed a few more tokens."""
    return follow(engine, run, [9, 8, 7, 6])


def crowded(engine: Engine) -> Run:
    """A sequence of TOKENS, of which another one has taken the first cells of its windows."""
    before, run = read(engine, TOKENS[:30]), read(engine, TOKENS)
    engine.close(before.seq_id)
    read(engine, TOKENS[:130])
    return run


def test_windows_promise_no_prefix(engine: Engine) -> None:
    """With a window in it, a model's cache is not said to be cut, forked, parted or shifted."""
    found = engine.capabilities
    assert not (found.can_truncate or found.can_fork_prefix)
    assert not (found.can_export_range or found.can_shift)


def test_a_prefix_whose_windows_are_there_is_kept(engine: Engine) -> None:
    """As long as no cell was given to others, any prefix equals one that was read alone."""
    run, target = read(engine, TOKENS), Run(engine.open(GREEDY))
    assert all(engine.can_keep(run.seq_id, count) for count in range(201))
    assert not engine.can_keep(run.seq_id, 201)
    engine.fork(run.seq_id, target.seq_id, 150)
    engine.truncate(run.seq_id, 90)
    assert_close(
        go_on(engine, read(engine, TOKENS[:150])), go_on(engine, target), rounding=ROUNDING
    )
    assert_close(go_on(engine, read(engine, TOKENS[:90])), go_on(engine, run), rounding=ROUNDING)


def test_a_prefix_whose_windows_are_gone_is_refused(engine: Engine) -> None:
    """A cut that would look back to cells of others is an error, and one after them is exact."""
    run, target = crowded(engine), Run(engine.open(GREEDY))
    assert not engine.can_keep(run.seq_id, 110)
    with pytest.raises(EngineError, match="cut to 110 tokens"):
        engine.truncate(run.seq_id, 110)
    with pytest.raises(EngineError, match="forked whole"):
        engine.fork(run.seq_id, target.seq_id, 110)
    assert engine.num_tokens(run.seq_id) == 200
    assert engine.num_tokens(target.seq_id) == 0
    assert engine.can_keep(run.seq_id, 180)
    engine.truncate(run.seq_id, 180)
    assert_close(go_on(engine, read(engine, TOKENS[:180])), go_on(engine, run), rounding=ROUNDING)


def test_a_whole_sequence_comes_back_with_its_last_window(engine: Engine) -> None:
    """An imported sequence goes on as before, but a cut would look back to what was not kept."""
    reference = go_on(engine, read(engine, TOKENS))
    source, target = read(engine, TOKENS), Run(engine.open(GREEDY))
    with pytest.raises(EngineError, match="kept whole"):
        engine.export_kv(source.seq_id, 0, 100)
    engine.import_kv(target.seq_id, engine.export_kv(source.seq_id))
    assert engine.can_keep(target.seq_id, 200)
    assert not engine.can_keep(target.seq_id, 180)
    assert_close(reference, go_on(engine, target), rounding=ROUNDING)


def test_what_is_missing_would_show(engine: Engine) -> None:
    """Cut to where its windows are gone, a sequence's logits would be off by far more than that."""
    run = crowded(engine)
    assert engine._pool.cut(run.seq_id, 110)  # type: ignore[attr-defined]
    sequence = engine._sequences[run.seq_id]  # type: ignore[attr-defined]
    del sequence.tokens[110:]
    wanted, found = go_on(engine, read(engine, TOKENS[:110])), go_on(engine, run)
    assert np.abs(wanted.logits[0] - found.logits[0]).max() > 10 * ROUNDING
