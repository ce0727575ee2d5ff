"""When a model that failed in a row may be tried again."""

import math

import pytest

from brim.runtime.quarantine import FIRST_WAIT_S, MAX_WAIT_S, Quarantine


def test_each_trial_that_fails_doubles_the_wait() -> None:
    """From minutes up to an hour, however often; an answer in between begins anew."""
    now_s = 1000.0
    quarantine = Quarantine(clock=lambda: now_s)
    waits = []
    for _ in range(2000):
        quarantine.begin()
        waits.append(quarantine.left_s)
        assert (quarantine.is_on, quarantine.is_due) == (True, False)
        now_s += quarantine.left_s
        assert (quarantine.is_on, quarantine.is_due) == (True, True)
        quarantine.lift()
        assert (quarantine.is_trial, quarantine.is_due) == (True, False)
    assert waits[:4] == [FIRST_WAIT_S * factor for factor in (1, 2, 4, 8)]
    assert set(waits[4:]) == {MAX_WAIT_S}
    quarantine.forget()
    assert not quarantine.is_trial
    quarantine.begin()
    assert quarantine.left_s == FIRST_WAIT_S


@pytest.mark.parametrize(
    ("left_s", "words"),
    [
        (300.0, "the first request in 5 min or later tries it once more"),
        (101.0, "the first request in 2 min or later tries it once more"),
        (99.2, "the first request in 100 s or later tries it once more"),
        (0.0, "its next request tries it once more"),
    ],
)
def test_it_says_when(left_s: float, words: str) -> None:
    """Rounded up: who comes when it says is not too early."""
    now_s = 0.0
    quarantine = Quarantine(clock=lambda: now_s)
    quarantine.begin()
    now_s = FIRST_WAIT_S - left_s
    assert quarantine.words() == words


def test_a_model_that_never_failed_is_none_of_its_business() -> None:
    """It is neither kept out nor on trial, and nothing is due."""
    quarantine = Quarantine(clock=lambda: -math.inf)
    assert not (quarantine.is_on or quarantine.is_due or quarantine.is_trial)
