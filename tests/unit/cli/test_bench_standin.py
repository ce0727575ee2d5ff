"""The command line of `brim bench standin`."""

import json
from pathlib import Path

import pytest
from support.standin_machine import MODEL, Machine, granted_at_once, plan_of
from typer.testing import CliRunner

from brim.bench.standin.trial import Trial, Wanted, try_model
from brim.cli import bench
from brim.core.forecast import Forecast, SpeedForecast, SpeedRange

RUNNER = CliRunner()

FORECAST = Forecast(
    speed=SpeedForecast(
        decode_tok_s=SpeedRange(low=20.0, expected=25.0, high=30.0),
        prefill_tok_s=SpeedRange(low=80.0, expected=90.0, high=100.0),
        decode_ceiling_tok_s=40.0,
        source="a test",
    )
)


@pytest.fixture
def trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command measures on the played machine, and no forecast asks the real one."""

    def played(*args: object, **kwargs: object) -> Trial:
        wanted = args[1]
        assert isinstance(wanted, Wanted)
        return try_model(
            MODEL, wanted, plan_of, granted_at_once, name="m", directory=tmp_path,
            run=Machine().run,
        )  # fmt: skip

    monkeypatch.setattr("brim.bench.standin.trial.try_model", played)
    monkeypatch.setattr("brim.cli.bench_standin._forecast", lambda trial, machine: FORECAST)


@pytest.mark.usefixtures("trials")
def test_json_has_measured_beside_forecast_with_units() -> None:
    """Names are stable, and what was scaled is said."""
    result = RUNNER.invoke(bench.app, ["standin", "demo", "--layers", "8", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["decode_tok_s"]["expected"] == pytest.approx(1 / 0.042)
    assert report["decode_tok_s"]["low"] < 1 / 0.042 < report["decode_tok_s"]["high"]
    assert report["forecast_decode_tok_s"]["expected"] == 25.0
    assert report["resident_bytes"] == report["dirty_bytes"] + report["file_bytes"]
    assert report["is_scaled"]
    assert [each["num_layers"] for each in report["slices"]] == [2, 8]
    assert set(report["scaled"]) >= {"decode", "prefill", "anonymous memory", "weights"}
    assert report["weights_bytes"] == MODEL.weights_bytes == report["planned_weights_bytes"]


@pytest.mark.usefixtures("trials")
def test_the_table_says_what_was_measured_forecast_and_scaled() -> None:
    """A reader sees that a figure is worked out and from what."""
    result = RUNNER.invoke(bench.app, ["standin", "demo", "--layers", "8"])
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    assert "25.0 (20.0 to 30.0)" in text
    assert "measured were 2 layers" in text
    assert "straight line through 2 and 8 layers, continued to 16" in text
    assert "answers mean nothing" in text
    assert "forecast by: a test" in text


@pytest.mark.usefixtures("trials")
def test_where_nothing_is_forecast_the_reason_stands_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A reason for silence is not taken for the source of a figure."""
    silent = Forecast(reasons={"speed": "nobody knows"})
    monkeypatch.setattr("brim.cli.bench_standin._forecast", lambda trial, machine: silent)
    result = RUNNER.invoke(bench.app, ["standin", "demo"])
    assert result.exit_code == 0, result.output
    assert "no forecast: nobody knows" in result.stdout


@pytest.mark.usefixtures("trials")
def test_a_whole_model_has_no_word_of_scaling() -> None:
    """Nothing was worked out."""
    result = RUNNER.invoke(bench.app, ["standin", "demo"])
    assert result.exit_code == 0, result.output
    assert "straight line" not in result.stdout


def test_a_context_shorter_than_the_tests_is_bad_usage() -> None:
    """The message has both numbers, and nothing is built."""
    result = RUNNER.invoke(bench.app, ["standin", "demo", "--ctx", "100"])
    assert result.exit_code == 2
    assert "the tests need 512 tokens, --ctx has 100" in " ".join(result.output.split())
