"""The measuring child process, seen from its parent."""

import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from types import TracebackType

import msgspec

from brim.bench.calibrate.child import Order, Ran, Timed
from brim.bench.calibrate.readiness import MAX_BUSY
from brim.core.plan import Plan
from brim.errors import EngineError
from brim.machine.others_load import OthersLoad
from brim.runtime.worker_start import exit_in_words, worker_environment

ATTEMPTS = 3
"""Times that an order is carried out at most: on a machine that never rests, three quiet moments
do not come either."""

STOP_LIMIT_S = 10.0
"""For a child between orders to see the end of its input; then it is killed."""


class MeasuringProcess:
    """One child with its own environment; a context manager that ends it."""

    def __init__(self, plan: Plan) -> None:
        """Start it with what `plan` needs in the environment; nothing else is taken from it."""
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-m", "brim.bench.calibrate.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=worker_environment(plan, os.environ),
        )

    def __enter__(self) -> "MeasuringProcess":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the child, at once where an order is still running."""
        if error is not None:
            self.kill()
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue
        try:
            self._child.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    def kill(self) -> None:
        """End it at once, whatever it is doing."""
        self._child.kill()

    def run_quietly(self, order: Order, *, attempts: int = ATTEMPTS) -> tuple[Ran, float]:
        """Repeat an order until other programs leave it alone; each figure's quickest attempt.

        Also gives the share of the processors that others used in the quietest one.

        Raises:
            BrimError: As `run`.
        """
        found, others = [], 1.0
        for _ in range(attempts):
            watch = OthersLoad((os.getpid(), self._child.pid))
            found.append(self.run(order))
            others = min(others, watch.busy_fraction())
            if others <= MAX_BUSY:
                break
        return quickest(found), others

    def run(self, order: Order) -> Ran:
        """Send an order and wait for its answer.

        Raises:
            BrimError: What the engine said, or EngineError where the process died.
        """
        stdin, stdout = self._child.stdin, self._child.stdout
        if stdin is None or stdout is None:
            raise EngineError("the measuring process has no pipes; run brim calibrate again")
        try:
            stdin.write(msgspec.json.encode(order) + b"\n")
            stdin.flush()
        except BrokenPipeError:
            pass  # what it died of is told below
        line = stdout.readline()
        if not line:
            ended = exit_in_words(self._child.wait(STOP_LIMIT_S))
            raise EngineError(
                f"{order.plan.engine}: the measuring process {ended} while it timed "
                f"{order.plan.model.name}; run brim calibrate again"
            )
        ran = msgspec.json.decode(line, type=Ran)
        if ran.error is not None:
            raise ran.error.exception()
        return ran


def quickest(attempts: Sequence[Ran]) -> Ran:
    """The first of several answers to one order, with each figure from its quickest attempt.

    What disturbs a measurement only ever adds time, and seldom to all of an order.
    """
    first = attempts[0]
    return msgspec.structs.replace(
        first,
        load_s=min(ran.load_s for ran in attempts),
        prefill=_quickest([timed for ran in attempts for timed in ran.prefill]),
        decode=_quickest([timed for ran in attempts for timed in ran.decode]),
    )


def _quickest(found: Iterable[Timed]) -> tuple[Timed, ...]:
    """One of each prompt length and depth, in the order of the first ones."""
    best: dict[tuple[int, int], Timed] = {}
    for timed in found:
        key = (timed.num_prompt, timed.depth)
        if key not in best or timed.seconds < best[key].seconds:
            best[key] = timed
    return tuple(best.values())
