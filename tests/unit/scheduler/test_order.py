"""Who goes first."""

from typing import Any

from brim.core.request import Priority
from brim.scheduler.order import BACKGROUND_DELAY_S, urgency
from brim.scheduler.sequence import Job, ScheduledRequest


def job(number: int, arrived_s: float = 0.0, **fields: Any) -> Job:
    request = ScheduledRequest(
        ticket=number, prompt_tokens=[1], max_tokens=1, arrived_s=arrived_s, **fields
    )
    return Job(request, number=number, max_tokens=1, kv_tokens=1, seed=0)


def test_the_shorter_prompt_goes_first() -> None:
    """A question overtakes a document that arrived with it."""
    assert urgency(job(2), 30, 1.0, 0.01) < urgency(job(1), 3000, 1.0, 0.01)


def test_waiting_as_long_as_reading_takes_makes_up_for_length() -> None:
    """A document that waited 31 s, with 30 s to read, goes before a fresh question."""
    document, question = job(1, arrived_s=0.0), job(2, arrived_s=31.0)
    assert urgency(document, 3000, 31.0, 0.01) < urgency(question, 10, 31.0, 0.01)


def test_background_gives_way_until_it_has_waited_long_enough() -> None:
    """For a minute everybody interactive goes first, then nobody who came later."""
    background = job(1, priority=Priority.BACKGROUND)
    soon, late = job(2, arrived_s=30.0), job(3, arrived_s=BACKGROUND_DELAY_S + 1.0)
    assert urgency(soon, 10, 30.0, 0.01) < urgency(background, 10, 30.0, 0.01)
    now_s = BACKGROUND_DELAY_S + 1.0
    assert urgency(background, 10, now_s, 0.01) < urgency(late, 10, now_s, 0.01)


def test_equals_go_first_come_first_served() -> None:
    """The number decides."""
    assert urgency(job(1), 10, 5.0, 0.01) < urgency(job(2), 10, 5.0, 0.01)
