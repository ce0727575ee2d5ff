"""The share of the time in which steps run."""

import pytest

from brim.worker.pacing import LEAST_FRACTION, Pacing


class Clock:
    """Seconds that pass when a test says so."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def take(clock: Clock, pacing: Pacing, step_s: float) -> None:
    """A step that takes so long."""
    pacing.begin()
    clock.now_s += step_s
    pacing.end()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.mark.parametrize(("fraction", "rest_s"), [(1.0, 0.0), (0.5, 2.0), (0.25, 6.0), (3.0, 0.0)])
def test_a_step_is_followed_by_its_rest(clock: Clock, fraction: float, rest_s: float) -> None:
    """Step and rest together are to the step as one to the fraction."""
    pacing = Pacing(clock)
    pacing.limit(fraction)
    take(clock, pacing, 2.0)
    assert pacing.rest_s == pytest.approx(rest_s)


def test_a_rest_ends_when_its_time_has_come(clock: Clock) -> None:
    """Work between two steps counts as rest."""
    pacing = Pacing(clock)
    pacing.limit(0.5)
    take(clock, pacing, 2.0)
    clock.now_s += 1.5
    assert pacing.rest_s == pytest.approx(0.5)
    clock.now_s += 1.0
    assert pacing.rest_s <= 0


def test_a_rest_ends_when_the_limit_is_lifted(clock: Clock) -> None:
    """Nothing is owed any more."""
    pacing = Pacing(clock)
    pacing.limit(0.5)
    take(clock, pacing, 2.0)
    pacing.limit(1.0)
    assert pacing.rest_s == 0.0


def test_a_rest_is_bounded(clock: Clock) -> None:
    """A share of nothing is the least share, not a wait for ever."""
    pacing = Pacing(clock)
    pacing.limit(0.0)
    take(clock, pacing, 1.0)
    assert pacing.rest_s == pytest.approx(1 / LEAST_FRACTION - 1)
