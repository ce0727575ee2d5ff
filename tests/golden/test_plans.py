"""Plans for known models on known machines stay as they are, unless a change means to move them."""

import json
from typing import Any

import pytest
from golden.golden_plans import MACHINES, MODELS, PLANS, WORKED, kept

from brim.cli.plan_together import Wanted


def stored(name: str) -> dict[str, Any]:
    content = json.loads((PLANS / f"{name}.json").read_text())
    assert isinstance(content, dict)
    return content


@pytest.mark.parametrize("model", MODELS)
def test_plans_are_those_on_file(model: str) -> None:
    """Every plan of a model is what its file says; `make goldens` writes them anew."""
    wanted = {
        machine: Wanted(models=(model,), quant=MODELS[model], machine=machine)
        for machine in MACHINES
    }
    assert {machine: kept(wish) for machine, wish in wanted.items()} == stored(model)


@pytest.mark.parametrize("name", WORKED)
def test_worked_plans_are_those_on_file(name: str) -> None:
    """Every worked example is what its file says."""
    assert kept(WORKED[name]) == stored("worked")[name]


def test_every_file_is_of_a_plan() -> None:
    """No file is left over from a model that is no longer planned."""
    assert {path.stem for path in PLANS.glob("*.json")} == {*MODELS, "worked"}


def test_8b_fits_a_16_gb_m4() -> None:
    """An 8 B Q4_K_M model at 8K in q8_0 takes 5.6 to 6.6 GB there and decodes 18 to 24 tok/s."""
    plan = stored("worked")["8b-on-16gb"]
    assert plan["verdict"] == "comfortable"
    assert 5.6e9 <= plan["total_bytes"] <= 6.6e9
    assert 18 <= plan["decode_tok_s"]["expected"] <= 24


def test_70b_needs_64_gb() -> None:
    """A 70 B Q4_K_M model is refused with ways out on 36 and 48 GB, and planned from 64 GB on."""
    worked = stored("worked")
    for name in ("70b-on-36gb", "70b-on-48gb"):
        assert worked[name]["verdict"] == "no"
        assert len(worked[name]["ways_to_fit"]) == 3
    assert worked["70b-on-64gb"]["verdict"] in ("tight", "comfortable")
    assert worked["70b-on-128gb"]["verdict"] == "comfortable"


def test_7b_is_too_much_beside_a_desktop_on_8_gb() -> None:
    """A 7 B Q4_K_M model is refused on 8 GB."""
    assert stored("worked")["7b-on-8gb"]["verdict"] == "no"


def test_pairs_are_planned_together() -> None:
    """A draft pair fits 16 GB, and a 7 B Q6_K beside a 14 B Q4_K_M fits 36 GB."""
    worked = stored("worked")
    for name in ("7b-with-draft", "7b-and-14b-on-36gb"):
        assert worked[name]["verdict"] == "comfortable"
        assert len(worked[name]["models"]) == 2
