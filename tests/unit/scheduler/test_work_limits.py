"""Limits from outside: who may begin, and how long steps may be."""

from collections.abc import Callable
from typing import Any

import pytest

from brim.core.answer import FinishReason
from brim.core.request import Priority
from brim.core.stance import WorkLimits
from brim.scheduler.pace import PREFILL_STEP_ROWS, TILE_ROWS, StepPace

Bench = Any
MakeBench = Callable[..., Any]

NO_BACKGROUND = WorkLimits(runs_background=False)


def test_background_requests_wait_until_they_may_run(bench: Bench) -> None:
    """However long they wait, they do not begin, and hold up nobody; then they are answered."""
    bench.scheduler.set_limits(NO_BACKGROUND)
    bench.add(1, priority=Priority.BACKGROUND)
    bench.now_s += 100_000
    bench.add(2)
    bench.run()
    assert bench.last(2).finish_reason is FinishReason.LENGTH
    assert (1, 0) not in bench.deltas
    assert not bench.scheduler.has_work, "the loop may sleep"
    bench.scheduler.set_limits(WorkLimits())
    bench.run()
    assert bench.last(1).finish_reason is FinishReason.LENGTH


def test_a_background_request_that_runs_goes_on(bench: Bench) -> None:
    """Limits hold for those who have not begun."""
    bench.add(1, priority=Priority.BACKGROUND)
    bench.step()
    bench.scheduler.set_limits(NO_BACKGROUND)
    assert bench.scheduler.has_work
    bench.run()
    assert bench.last(1).finish_reason is FinishReason.LENGTH


def test_a_background_request_that_is_held_can_be_cancelled(bench: Bench) -> None:
    """Nothing of it is left."""
    bench.scheduler.set_limits(NO_BACKGROUND)
    bench.add(1, priority=Priority.BACKGROUND)
    bench.scheduler.cancel(1)
    assert bench.scheduler.num_waiting == 0


def test_fewer_sequences_run_at_once(bench: Bench) -> None:
    """New ones wait for those that run, which go on although they are too many."""
    for ticket in (1, 2, 3):
        bench.add(ticket, max_tokens=20)
    bench.step()
    assert bench.scheduler.num_sequences == 3
    bench.scheduler.set_limits(WorkLimits(max_running=2))
    for ticket in (4, 5, 6):
        bench.add(ticket, max_tokens=20)
    most = 0
    while bench.scheduler.has_work:
        bench.step()
        if (1, 0) in bench.deltas and bench.last(1).finish_reason is not None:
            most = max(most, bench.scheduler.num_sequences)
    assert most == 2
    assert all(bench.last(ticket).finish_reason is FinishReason.LENGTH for ticket in range(1, 7))


@pytest.mark.parametrize("max_running", [0, 1])
def test_a_request_with_more_choices_than_may_run_runs_alone(
    bench: Bench, max_running: int
) -> None:
    """It is not held for as long as power is short."""
    bench.scheduler.set_limits(WorkLimits(max_running=max_running))
    bench.add(1)
    bench.add(2, num_choices=3)
    together = 0
    while bench.scheduler.has_work:
        bench.step()
        together = max(together, bench.scheduler.num_sequences)
    assert together == 3
    assert {index for ticket, index in bench.deltas if ticket == 2} == {0, 1, 2}


def test_chunks_become_smaller_with_the_stall_target(make_bench: MakeBench) -> None:
    """Beside an answer and alone, in whole tiles, and back again."""
    bench = make_bench(context_tokens=4096, kv_tokens=8192, max_batch_tokens=1024)
    bench.add(1, num_prompt_tokens=1000, max_tokens=3000)
    assert bench.rows() == [512]
    bench.scheduler.set_limits(WorkLimits(stall_fraction=0.25))
    assert bench.rows() == [128]
    bench.scheduler.set_limits(WorkLimits(stall_fraction=1.0))
    while bench.scheduler._prefilling:
        bench.step()
    bench.step()
    bench.add(2, num_prompt_tokens=2000, max_tokens=3)
    for _ in range(4):
        bench.step()
    _, whole = bench.rows()
    bench.scheduler.set_limits(WorkLimits(stall_fraction=0.5))
    _, half = bench.rows()
    assert 0 < half < 0.7 * whole


@pytest.mark.parametrize(
    ("fraction", "rows"), [(0.0, TILE_ROWS), (0.5, PREFILL_STEP_ROWS // 2), (7.0, 512)]
)
def test_a_prompt_alone_is_read_in_smaller_steps(fraction: float, rows: int) -> None:
    """At least a tile, at most what it was."""
    pace = StepPace(0.3, 1024)
    pace.limit(fraction)
    assert pace.prefill_rows(0) == rows
