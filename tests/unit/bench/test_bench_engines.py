"""Engines side by side: whose turn it is, what is made of it, and how failures are told."""

from contextlib import AbstractContextManager, nullcontext

import msgspec
import pytest
from support.models import plan_for

from brim.bench.engines import Comparison, EngineMemory, compare_engines
from brim.bench.speed import Case, Timer
from brim.bench.speed_child import Order, Ran, carry_out, load
from brim.core.memory import Footprint
from brim.core.plan import Plan
from brim.errors import InvalidRequest
from brim.machine.process_memory import ProcessMemory

TOY = plan_for("toy")
PLANS = [msgspec.structs.replace(TOY, engine=name) for name in ("slow", "quick")]

CASES = (Case(num_prompt=10), Case(num_generate=4, num_sequences=3, depth=20))

NS = {"slow": 2_000_000, "quick": 500_000}


class Scripted:
    """Engines that take a fixed time for a case; notes whose turn it is."""

    def __init__(self) -> None:
        self.turns: list[tuple[str, str]] = []

    def start(self, plan: Plan) -> AbstractContextManager["Played"]:
        return nullcontext(Played(self, plan.engine))


class Played:
    load_s = 1.5

    def __init__(self, bench: Scripted, engine: str) -> None:
        self.bench = bench
        self.engine = engine

    def run(self, order: Order) -> Ran:
        self.bench.turns.append((self.engine, order.case.name))
        ran = Ran(elapsed_ns=NS[self.engine] * order.case.num_timed)
        if not order.with_memory:
            return ran
        held = 1000 * order.case.num_tokens
        return msgspec.structs.replace(
            ran,
            memory=ProcessMemory(dirty_bytes=held, resident_bytes=held, file_bytes=7),
            footprint=Footprint(weights_bytes=5, mapped_weights_bytes=0, kv_bytes=held),
        )


def compared(bench: Scripted, repetitions: int = 2) -> Comparison:
    return compare_engines(PLANS, CASES, repetitions=repetitions, start=bench.start)


def test_engines_take_turns_and_begin_in_turn() -> None:
    """A machine that slows down slows both, and neither is always second."""
    bench = Scripted()
    compared(bench)
    first = [engine for engine, name in bench.turns if name == "pp10"]
    assert first == ["slow", "quick", "quick", "slow", "slow", "quick"]
    assert [name for _, name in bench.turns] == 6 * ["pp10"] + 6 * ["tg4 x3 @ d20"]


def test_ratios_say_how_many_times_as_fast_the_other_is() -> None:
    """Rates count the tokens of all sequences, and the run that warms up is left out."""
    found = compared(Scripted())
    assert [side.engine for side in found.sides] == ["slow", "quick"]
    assert [row.median_ts for row in found.sides[0].rows] == [500.0, 500.0]
    assert [len(row.samples_ns) for row in found.sides[1].rows] == [2, 2]
    assert [(r.test, r.engine, r.ratio.median) for r in found.ratios] == [
        ("pp10", "quick", 4.0),
        ("tg4 x3 @ d20", "quick", 4.0),
    ]


def test_memory_is_that_of_the_case_that_holds_most() -> None:
    """It stands beside what was planned."""
    side = compared(Scripted()).sides[0]
    assert side.memory == EngineMemory(
        dirty_bytes=72_000,
        file_bytes=7,
        num_tokens=72,
        footprint=Footprint(weights_bytes=5, mapped_weights_bytes=0, kv_bytes=72_000),
        planned=PLANS[0].memory,
    )


def test_what_a_plan_has_no_room_for_is_refused_before_anything_is_loaded() -> None:
    """Neither more sequences nor more tokens than planned."""
    bench = Scripted()
    wide = Case(num_generate=1, num_sequences=TOY.max_sequences + 1)
    with pytest.raises(InvalidRequest, match="make --batch smaller"):
        compare_engines(PLANS, [wide], repetitions=1, start=bench.start)
    long = Case(num_prompt=TOY.kv_tokens + 1)
    with pytest.raises(InvalidRequest, match="shorten it by 1"):
        compare_engines(PLANS, [long], repetitions=1, start=bench.start)
    assert bench.turns == []


def test_an_order_is_timed_on_the_loaded_engine() -> None:
    """Memory is read only where it is asked for."""
    engine, loaded = load(TOY)
    timer = Timer(engine, TOY)
    assert loaded.elapsed_ns > 0
    plain = carry_out(engine, timer, Order(case=CASES[1]))
    assert plain.elapsed_ns > 0
    assert (plain.memory, plain.footprint) == (None, None)
    full = carry_out(engine, timer, Order(case=CASES[1], with_memory=True))
    assert full.footprint == engine.footprint()


def test_a_failing_order_is_answered_with_its_error() -> None:
    """The parent raises it again, of the class it was."""
    engine, _ = load(TOY)
    ran = carry_out(engine, Timer(engine, TOY), Order(case=Case(num_generate=1, num_sequences=99)))
    assert ran.error is not None
    assert ran.error.kind == "Busy"
