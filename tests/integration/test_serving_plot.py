"""Plots of a comparison, drawn by the real library, which takes a second to load."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from brim.bench.serving.report import Report, Sample, ServerNote, rows
from brim.bench.serving.session import Figure
from brim.bench.serving.sizes import Sizes
from brim.cli import bench
from brim.errors import ConfigError


def report() -> Report:
    samples = [
        Sample(
            workload="cold",
            server=server,
            repetition=repetition,
            duration_s=1.0,
            figures=(Figure(name="ttft_s", value=repetition + 1.0),),
        )
        for server in ("one", "two")
        for repetition in range(2)
    ]
    return Report(
        machine="m",
        started_at="2026-01-01T00:00:00+00:00",
        seed=1,
        reference="one",
        servers=tuple(
            ServerNote(name=name, command=None, model="m", takes_ignore_eos=True)
            for name in ("one", "two")
        ),
        sizes=Sizes(),
        repetitions=2,
        was_interrupted=False,
        complaints=(),
        samples=tuple(samples),
        rows=tuple(rows(samples, "one")),
    )


def test_equal_reports_give_equal_files_that_name_every_bar(tmp_path: Path) -> None:
    """A diff of a plot means a change of figures."""
    pytest.importorskip("matplotlib")
    from brim.bench.serving.plot import draw

    paths = [tmp_path / "a.svg", tmp_path / "b.svg"]
    for path in paths:
        draw(report(), path)
    one, two = (path.read_text() for path in paths)
    assert one == two
    assert all(f"ttft_s {server}" in one for server in ("one", "two"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x.nonsense", r"name it \*\.svg, or one of .*png"),
        ("x", r"name it \*\.svg"),
        ("none/x.svg", "a directory that exists"),
        ("", "a directory that exists"),
    ],
)
def test_a_file_that_cannot_be_drawn_is_refused(tmp_path: Path, name: str, words: str) -> None:
    """The message says what to name instead."""
    pytest.importorskip("matplotlib")
    from brim.bench.serving.plot import check_plot, draw

    with pytest.raises(ConfigError, match=words):
        check_plot(tmp_path / name)
    with pytest.raises(ConfigError, match=words):
        draw(report(), tmp_path / name)


def test_a_plot_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    """No run of an hour ends with the news that its picture cannot be written."""
    pytest.importorskip("matplotlib")
    command = ["serve", "-e", "a=http://127.0.0.1:9", "--plot", str(tmp_path / "none" / "x.svg")]
    result = CliRunner().invoke(bench.app, command)
    assert isinstance(result.exception, ConfigError)
    assert "cannot write the plot" in result.exception.message
