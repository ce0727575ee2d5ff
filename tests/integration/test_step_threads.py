"""The number of threads that the policy chooses is the one that llama.cpp computes with."""

import contextlib
import os
import sys
from typing import Any

import msgspec
import pytest
from conftest import require_engine
from support.models import plan_for

from brim.core.sampling import SamplingParams
from brim.core.step import Feed, StepPlan
from brim.engine import factory
from brim.engine.base import Engine
from brim.machine import cores


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


def bound_to() -> dict[int, set[int]]:
    """The processors that each of our threads may run on; threads of earlier tests may just end."""
    found = {}
    for thread_id in cores.own_threads():
        with contextlib.suppress(OSError):
            found[thread_id] = os.sched_getaffinity(thread_id)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="threads can be bound on Linux alone")
def test_no_thread_stays_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether compute threads were found or given up, all run anywhere when their engine ends."""
    require_engine("llamacpp")
    from brim.engine.llamacpp.threads import ThreadPolicy

    monkeypatch.setattr(ThreadPolicy, "needs_places", True)
    before, everywhere = bound_to(), os.sched_getaffinity(0)
    num_cores = len(cores.usable_cores())
    plan = msgspec.structs.replace(
        plan_for("llamacpp"), num_threads=num_cores, num_batch_threads=num_cores
    )
    # The first engine may start the threads; the second finds them there, and gives up.
    for _ in range(2):
        engine = factory.create("llamacpp")
        try:
            engine.load(plan)
            decoded(engine, 12)
        finally:
            engine.shutdown()
        for thread_id, cpus in bound_to().items():
            assert cpus == before.get(thread_id, everywhere)
