"""What the governor does in the scenarios of examples/ stays as it is, unless a change means it."""

import json
from typing import Any

import pytest
from golden.golden_scenarios import EXAMPLES, LOGS, log_of, scenarios
from support.described_runtime import play

from brim.machine.scenario import load_scenario


def stored(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (LOGS / f"{name}.jsonl").read_text().splitlines()]


def stances(name: str, field: str) -> list[tuple[float, Any]]:
    """When a stance began, and what it says."""
    events = [event for event in stored(name) if event["kind"] == "stance changed"]
    return [(event["at_s"], event["detail"][field]) for event in events]


@pytest.mark.parametrize("name", scenarios())
def test_event_logs_are_those_on_file(name: str) -> None:
    """A scenario's events are what its file says; `make goldens` writes them anew."""
    assert log_of(name) == (LOGS / f"{name}.jsonl").read_text()


def test_every_log_is_of_a_scenario() -> None:
    """No file is left over from a scenario that is gone."""
    assert {path.stem for path in LOGS.glob("*.jsonl")} == set(scenarios())


@pytest.mark.parametrize("name", scenarios())
def test_every_request_of_a_scenario_is_answered(name: str) -> None:
    """Once each, however long it had to wait, and everything is allowed in the end."""
    scenario = load_scenario(EXAMPLES / f"{name}.toml")
    assert play(scenario).num_answered == len(scenario.requests)
    last = [event for event in stored(name) if event["kind"] == "stance changed"][-1]["detail"]
    assert (last["memory"], last["power"]) == ("normal", "full")
    assert last["admits"]
    assert last["loads"]


def test_a_growing_browser_costs_cache_first_and_the_model_last() -> None:
    """The pool shrinks at the warning, the model leaves at critical when its answer has ended.

    The next question loads it, and after a later warning its pool grows back.
    """
    events = [(e["kind"], e["at_s"]) for e in stored("browser-fills-memory") if "model" in e]
    kinds = [kind for kind, _ in events]
    assert kinds == [
        "kv shrunk", "model unloaded", "model loading", "model loaded", "kv shrunk", "kv grown",
    ]  # fmt: skip
    assert dict(reversed(events))["kv shrunk"] == 40.0
    unloaded = next(e for e in stored("browser-fills-memory") if e["kind"] == "model unloaded")
    assert 70.0 < unloaded["at_s"] < 75.0, "an answer was running when it became critical"
    assert (unloaded["before_bytes"] > 5e9, unloaded["after_bytes"]) == (True, 0)


def test_heat_slows_work_in_steps_and_lets_it_go_on() -> None:
    """Heavy paces, trapping more, and moderate heat does not undo it; no model leaves for heat."""
    assert stances("fanless-heats-up", "power") == [
        (75.0, "saving"), (150.0, "hot"), (290.0, "saving"), (360.0, "full"),
    ]  # fmt: skip
    paces = [pace for _, pace in stances("fanless-heats-up", "pace_fraction")]
    assert paces[1] < paces[0] < 1.0
    assert all(event["kind"] == "stance changed" for event in stored("fanless-heats-up"))


def test_a_battery_bounds_background_and_saves_when_it_is_low() -> None:
    """On battery, then low, then low power mode, and full half a minute after both are over."""
    assert stances("laptop-leaves-power", "power") == [
        (40.0, "battery"), (120.0, "saving"), (350.0, "full"),
    ]  # fmt: skip
    assert [runs for _, runs in stances("laptop-leaves-power", "runs_background")] == [
        True, False, True,
    ]  # fmt: skip


def test_a_swapping_studio_keeps_its_pinned_model() -> None:
    """Swapping is critical before the system says so; what nobody needs leaves, not the pinned."""
    memory = stances("shared-studio", "memory")
    assert memory[0] == (60.0, "warning")
    assert (122.0, "critical") in memory
    unloaded = {e["model"] for e in stored("shared-studio") if e["kind"] == "model unloaded"}
    assert unloaded == {"code", "notes", "embed"}
