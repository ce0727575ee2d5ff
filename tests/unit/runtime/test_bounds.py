"""How long answers may be, by what the governor allows at the moment."""

from typing import Any

import msgspec
import pytest
from support.serving import request, toy_plan

from brim.core.request import OverflowPolicy, Priority
from brim.core.stance import Stance
from brim.errors import Busy, ContextOverflow
from brim.runtime.bounds import Bounds, bounds_of, windowed
from brim.worker.protocol import Counted

PLAN = toy_plan(context_tokens=1000, kv_tokens=4000)


def bounds(
    num_prompt_tokens: int, stance: Stance, *, may_outgrow: bool = False, **fields: Any
) -> Bounds:
    return bounds_of(
        request(**fields),
        Counted(1, num_prompt_tokens, may_outgrow=may_outgrow),
        PLAN,
        stance,
        answer_tokens=500,
        forks_share_kv=True,
    )


@pytest.mark.parametrize(
    ("priority", "max_tokens", "expected"),
    [
        (Priority.INTERACTIVE, None, 100),
        (Priority.INTERACTIVE, 300, 300),
        (Priority.BACKGROUND, None, 50),
        (Priority.BACKGROUND, 300, 50),
    ],
)
def test_a_stance_bounds_open_answers_and_all_of_the_background(
    priority: Priority, max_tokens: int | None, expected: int
) -> None:
    """Interactive requests that say how long keep that; background ones are cut either way."""
    stance = Stance(max_answer_tokens=100, max_background_answer_tokens=50)
    found = bounds(200, stance, priority=priority, max_tokens=max_tokens)
    assert found == Bounds(max_tokens=expected, kv_tokens=200 + expected)
    assert bounds(200, Stance(), priority=priority, max_tokens=max_tokens).max_tokens == (
        max_tokens or 500
    )


def test_half_a_window_leaves_open_answers_what_is_left_of_it() -> None:
    """A request without max_tokens gets a shorter answer rather than a refusal."""
    assert bounds(200, Stance(context_fraction=0.5), max_tokens=None).max_tokens == 300


@pytest.mark.parametrize(("num_prompt_tokens", "max_tokens"), [(200, 301), (500, None)])
def test_what_only_fits_the_whole_window_is_told_why_and_for_how_long(
    num_prompt_tokens: int, max_tokens: int | None
) -> None:
    """503 with the governor's reason, both numbers, and when to come again."""
    stance = Stance(context_fraction=0.5, reason="the machine is hot", retry_after_s=20.0)
    with pytest.raises(Busy, match=r"the machine is hot.* may use 500 .* again in 20 s") as caught:
        bounds(num_prompt_tokens, stance, max_tokens=max_tokens)
    assert caught.value.retry_after_s == 20.0


def test_what_never_fits_is_the_clients_to_shorten_whatever_the_stance() -> None:
    """Waiting would not help, so it is no 503."""
    with pytest.raises(ContextOverflow):
        bounds(1000, Stance(context_fraction=0.5), max_tokens=None)


def test_an_answer_that_outgrows_its_window_is_not_bound_by_a_part_of_it() -> None:
    """Older tokens leave as it grows."""
    stance = Stance(context_fraction=0.5)
    assert bounds(450, stance, max_tokens=900, may_outgrow=True).max_tokens == 900


def test_an_apps_longest_context_is_its_window() -> None:
    """Prompt and answer together; more is refused as over the window."""
    assert bounds(200, Stance(), max_tokens=None, max_context_tokens=300).max_tokens == 100
    with pytest.raises(ContextOverflow, match="context is 300"):
        bounds(200, Stance(), max_tokens=200, max_context_tokens=300)


def test_conversations_with_a_policy_are_fitted_to_the_window_of_the_moment() -> None:
    """The worker is told the smaller of the app's and the stance's; without a policy, nothing."""
    stance = Stance(context_fraction=0.5)
    trimmed = request(overflow=OverflowPolicy.TRIM)
    assert windowed(trimmed, PLAN, stance).max_context_tokens == 500
    small = msgspec.structs.replace(trimmed, max_context_tokens=300)
    assert windowed(small, PLAN, stance).max_context_tokens == 300
    assert windowed(trimmed, PLAN, Stance()) is trimmed
    rejected = request()
    assert windowed(rejected, PLAN, stance) is rejected
