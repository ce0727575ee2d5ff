"""`python -m brim.bench.speed_child`: one engine of a comparison, in a process of its own.

Engines never share a process: what each holds is to be read off its own, their thread settings
count from the moment that a library is loaded, and a worker has only one as well.  The plan comes
as the first JSON line on standard input and is loaded; each further line is an order, answered by
one line on standard output.  Between orders it sleeps.
"""

import os
import sys
import time

import msgspec

from brim.bench.speed import Case, Timer
from brim.core.answer import ErrorInfo
from brim.core.memory import Footprint
from brim.core.plan import Plan
from brim.engine import factory
from brim.engine.base import Engine
from brim.errors import BrimError
from brim.machine.process import process_memory
from brim.machine.process_memory import ProcessMemory


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """Run a case once, and say what the process holds where asked."""

    case: Case
    with_memory: bool = False


class Ran(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to the plan, and to each order."""

    elapsed_ns: int = 0
    """Of the load, or of the case's timed part."""
    memory: ProcessMemory | None = None
    """By the system's account; None where it does not say."""
    footprint: Footprint | None = None
    """By the backend's."""
    error: ErrorInfo | None = None
    """Why there are no figures."""


def load(plan: Plan) -> tuple[Engine, Ran]:
    """The engine, loaded, and how long that took."""
    start_ns = time.perf_counter_ns()
    engine = factory.create(plan.engine)
    engine.load(plan)
    return engine, Ran(elapsed_ns=time.perf_counter_ns() - start_ns)


def carry_out(engine: Engine, timer: Timer, order: Order) -> Ran:
    """One order's answer, its failure included."""
    try:
        elapsed_ns = timer.sample_ns(order.case)
        if not order.with_memory:
            return Ran(elapsed_ns=elapsed_ns)
        memory, footprint = process_memory(os.getpid()), engine.footprint()
        return Ran(elapsed_ns=elapsed_ns, memory=memory, footprint=footprint)
    except BrimError as error:
        return Ran(error=ErrorInfo.of(error))


def main() -> None:
    """Load the plan of the first line, then serve orders until the end of input."""
    lines = iter(sys.stdin.buffer)
    plan = msgspec.json.decode(next(lines), type=Plan)
    try:
        engine, loaded = load(plan)
    except BrimError as error:
        _answer(Ran(error=ErrorInfo.of(error)))
        return
    _answer(loaded)
    timer = Timer(engine, plan)
    for line in lines:
        _answer(carry_out(engine, timer, msgspec.json.decode(line, type=Order)))
    timer.close()
    engine.shutdown()


def _answer(ran: Ran) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(ran) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
