"""The command line of `brim bench`."""

import pytest
from typer.testing import CliRunner

from brim.bench.serve import Report, Row
from brim.bench.stats import summarise
from brim.cli import bench
from brim.errors import ConfigError

RUNNER = CliRunner()


@pytest.mark.parametrize("text", ["", "x", "1,,2", "-1", "1;2"])
def test_lists_of_numbers_that_are_none_are_refused(text: str) -> None:
    """The message names the option and shows the form."""
    result = RUNNER.invoke(bench.app, ["speed", "-m", "demo", "--depth", text])
    assert result.exit_code == 2
    assert "--depth takes numbers from 0 up" in " ".join(result.output.split())


def test_a_concurrency_of_zero_is_refused() -> None:
    """Nobody would ask anything."""
    result = RUNNER.invoke(bench.app, ["serve", "-e", "a=http://h", "--concurrency", "0"])
    assert result.exit_code == 2
    assert "from 1 up" in " ".join(result.output.split())


def test_an_unknown_objective_is_refused_with_the_choices() -> None:
    """A misspelt word is bad usage and not a traceback."""
    result = RUNNER.invoke(bench.app, ["speed", "-m", "demo", "--objective", "speed"])
    assert result.exit_code == 2
    assert "decode, prefill, memory" in " ".join(result.output.split())


def test_a_url_that_is_not_one_is_refused() -> None:
    """Endpoints are read before anything is sent."""
    result = RUNNER.invoke(bench.app, ["serve", "-e", "nonsense"])
    assert isinstance(result.exception, ConfigError)
    assert "NAME=http://HOST:PORT" in str(result.exception)


def test_times_are_shown_in_milliseconds_and_rates_as_they_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A figure in seconds is scaled and renamed; tokens a second are not."""
    rows = tuple(
        Row(endpoint="a", concurrency=1, figure=figure, value=summarise([value]), ratio=None)
        for figure, value in (("ttft_p50_s", 0.25), ("output_tok_s", 40.0))
    )
    bench._print_serve(Report(targets=(), repetitions=1, num_requests=1, rounds=(), rows=rows))
    out = capsys.readouterr().out
    assert "ttft_p50_ms" in out
    assert "250.0" in out
    assert "output_tok_s" in out
    assert "40.0" in out
