"""Engines side by side on one model: speed in turns, ratios pair by pair, memory beside the plan.

Each engine runs in a child process of its own (speed_child.py).  Within a repetition they take
turns, and begin in another order in the next, so that a machine that drifts drifts for all.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Protocol

import msgspec

from brim.bench.speed import Case, Row, check_cases, row
from brim.bench.speed_child import Order, Ran
from brim.bench.stats import Summary, pairwise_ratios, summarise
from brim.core.memory import Footprint, MemoryTerms
from brim.core.plan import Plan
from brim.errors import EngineError
from brim.runtime.worker_start import exit_in_words, worker_environment

Progress = Callable[[str], None]

STOP_LIMIT_S = 10.0
"""For a child between orders to see the end of its input; then it is killed."""


class EngineMemory(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine's process held at most after a test, and what was planned."""

    dirty_bytes: int | None = None
    """Anonymous memory, by the system's account; None where it does not say."""
    file_bytes: int | None = None
    """File pages in RAM: mapped weights."""
    num_tokens: int = 0
    """In its sequences when that was read."""
    footprint: Footprint | None = None
    """By the backend's own account."""
    planned: MemoryTerms
    """With the whole context filled."""


class EngineSide(msgspec.Struct, frozen=True, kw_only=True):
    """One engine with the form of the model that it loads."""

    engine: str
    model: str
    quant: str
    load_s: float
    memory: EngineMemory
    rows: tuple[Row, ...]


class Ratio(msgspec.Struct, frozen=True, kw_only=True):
    """How many times as fast as the first engine another one was at one test."""

    test: str
    engine: str
    reference: str
    ratio: Summary


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """All engines' figures, and the ratios to the first one's."""

    sides: tuple[EngineSide, ...]
    ratios: tuple[Ratio, ...]


class Child(Protocol):
    """A loaded engine that carries out orders."""

    load_s: float

    def run(self, order: Order) -> Ran:
        """Carry out one order."""


StartChild = Callable[[Plan], contextlib.AbstractContextManager[Child]]


def compare_engines(
    plans: Sequence[Plan],
    wanted: Sequence[Case],
    *,
    repetitions: int,
    progress: Progress = lambda _: None,
    start: StartChild | None = None,
) -> Comparison:
    """Time every case on every engine, in turns.

    Args:
        plans: One for each engine; ratios are to the first.
        wanted: What to time.
        repetitions: Counted runs of each case, after one that is not.
        progress: Told what is being done.
        start: Starts an engine's process; the tests' own.

    Raises:
        InvalidRequest: A case needs more KV or sequences than a plan has.
        BrimError: What an engine said, or EngineError where its process died.
    """
    for plan in plans:
        check_cases(plan, wanted)
    with contextlib.ExitStack() as stack:
        sides = []
        for plan in plans:
            progress(f"{plan.engine}: loading {plan.model.name} {plan.model.quant}")
            sides.append(_Side(plan, stack.enter_context((start or SpeedChild)(plan))))
        for case in wanted:
            progress(f"{case.name}: {repetitions} repetitions on each engine")
            for repetition in range(repetitions + 1):
                shift = repetition % len(sides)
                for side in sides[shift:] + sides[:shift]:
                    side.run(case, is_counted=repetition > 0)
    first, *others = sides
    return Comparison(
        sides=tuple(side.report(wanted) for side in sides),
        ratios=tuple(other.ratio(first, case) for other in others for case in wanted),
    )


class _Side:
    """Collects one engine's samples."""

    def __init__(self, plan: Plan, child: Child) -> None:
        self._plan = plan
        self._child = child
        self._samples_ns: dict[Case, list[int]] = {}
        self._memory = EngineMemory(planned=plan.memory)

    def run(self, case: Case, *, is_counted: bool) -> None:
        # The run that is not counted leaves as much behind as the others.
        ran = self._child.run(Order(case=case, with_memory=not is_counted))
        if is_counted:
            self._samples_ns.setdefault(case, []).append(ran.elapsed_ns)
            return
        dirty_bytes = ran.memory.dirty_bytes if ran.memory else None
        if self._memory.footprint is None or (dirty_bytes or 0) > (self._memory.dirty_bytes or 0):
            self._memory = EngineMemory(
                dirty_bytes=dirty_bytes,
                file_bytes=ran.memory.file_bytes if ran.memory else None,
                num_tokens=case.num_tokens,
                footprint=ran.footprint,
                planned=self._plan.memory,
            )

    def ratio(self, reference: "_Side", case: Case) -> Ratio:
        """Rates over the reference's of the same repetition."""
        theirs, mine = reference._samples_ns[case], self._samples_ns[case]
        return Ratio(
            test=case.name,
            engine=self._plan.engine,
            reference=reference._plan.engine,
            # A rate's ratio is the times' the other way round.
            ratio=summarise(pairwise_ratios(theirs, mine)),
        )

    def report(self, wanted: Sequence[Case]) -> EngineSide:
        plan = self._plan
        return EngineSide(
            engine=plan.engine,
            model=plan.model.name,
            quant=plan.model.quant,
            load_s=self._child.load_s,
            memory=self._memory,
            rows=tuple(row(plan, case, self._samples_ns[case]) for case in wanted),
        )


class SpeedChild:
    """An engine's process; a context manager that ends it."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.load_s = 0.0

    def __enter__(self) -> "SpeedChild":
        """Start it and wait until the model is loaded.

        Raises:
            BrimError: What the engine said, or EngineError where the process died.
        """
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "brim.bench.speed_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=worker_environment(self._plan, os.environ),
        )
        try:
            self.load_s = self._ask(self._plan).elapsed_ns / 1e9
        except BaseException:
            self._end(STOP_LIMIT_S)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End it, at once where an order may still be running."""
        self._end(STOP_LIMIT_S if error is None else 0.0)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def run(self, order: Order) -> Ran:
        """Carry out one order.

        Raises:
            BrimError: What the engine said, or EngineError where the process died.
        """
        return self._ask(order)

    def _ask(self, value: Plan | Order) -> Ran:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        with contextlib.suppress(BrokenPipeError):  # what it died of is told below
            stdin.write(msgspec.json.encode(value) + b"\n")
            stdin.flush()
        line = stdout.readline()
        if not line:
            ended = exit_in_words(self._process.wait(STOP_LIMIT_S))
            raise EngineError(
                f"{self._plan.engine}: the process that was measured {ended}; try shorter tests "
                "or --engine to measure the other engine alone"
            )
        ran = msgspec.json.decode(line, type=Ran)
        if ran.error is not None:
            raise ran.error.exception()
        return ran

    def _end(self, patience_s: float) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        try:
            self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
