"""A crowd that asks for more models than fit: everyone is answered, and models take turns."""

import itertools

import pytest
from conftest import require_engine
from support.crowd import GB, PROMPTS, LoadWatch, crowd, one_of_a_crowd, weighing
from support.long_models import demo_variant
from support.models import plan_for
from support.serving import serving, toy_plan

from brim.core.event import EventKind
from brim.core.plan import Plan

pytestmark = pytest.mark.anyio

NAMES = ("six", "five", "four", "three")


@pytest.fixture(params=["toy", "llamacpp"])
def plans(request: pytest.FixtureRequest) -> list[Plan]:
    """Four models of which two fit, on the teaching engine and as variants of the demo."""
    require_engine(request.param)
    if request.param == "toy":
        found = [toy_plan(kv_tokens=8192) for _ in NAMES]
    else:
        paths = [demo_variant(name, real_layers=6 - place) for place, name in enumerate(NAMES)]
        found = [plan_for("llamacpp", path=path, kv_tokens=8192) for path in paths]
    return [weighing(plan, name, 5 * GB) for plan, name in zip(found, NAMES, strict=True)]


async def test_a_hundred_requests_for_four_models_of_which_two_fit(plans: list[Plan]) -> None:
    """All are answered as each model answers alone, and each model is loaded for all who wait."""
    async with serving(*plans) as gateway:
        alone = {}
        for name, prompt in itertools.product(NAMES, PROMPTS):
            alone[name, prompt] = await one_of_a_crowd(gateway, name, prompt)
        async with LoadWatch(gateway) as watch:
            served = await crowd(gateway, NAMES, num_requests=100)
        events = gateway.event_log.events()
    assert [each.error for each in alone.values() if each.error] == []
    assert [each.error for each in served if each.error] == []
    assert len(served) == 100
    wrong = [each for each in served if each.text != alone[each.model, each.prompt].text]
    assert wrong == []
    # Two of the four are out of memory when the crowd comes: each is loaded once, or once more
    # where its turn ended before all who asked for it had come.
    assert 2 <= len(watch.loads) <= 4
    loaded = [event for event in events if event.kind is EventKind.MODEL_LOADED]
    assert len(loaded) >= len(watch.loads) + 2
