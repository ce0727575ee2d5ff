"""Orders to the measuring process, carried out in this one on the toy engine."""

from pathlib import Path

import pytest
from support.models import plan_for

from brim.bench.calibrate.child import Order, Ran, Timed, run
from brim.bench.calibrate.process import quickest
from brim.errors import BrimError

PLAN = plan_for("toy", exact=False, max_batch_tokens=64)


def test_prompts_are_timed_as_often_as_asked() -> None:
    """Each length has one sample for each repetition, from an empty sequence."""
    ran = run(Order(plan=PLAN, prompts=(10, 100), repetitions=3))
    assert [(t.num_prompt, t.depth, len(t.samples_s)) for t in ran.prefill] == [
        (10, 0, 3), (100, 0, 3),
    ]  # fmt: skip
    assert ran.decode == ()
    assert ran.load_s > 0


def test_decode_is_timed_token_by_token_at_each_depth() -> None:
    """Depths come back in the order asked, and the chunks that fill up to them are samples too."""
    ran = run(Order(plan=PLAN, depths=(0, 30, 150), num_generate=5))
    assert [(t.depth, len(t.samples_s)) for t in ran.decode] == [(0, 5), (30, 5), (150, 5)]
    assert [(t.depth, t.num_prompt) for t in ran.prefill] == [(0, 64), (64, 64), (128, 22)]


def test_kept_kv_is_filled_once(tmp_path: Path) -> None:
    """A second order imports the file instead of reading the prompt again."""
    kept = tmp_path / "a.kv"
    order = Order(plan=PLAN, depths=(0, 100), num_generate=2, kept_kv=str(kept))
    assert len(run(order).prefill) == 2
    written = kept.read_bytes()
    again = run(order)
    assert again.prefill == ()
    assert [t.depth for t in again.decode] == [0, 100]
    assert kept.read_bytes() == written


def test_a_cache_that_is_too_short_is_filled_further(tmp_path: Path) -> None:
    """Only what is missing is read."""
    kept = str(tmp_path / "a.kv")
    run(Order(plan=PLAN, depths=(64,), kept_kv=kept))
    ran = run(Order(plan=PLAN, depths=(100,), kept_kv=kept))
    assert [(t.depth, t.num_prompt) for t in ran.prefill] == [(64, 36)]


def test_an_engine_that_rearranges_nothing_is_not_timed_again() -> None:
    """The toy engine has no weights: an order for rearranged ones ends after the load."""
    ran = run(Order(plan=PLAN, prompts=(10,), only_repacked=True))
    assert ran.prefill == ()
    assert ran.dirty_weights_bytes == 0


def test_what_the_engine_refuses_is_raised() -> None:
    """A prompt beyond the pool is the engine's error, not a wrong figure."""
    with pytest.raises(BrimError):
        run(Order(plan=PLAN, prompts=(PLAN.kv_tokens + 1,)))


def test_each_figure_comes_from_its_quickest_attempt() -> None:
    """What disturbed one attempt's prompt and the other's decode is in neither of the two."""
    first = Ran(
        load_s=1.0,
        prefill=(Timed(num_prompt=8, samples_s=(1.0, 9.0, 1.0)),),
        decode=(Timed(depth=0, samples_s=(3.0,)), Timed(depth=9, samples_s=(4.0,))),
    )
    second = Ran(
        load_s=0.5,
        prefill=(Timed(num_prompt=8, samples_s=(2.0,)),),
        decode=(Timed(depth=0, samples_s=(2.0,)), Timed(depth=9, samples_s=(5.0,))),
    )
    assert quickest([first, second]) == Ran(
        load_s=0.5, prefill=first.prefill, decode=(second.decode[0], first.decode[1])
    )
