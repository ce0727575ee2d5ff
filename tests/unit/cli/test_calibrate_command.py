"""`brim calibrate` without measuring: what it refuses, shows and says on the way."""

import json
from pathlib import Path

import msgspec
import pytest
from support import calibrated

from brim.cli.app import main
from brim.cli.calibrate import Progress
from brim.core.machine import Conditions, MachineSpec
from brim.machine import calibrations, reading

MACHINE = MachineSpec(
    name="laptop", system="linux", ram_bytes=16 * 2**30, others_bytes=0, performance_cores=2
)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A laptop whose calibrations lie in a directory of the test's own."""
    monkeypatch.setattr(reading, "read_machine", lambda: MACHINE)
    monkeypatch.setattr(calibrations, "calibrations_directory", lambda: tmp_path)


def store() -> None:
    measured = msgspec.structs.replace(
        calibrated.calibration(),
        engine_version=calibrations.engine_version("llamacpp"),
    )
    calibrations.save_calibration(measured, MACHINE)


def test_a_busy_machine_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence names the reading and the way round it; nothing is stored."""
    monkeypatch.setattr(reading, "read_conditions", lambda: Conditions(busy_fraction=0.47))
    assert main(["calibrate"]) == 1
    said = capsys.readouterr().err
    assert "other programs use 47% of the processors" in said
    assert "--anyway" in said
    assert said.count("\n") == 1


def test_nothing_to_show_says_what_to_run(capsys: pytest.CaptureFixture[str]) -> None:
    """A machine that was never calibrated is no success."""
    assert main(["calibrate", "--show"]) == 1
    assert "has not been calibrated; run: brim calibrate" in capsys.readouterr().err


def test_what_was_measured_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bandwidth, disk and the rate of each combination, in a table."""
    monkeypatch.setattr(calibrations, "MAX_AGE_S", float("inf"))
    store()
    assert main(["calibrate", "--show"]) == 0
    shown = capsys.readouterr().out
    assert "laptop: calibration of 2027-01-15" in shown
    assert "memory, 2 threads  45.0 GB/s" in shown
    assert "1/2 threads, passive, KV q8_0/q8_0, flash" in shown


def test_json_has_the_costs_and_not_the_samples(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Programs get status, path and what was fitted; the file has the rest."""
    monkeypatch.setattr(calibrations, "MAX_AGE_S", float("inf"))
    store()
    assert main(["calibrate", "--show", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["status"] == "good"
    assert Path(shown["path"]).exists()
    assert shown["calibration"]["costs"][0]["decode_s"]["bytes Q4_K"] > 0
    assert shown["calibration"]["samples"] == []


def test_an_engine_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """The choices are named."""
    assert main(["calibrate", "--engine", "toy"]) == 1
    assert "choose one of llamacpp" in capsys.readouterr().err


def test_mlx_is_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """Calibration measures llama.cpp; the sentence says where forecasts for MLX come from."""
    assert main(["calibrate", "--engine", "mlx"]) == 1
    assert "measures llama.cpp alone; MLX is forecast from measured Macs" in capsys.readouterr().err


def test_a_log_gets_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    """Two steps at once are one line; a terminal's is written over and wiped at the end."""
    progress = Progress(is_terminal=False)
    progress.show(0.1, "one")
    progress.show(0.5, "two")
    progress.end()
    assert capsys.readouterr().err.count("\n") == 1
    terminal = Progress(is_terminal=True)
    terminal.show(0.5, "something long")
    terminal.show(0.6, "short")
    terminal.end()
    said = capsys.readouterr().err
    assert "\n" not in said
    assert said.endswith(" \r")
    assert "left: short" in said
