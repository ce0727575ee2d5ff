"""What background requests leave to those that somebody waits for."""

from collections.abc import Callable
from typing import Any

from brim.core.answer import FinishReason
from brim.core.request import Priority
from brim.scheduler.background import MAX_PAUSED_STEPS
from brim.scheduler.pace import PREFILL_STEP_ROWS, StepPace

Bench = Any
MakeBench = Callable[..., Any]

LONG = 3000


def flood(bench: Bench, number: int, **fields: Any) -> None:
    """So many background requests, one step in."""
    for ticket in range(101, 101 + number):
        bench.add(ticket, priority=Priority.BACKGROUND, **fields)
    bench.step()


def test_a_flood_leaves_sequences_to_others(make_bench: MakeBench) -> None:
    """Three quarters of eight are taken, and a question gets one at once."""
    bench = make_bench(context_tokens=4096, kv_tokens=65536, max_sequences=8)
    flood(bench, 12, max_tokens=LONG)
    assert bench.scheduler.num_sequences == 6
    bench.add(1)
    bench.step()
    assert bench.scheduler.num_sequences == 7
    assert bench.scheduler.num_waiting == 6


def test_a_flood_leaves_cells_to_others(make_bench: MakeBench) -> None:
    """Two of three large requests are let in; a question that needs a quarter of the pool fits."""
    bench = make_bench(context_tokens=4096, kv_tokens=8192, max_sequences=8)
    flood(bench, 3, max_tokens=2900)
    assert bench.scheduler.num_sequences == 2
    bench.add(1, max_tokens=2000)
    bench.step()
    assert bench.scheduler.num_sequences == 3


def test_a_background_request_alone_may_have_everything(make_bench: MakeBench) -> None:
    """One that is larger than its kind's part runs when no other of its kind does."""
    bench = make_bench(context_tokens=4096, kv_tokens=4096, max_sequences=4)
    bench.add(1, priority=Priority.BACKGROUND, num_choices=4, max_tokens=900)
    bench.step()
    assert bench.scheduler.num_sequences == 4


def test_small_background_requests_do_not_pass_a_large_one_for_ever(make_bench: MakeBench) -> None:
    """One that must be alone gets its turn although others of its kind never stop coming."""
    bench = make_bench(context_tokens=4096, kv_tokens=4096, max_sequences=8)
    flood(bench, 2, max_tokens=40)
    bench.add(1, priority=Priority.BACKGROUND, max_tokens=4000)
    bench.step()
    for ticket in range(201, 220):
        bench.add(ticket, priority=Priority.BACKGROUND, max_tokens=40 + ticket % 7)
        bench.add(ticket + 100, max_tokens=2)
        for _ in range(10):
            bench.step()
        assert bench.last(ticket + 100).finish_reason, "a question is not held up by it"
    assert (1, 0) in bench.deltas


def test_background_answers_pause_while_a_question_is_read(make_bench: MakeBench) -> None:
    """Its prompt has the step to itself; then all decode together."""
    bench = make_bench(context_tokens=4096, kv_tokens=65536, max_sequences=8, max_batch_tokens=512)
    flood(bench, 4, max_tokens=LONG)
    for _ in range(4):
        bench.step()
    bench.add(1, num_prompt_tokens=900, max_tokens=20)
    assert bench.rows() == [512]
    assert bench.rows() == [388]
    assert sorted(bench.rows()) == [1, 1, 1, 1, 1]


def test_background_answers_go_on_beside_endless_questions(make_bench: MakeBench) -> None:
    """After so many steps in a row each has its turn, and in the end all are whole."""
    bench = make_bench(context_tokens=4096, kv_tokens=65536, max_sequences=8, max_batch_tokens=64)
    flood(bench, 2, max_tokens=20)
    for _ in range(4):
        bench.step()
    for ticket in (1, 2):
        bench.add(ticket, num_prompt_tokens=1000)
    sizes = [len(bench.rows()) for _ in range(MAX_PAUSED_STEPS + 1)]
    assert sizes[:-1] == [1] * MAX_PAUSED_STEPS
    assert sizes[-1] == 3
    bench.run()
    assert all(
        bench.last(ticket).finish_reason is FinishReason.LENGTH for ticket in (1, 2, 101, 102)
    )


def test_background_prompts_are_read_in_short_steps() -> None:
    """A question that comes meanwhile must not wait for 512 rows where those take seconds."""
    pace = StepPace(0.3, 1024)
    assert pace.prefill_rows(0) == PREFILL_STEP_ROWS
    pace.observe(0, 512, 2.56)
    assert pace.prefill_rows(0, is_background=True) == 64
    assert pace.prefill_rows(0) == PREFILL_STEP_ROWS
