"""Admission arithmetic: bounds, KV and what can never run."""

import pytest
from support.models import plan_for

from brim.errors import ContextOverflow, InvalidRequest
from brim.scheduler.admission import (
    answer_bound,
    answer_share,
    check_choices,
    check_fits,
    kv_bound,
)


def bound(num_prompt_tokens: int, max_tokens: int | None) -> int:
    return answer_bound(num_prompt_tokens, max_tokens, context_tokens=100, answer_tokens=30)


@pytest.mark.parametrize(
    ("num_prompt_tokens", "max_tokens", "expected"),
    [(10, 50, 50), (10, 90, 90), (10, None, 30), (80, None, 20), (99, 1, 1)],
)
def test_an_answer_is_bounded_by_wish_window_and_setting(
    num_prompt_tokens: int, max_tokens: int | None, expected: int
) -> None:
    """A given max_tokens is kept as it is; a missing one becomes the setting or what is left."""
    assert bound(num_prompt_tokens, max_tokens) == expected


def test_a_prompt_over_the_window_is_told_by_how_much() -> None:
    """The message has the prompt's length, the window, and how many tokens to drop."""
    with pytest.raises(
        ContextOverflow, match=r"prompt is 108 tokens, context is 100; shorten .* 9 "
    ):
        bound(108, None)


def test_a_prompt_that_fills_the_window_leaves_no_answer() -> None:
    """A prompt as long as the window is one token too long."""
    with pytest.raises(ContextOverflow, match="shorten it by 1 "):
        bound(100, None)


def test_max_tokens_over_the_window_is_refused_with_what_would_fit() -> None:
    """An explicit max_tokens is never silently cut."""
    with pytest.raises(ContextOverflow, match="ask for at most 20 ") as caught:
        bound(80, 21)
    assert caught.value.param == "max_tokens"


def test_max_tokens_below_one_is_refused() -> None:
    """An answer of no tokens is not an answer."""
    with pytest.raises(InvalidRequest, match="max_tokens is 0"):
        bound(10, 0)


def test_choices_share_the_prompt_only_where_the_engine_forks() -> None:
    """The KV bound counts the prompt once with forks and once a choice without."""
    assert kv_bound(50, 10, 3, forks_share_kv=True) == 80
    assert kv_bound(50, 10, 3, forks_share_kv=False) == 180


@pytest.mark.parametrize("forks_share_kv", [True, False])
@pytest.mark.parametrize("num_choices", [1, 3, 8])
def test_an_open_answer_takes_its_share_of_the_pool(num_choices: int, forks_share_kv: bool) -> None:
    """The share is the longest answer whose KV bound is within the pool, and no longer."""
    share = answer_share(50, num_choices, kv_tokens=1000, forks_share_kv=forks_share_kv)
    assert kv_bound(50, share, num_choices, forks_share_kv=forks_share_kv) <= 1000
    assert kv_bound(50, share + 1, num_choices, forks_share_kv=forks_share_kv) > 1000


def test_what_never_fits_is_refused_rather_than_queued() -> None:
    """More KV than the pool, or more choices than sequences, would wait for ever."""
    plan = plan_for("toy", kv_tokens=256, max_sequences=4)
    check_fits(256, plan)
    check_choices(4, plan)
    with pytest.raises(InvalidRequest, match=r"need 257 .* has 256: 1 too many"):
        check_fits(257, plan)
    with pytest.raises(InvalidRequest, match="at most 4 choices") as caught:
        check_choices(5, plan)
    assert caught.value.param == "n"
    with pytest.raises(InvalidRequest, match="n is 0"):
        check_choices(0, plan)
