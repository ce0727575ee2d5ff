"""`brim machine`: what was read, from where, and the budget."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from brim.cli.app import main
from brim.core.machine import Conditions, MachineSpec
from brim.machine import linux_conditions

SCENARIO = """
machine = "M4:10:16"
[[step]]
at_s = 0
pressure = "normal"
[[step]]
at_s = 30
pressure = "warning"
others_bytes = 9_000_000_000
"""


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main(["machine", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def scenario(tmp_path: Path) -> str:
    path = tmp_path / "tight.toml"
    path.write_text(SCENARIO)
    return str(path)


def test_a_named_machine_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    """Figures have stable names with units, the budget is in bytes, and nothing is felt."""
    said = answer(capsys, "--machine", "M4 Max:40:128")
    assert said["machine"]["ram_bytes"] == 128 * 2**30
    assert said["machine"]["memory_bandwidth"] == 546 * 10**9
    assert said["machine"]["is_at_hand"] is False
    assert said["conditions"] is None
    assert said["sensors"] == {}
    assert said["budget"]["tight_bytes"] == said["machine"]["gpu_limit_bytes"]
    assert said["budget"]["tight_binding"] == "gpu limit"
    assert set(said["budget"]) == {
        "comfortable_bytes", "comfortable_binding", "tight_bytes", "tight_binding", "reserve_bytes",
    }  # fmt: skip


def test_a_named_machine_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    """Each figure stands with its unit and where it came from."""
    assert main(["machine", "--machine", "M4 Max:40:128"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "M4 Max:40:128"
    rows = {line.split("  ")[0]: line.split() for line in lines}
    assert rows["memory bandwidth"][2:5] == ["546", "GB/s", "chip"]
    assert rows["fp32 flops"][2:4] == ["18.4", "TFLOPS"]
    assert "interpolated" not in " ".join(rows["gpu limit"])
    assert {"budget, comfortable", "budget, tight", "reserve"} <= set(rows)


def test_a_moment_of_a_scenario(capsys: pytest.CaptureFixture[str], scenario: str) -> None:
    """The scenario is read at the second asked for, at 0 unless given, and marked as simulated."""
    assert answer(capsys, "--scenario", scenario)["conditions"]["pressure"] == "normal"
    said = answer(capsys, "--scenario", scenario, "--at", "31")
    assert said["conditions"]["pressure"] == "warning"
    assert said["machine"]["others_bytes"] == 9_000_000_000
    assert said["machine"]["is_simulated"] is said["conditions"]["is_simulated"] is True
    assert main(["machine", "--scenario", scenario]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "simulated M4:10:16"
    assert any(line.startswith("pressure") and "simulated: " in line for line in lines)


def test_this_machine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The machine at hand is read, and a figure that it does not give has the reason instead."""
    read = functools.partial(
        linux_conditions.read_linux_conditions, tmp_path, sleep=lambda seconds: None
    )
    monkeypatch.setattr("brim.machine.reading.read_conditions", read)
    said = answer(capsys)
    assert said["machine"]["is_at_hand"] is True
    assert said["budget"]["comfortable_bytes"] < said["machine"]["ram_bytes"]
    assert said["conditions"]["stalled_percent"] is None
    assert "no /proc/pressure/memory" in said["conditions"]["sources"]["stalled_percent"]
    fields = len(MachineSpec.__struct_fields__) + len(Conditions.__struct_fields__)
    assert main(["machine"]) == 0
    lines = capsys.readouterr().out.splitlines()
    notices = said["sensors"]["pressure_notices"]
    # Two headers, one row of energy and three of the budget; seven fields are about the reading.
    assert len(lines) == fields - 7 + 6 + len(notices)
    assert said["sensors"]["counts_energy"] is any(line.startswith("energy  c") for line in lines)
    assert sum(line.startswith("pressure notice") for line in lines) == len(notices) > 0
    assert next(line for line in lines if line.startswith("thermal ")).split()[1] == "-"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--at", "3"], 2, "give one with --scenario FILE"),
        (["--machine", "M4", "--scenario", "x"], 2, "leave one out"),
        (["--scenario", "x", "--at", "-1"], 2, "'--at'"),
        (["--machine", "M4 Ultra"], 1, "no M4 Ultra in the table"),
        (["--scenario", "none.toml"], 1, "none.toml cannot be read"),
    ],
)
def test_wrong_questions_are_one_sentence(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    """Bad usage is 2, a machine or scenario that does not exist is 1, each with what to do."""
    assert main(["machine", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.count("\n") == 1
