"""Who goes first: one number in seconds for every prompt that waits or is being read.

Shortest remaining prefill first, so that a question is not held up by a document; interactive
before background; and every second of waiting counts, so that nothing starves: however many come
later, each one ahead makes the wait longer.
"""

from brim.core.request import Priority
from brim.scheduler.sequence import Job

BACKGROUND_DELAY_S = 60.0
"""A background request gives way to any that came less than this later: longer than most
conversations pause, short enough that a batch job ends the same day."""


def urgency(job: Job, num_remaining: int, now_s: float, row_s: float) -> tuple[float, int]:
    """Sort key; the smallest goes first, ties first come, first served.

    Args:
        job: Who waits.
        num_remaining: Prompt tokens that must still be computed.
        now_s: By the scheduler's clock.
        row_s: Seconds that a prompt token takes.
    """
    delay_s = BACKGROUND_DELAY_S if job.request.priority is Priority.BACKGROUND else 0.0
    waited_s = now_s - job.request.arrived_s
    return (num_remaining * row_s + delay_s - waited_s, job.number)
