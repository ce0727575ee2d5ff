"""The command line of `brim bench serve`."""

import pytest
from typer.testing import CliRunner

from brim.bench.serving.report import Report, Row, ServerNote
from brim.bench.serving.sizes import Sizes
from brim.bench.stats import summarise
from brim.cli import bench
from brim.cli.bench_serve import print_report
from brim.errors import ConfigError

RUNNER = CliRunner()
SERVER = ["serve", "-e", "a=http://h"]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--concurrency", "0"], "--concurrency takes numbers from 1 up"),
        (["--depths", "1,x"], "--depths takes numbers from 1 up"),
        (["--rates", "0"], "--rates takes numbers above 0"),
        (["--rates", "1,inf"], "--rates takes numbers above 0"),
        (["--scale", "0"], "--scale"),
    ],
)
def test_numbers_that_are_none_are_bad_usage(options: list[str], complaint: str) -> None:
    """The message names the option, and nothing is started."""
    result = RUNNER.invoke(bench.app, [*SERVER, *options])
    assert result.exit_code == 2
    assert complaint in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        (["serve"], "name one by --endpoint or --server"),
        (["serve", "-e", "nonsense"], "NAME=http://HOST:PORT"),
        (["serve", "-s", "nonsense"], "NAME='COMMAND --port {port}'"),
        (["serve", "-s", "a=serve --port 80"], r"has no {port}"),
        (["serve", "-s", "a=serve '{port}"], "cannot be read"),
        ([*SERVER, "-s", "a=serve {port}"], "same name"),
        ([*SERVER, "-w", "nonsense"], "there is no workload 'nonsense'; there are single, cold"),
        ([*SERVER, "--reference", "b"], "the reference 'b' is none of the servers: a"),
        ([*SERVER, "--requests", "/none.jsonl"], "cannot read the requests"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_starts(
    command: list[str], complaint: str
) -> None:
    """One sentence says what to write instead."""
    result = RUNNER.invoke(bench.app, command)
    assert isinstance(result.exception, ConfigError)
    assert complaint in result.exception.message


def report(*rows: Row) -> Report:
    return Report(
        machine="m",
        started_at="2026-01-01T00:00:00+00:00",
        seed=1,
        reference="a",
        servers=(ServerNote(name="a", command=None, model="m", takes_ignore_eos=True),),
        sizes=Sizes(),
        repetitions=1,
        was_interrupted=False,
        complaints=(),
        samples=(),
        rows=rows,
    )


def test_figures_and_failures_stand_in_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes become MiB, other units stay, and a server that failed has a line with the reason."""
    value = summarise([2.0**21])
    print_report(
        report(
            Row(workload="shared-prefix", server="a", figure="memory_growth_bytes", value=value),
            Row(workload="cold", server="a", figure="ttft_s", value=summarise([0.25])),
            Row(workload="cold", server="b", failure="failed: it said no"),
        )
    )
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1][:5] == ["shared-prefix", "memory_growth_MiB", "a", "2.0", "2.0"]
    assert lines[2][:4] == ["cold", "ttft_s", "a", "0.250"]
    assert lines[3] == ["cold", "-", "b", "failed:", "it", "said", "no"]
