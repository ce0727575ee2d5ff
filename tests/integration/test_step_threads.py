"""The number of threads that the policy chooses is the one that llama.cpp computes with."""

from typing import Any

import msgspec
import pytest
from conftest import require_engine
from support.models import plan_for

from brim.core.sampling import SamplingParams
from brim.core.step import Feed, StepPlan
from brim.engine import factory
from brim.engine.base import Engine


def decoded(engine: Engine, num_tokens: int) -> list[int]:
    """Tokens drawn greedily behind a short prompt."""
    seq_id, found = engine.open(SamplingParams(temperature=0.0)), list[int]()
    fed: tuple[int, ...] = (5, 6, 7)
    for _ in range(num_tokens):
        found.append(engine.step(StepPlan((Feed(seq_id, fed),))).sampled[0].token)
        fed = (found[-1],)
    engine.close(seq_id)
    return found


def test_one_row_takes_the_threads_of_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a busy program one thread computes, the prompt keeps two, and tokens stay the same."""
    require_engine("llamacpp")
    from brim.engine.llamacpp.binding import lib
    from brim.engine.llamacpp.threads import ThreadPolicy

    plan = msgspec.structs.replace(plan_for("llamacpp"), num_threads=2, num_batch_threads=2)
    engine: Any = factory.create("llamacpp")
    try:
        engine.load(plan)
        with_two = decoded(engine, 12)
        monkeypatch.setattr(ThreadPolicy, "num_threads", 1)
        with_one = decoded(engine, 12)
        assert lib.llama_n_threads(engine._context) == 1
        assert lib.llama_n_threads_batch(engine._context) == 2
    finally:
        engine.shutdown()
    assert with_one == with_two
