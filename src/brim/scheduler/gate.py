"""Who of those that wait may begin: what limits from outside and the pool's size leave."""

from brim.core.plan import Plan
from brim.core.request import Priority
from brim.core.stance import WorkLimits
from brim.scheduler.pool import Pool
from brim.scheduler.sequence import Job


class Gate:
    """Holds jobs back; those that run go on.

    Args:
        plan: How many sequences there are at most.
        pool: Who runs, and how many cells there are at the moment.
    """

    def __init__(self, plan: Plan, pool: Pool) -> None:
        self._plan = plan
        self._pool = pool
        self._limits = WorkLimits()

    def limit(self, limits: WorkLimits) -> None:
        """Work within these from now on."""
        self._limits = limits

    def holds(self, job: Job) -> bool:
        """Whether a job that waits can only begin when limits are lifted or the pool grows."""
        is_background = job.request.priority is Priority.BACKGROUND
        return job.kv_tokens > self._pool.kv_tokens or (
            is_background and not self._limits.runs_background
        )

    def has_place(self, num_choices: int) -> bool:
        """Whether so many sequences more may run; a request with too many runs alone."""
        most, limit = self._plan.max_sequences, self._limits.max_running
        if limit is not None:
            most = min(most, limit)
        num_running = self._pool.num_running
        return num_running == 0 or num_running + num_choices <= most
