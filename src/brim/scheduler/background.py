"""What background requests leave to those that somebody waits for.

They may hold a part of the sequences and cells only, so that a question finds a place at once, and
they pause while its prompt is read.
"""

from collections.abc import Iterable

from brim.core.plan import Plan
from brim.core.request import Priority
from brim.scheduler.pool import Pool
from brim.scheduler.sequence import Job

PART_LEFT = 4
"""One part in so many of the sequences and cells is left to others.  A quarter of 16 sequences are
four people at once; a batch of twelve decodes nearly as many tokens a second as one of sixteen."""

MAX_PAUSED_STEPS = 8
"""In a row; then background rows come along in one.  However many questions follow each other,
background answers go on at an eighth of their pace, and a question pays an eighth of their rows."""


def is_background(job: Job) -> bool:
    """Whether nobody waits for it."""
    return job.request.priority is Priority.BACKGROUND


class Courtesy:
    """Decides when background work gives way.

    Args:
        plan: How many sequences there are at most.
        pool: How many cells there are at the moment.
    """

    def __init__(self, plan: Plan, pool: Pool) -> None:
        self._plan = plan
        self._pool = pool
        self._num_paused = 0

    def holds(self, job: Job, running: Iterable[Job]) -> bool:
        """Whether a background job must wait for others of its kind; alone, it may run."""
        if not is_background(job):
            return False
        others = [each for each in running if is_background(each)]
        if not others:
            return False
        num_sequences = job.request.num_choices + sum(len(each.choices) for each in others)
        num_cells = job.kv_tokens + sum(each.kv_tokens for each in others)
        return num_sequences > _part(self._plan.max_sequences) or num_cells > _part(
            self._pool.kv_tokens
        )

    def pauses(self, has_person: bool) -> bool:
        """Whether the next step is without background rows; asked once a step.

        Args:
            has_person: Whether a prompt is being read for which somebody waits.
        """
        is_paused = has_person and self._num_paused < MAX_PAUSED_STEPS
        self._num_paused = self._num_paused + 1 if is_paused else 0
        return is_paused


def _part(whole: int) -> int:
    """What background work may hold of something; at least one."""
    return max(1, whole - whole // PART_LEFT)
