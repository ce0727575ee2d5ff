"""Chooses how many threads compute a step of one row: all of them, fewer beside busy programs.

Threads wait for each other at every node of the graph, some 400 times a token, and spin while they
wait, because sleeping costs a third of an idle machine's rate.  Beside a program that keeps a core
busy, one of them is always off its core, and the others wait for it.  A single thread waits for
nobody.  How threads wait is fixed when the process starts; how many there are is not.

Steps with more rows keep all threads: they compute for so long between two waits that two threads
beside busy programs are never slower than one (8 rows, 2 cores: 4.9 steps a second with either
beside one busy process, 4.6 and 3.0 beside two).
"""

import statistics
import time
from collections import deque
from typing import Any, NamedTuple, Protocol

from brim.core.plan import Plan

WINDOW_STEPS = 8
"""Steps by which a number of threads is judged: 0.2 s at 40 tokens a second, longer than a burst of
another program's work, and several of the system's time slices."""

TRIAL_STEPS = 4
"""Steps in which another number is tried.  Beside busy programs two threads may take twice as long
as one, so a trial should be short; it also ends as soon as it cannot win any more."""

FEW_STEPS = 3
"""Steps by which threads on one core are noticed: each of them takes three times as long."""

MAX_LOST = 0.15
"""Share of a window in which the calling thread may be off its core before that counts as
contention: 0.00 to 0.06 on an idle machine with a server around, 0.3 to 0.6 beside busy processes
(1.24 B Q4_K_M, 2-core x86-64 VM, November 2026)."""

GAIN = 0.95
"""Share of the time that the other number must at most take to be chosen: 5 % are within the spread
of two windows."""

FIRST_WAIT_STEPS = 8
MAX_WAIT_STEPS = 128
"""Steps between two trials, doubled by each that failed.  At the longest, a trial of three steps at
twice the time costs 2 % of the rate, and an idle machine is noticed after 4 s."""

CHANGE = 1.3
"""By how much steps must have grown longer or shorter since the last trial for the next one not to
wait: what it found is of another time then."""


class Step(NamedTuple):
    """What one step took."""

    wall_s: float
    cpu_s: float
    """CPU time of the thread that called for it."""


def ladder(most: int) -> tuple[int, ...]:
    """Numbers of threads that are worth trying, most first.

    One less is for one busy program, half and one are for many.

    Example:
        >>> ladder(2), ladder(8)
        ((2, 1), (8, 7, 4, 1))
    """
    return tuple(dict.fromkeys(n for n in (most, most - 1, most // 2, 1) if n > 0))


class ThreadPolicy:
    """Keeps the number of threads whose steps are shortest, by trying its neighbours.

    On a machine where nothing is lost it tries nothing.  It is the measured time that decides, not
    the cause: which of two numbers wins beside a busy program depends on where the system puts the
    threads, and changes from second to second.
    """

    def __init__(self, most: int) -> None:
        self._ladder = ladder(most)
        self._held = 0
        """Index of the number in use; 0 is all threads."""
        self._tried: int | None = None
        self._trial_s: list[float] = []
        self._window: deque[Step] = deque(maxlen=WINDOW_STEPS)
        self._wait_steps = FIRST_WAIT_STEPS
        self._num_steps = 0
        """Since the last trial."""
        self._judged_s = 0.0
        """What steps took when the last trial was judged."""
        self._goes_down = True
        """Which neighbour is next where there are two."""

    @property
    def num_threads(self) -> int:
        """Threads for the next step."""
        return self._ladder[self._held if self._tried is None else self._tried]

    @property
    def needs_places(self) -> bool:
        """Whether the next step's threads should each be kept on a core of its own.

        Where all threads compute and something is in their way: another program, or one of them
        that has come to lie on the other's core.
        """
        if self._tried is not None:
            return self._tried == 0
        return self._held == 0 and len(self._window) >= FEW_STEPS and self._lost() > MAX_LOST

    def record(self, step: Step) -> None:
        """Take in what a step with `num_threads` took."""
        if self._tried is not None:
            self._trial_s.append(step.wall_s)
            self._judge(self._tried)
            return
        self._window.append(step)
        self._num_steps += 1
        if len(self._window) < WINDOW_STEPS or self._num_steps < FIRST_WAIT_STEPS:
            return
        change = self._window_s() / max(self._judged_s, 1e-9)
        if self._num_steps >= self._wait_steps or not 1 / CHANGE < change < CHANGE:
            self._tried = self._candidate()

    def _window_s(self) -> float:
        """Seconds of a step in the window."""
        return statistics.fmean(step.wall_s for step in self._window)

    def _candidate(self) -> int | None:
        """Which number to try now; None where all threads compute and lose nothing."""
        is_calm = self._lost() <= MAX_LOST
        if self._held == 0:
            return None if is_calm or len(self._ladder) == 1 else 1
        if is_calm or self._held == len(self._ladder) - 1:
            return self._held - 1
        self._goes_down = not self._goes_down
        return self._held + (1 if self._goes_down else -1)

    def _lost(self) -> float:
        """Share of the window in which the calling thread was off its core."""
        wall_s = sum(step.wall_s for step in self._window)
        return 1 - sum(step.cpu_s for step in self._window) / max(wall_s, 1e-9)

    def _judge(self, tried: int) -> None:
        """End the trial when it is decided."""
        most_s = GAIN * self._window_s() * TRIAL_STEPS
        has_lost = sum(self._trial_s) >= most_s
        if not has_lost and len(self._trial_s) < TRIAL_STEPS:
            return
        self._judged_s = self._window_s() if has_lost else statistics.fmean(self._trial_s)
        if has_lost:
            self._wait_steps = min(2 * self._wait_steps, MAX_WAIT_STEPS)
        else:
            self._held, self._wait_steps = tried, FIRST_WAIT_STEPS
            self._window.clear()
        self._tried, self._num_steps = None, 0
        self._trial_s.clear()


class Places(Protocol):
    """What StepThreads asks of `placement.Placement`."""

    def hold(self) -> None:
        """Before a step whose threads have a core each."""

    def let_go(self) -> None:
        """After it."""

    def release(self) -> None:
        """Before a step whose threads the system places."""


class StepThreads:
    """Runs llama_decode under the policy; a context made anew needs no word to it.

    Args:
        lib: llama.h's functions.
        plan: Its threads are the most that are used.
        places: Where the threads run.
    """

    def __init__(self, lib: Any, plan: Plan, places: Places) -> None:
        self._lib = lib
        self._policy = ThreadPolicy(plan.num_threads)
        self._num_batch_threads = plan.num_batch_threads
        self._places = places
        # Where a GPU computes, the calling thread waits for it, and threads decide nothing.
        self._adapts = plan.num_threads > 1 and not lib.llama_supports_gpu_offload()

    def decode(self, context: Any, batch: Any) -> int:
        """llama_decode's status."""
        if not self._adapts:
            return int(self._lib.llama_decode(context, batch))
        if not self._policy.needs_places:
            self._places.release()
            return self._decode(context, batch)
        self._places.hold()
        try:
            return self._decode(context, batch)
        finally:
            self._places.let_go()

    def release(self) -> None:
        """Leave the compute threads, which outlive the engine, as they were found."""
        self._places.release()

    def _decode(self, context: Any, batch: Any) -> int:
        lib = self._lib
        if batch.n_tokens != 1:
            return int(lib.llama_decode(context, batch))
        lib.llama_set_n_threads(context, self._policy.num_threads, self._num_batch_threads)
        begin_s, begin_cpu_s = time.perf_counter(), time.thread_time()
        status = int(lib.llama_decode(context, batch))
        if status == 0:
            wall_s = time.perf_counter() - begin_s
            self._policy.record(Step(wall_s, time.thread_time() - begin_cpu_s))
        return status
