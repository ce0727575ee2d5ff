"""One suite, every engine: each test runs once a parameter of `engine_name`."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import require_engine
from support.models import plan_for

from brim.core.plan import Plan
from brim.engine import factory
from brim.engine.base import Engine

MakeEngine = Callable[..., Engine]
Load = Callable[[Plan], Any]


@pytest.fixture(params=["toy", "llamacpp", "mlx"])
def engine_name(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    require_engine(name)
    return name


@pytest.fixture
def make_engine(engine_name: str) -> Iterator[MakeEngine]:
    """Loads engines in the exact profile, with any plan value overridden; frees them afterwards."""
    made: list[Engine] = []

    def make(**overrides: Any) -> Engine:
        engine = factory.create(engine_name)
        made.append(engine)
        engine.load(plan_for(engine_name, **overrides))
        return engine

    yield make
    for engine in made:
        engine.shutdown()


@pytest.fixture
def load() -> Iterator[Load]:
    """Loads the engine that a plan names, which must be there; frees it afterwards."""
    made: list[Engine] = []

    def make(plan: Plan) -> Engine:
        require_engine(plan.engine)
        engine = factory.create(plan.engine)
        made.append(engine)
        engine.load(plan)
        return engine

    yield make
    for engine in made:
        engine.shutdown()


@pytest.fixture
def engine(make_engine: MakeEngine) -> Engine:
    return make_engine()


@pytest.fixture
def prompt(engine: Engine) -> list[int]:
    """About a hundred tokens of code."""
    text = (
        "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n" * 3
    )
    return engine.tokenizer.encode(text, add_special=False, parse_special=False)[:100]
