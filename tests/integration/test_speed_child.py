"""A comparison's processes: loaded, asked, ended, and mourned."""

from collections.abc import Iterator

import msgspec
import psutil
import pytest
from support.models import plan_for

from brim.bench.engines import SpeedChild, compare_engines
from brim.bench.speed import Case
from brim.bench.speed_child import Order
from brim.errors import ConfigError, EngineError

TOY = plan_for("toy")


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Every process that a test starts has ended with it."""
    before = {child.pid for child in psutil.Process().children()}
    yield
    assert {child.pid for child in psutil.Process().children()} <= before


def test_two_processes_are_compared_and_end() -> None:
    """Both give figures and memory of their own."""
    case = Case(num_generate=4, num_sequences=2, depth=8)
    found = compare_engines([TOY, TOY], [case], repetitions=2)
    assert [len(side.rows[0].samples_ns) for side in found.sides] == [2, 2]
    assert all(side.load_s > 0 and side.memory.footprint for side in found.sides)
    assert found.ratios[0].ratio.median > 0


def test_an_engine_that_does_not_load_says_why() -> None:
    """Its own sentence comes back, of its own class."""
    with pytest.raises(ConfigError, match="no engine named 'none'"):
        compare_engines(
            [msgspec.structs.replace(TOY, engine="none")], [Case(num_prompt=1)], repetitions=1
        )


def test_a_process_that_dies_is_told_with_what_it_died_of() -> None:
    """A killed engine is no hang and no traceback."""
    with SpeedChild(TOY) as child:
        psutil.Process(child.pid).kill()
        with pytest.raises(EngineError, match=r"toy: the process .* was killed by signal 9"):
            child.run(Order(case=Case(num_prompt=1)))
