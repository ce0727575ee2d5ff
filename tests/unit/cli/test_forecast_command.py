"""`brim forecast`: rows in, errors and their summary out."""

import json
from pathlib import Path
from unittest import mock

import pytest
from support.apple_rows import SAMPLE

from brim.cli.app import main


def test_each_row_and_the_summary_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    """Every row has its forecast and error, and every kind its summary."""
    assert main(["forecast", str(SAMPLE), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert len(said["rows"]) == 60
    first = said["rows"][0]
    speed = first["forecast_tok_s"]
    assert speed["low"] < speed["expected"] < speed["high"]
    error = 100 * (speed["expected"] / first["measured_tok_s"] - 1)
    assert first["error_percent"] == pytest.approx(error)
    assert first["is_inside"] is (speed["low"] <= first["measured_tok_s"] <= speed["high"])
    assert [item["kind"] for item in said["summary"]] == ["decode", "prefill"]
    assert sum(group["num_rows"] for group in said["groups"]) == 60


def test_the_table_ends_with_the_summary(capsys: pytest.CaptureFixture[str]) -> None:
    """People read a line for each row, for each chip and engine, and for all."""
    assert main(["forecast", str(SAMPLE)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["row", "chip", "gpu"]
    assert lines[-1].split()[:3] == ["prefill", "all", "all"]


def test_a_missing_file_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is not there is named, with exit code 1."""
    assert main(["forecast", str(tmp_path / "none.json")]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "give a JSON list of measured rows" in err


def test_a_huge_file_is_refused_unread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file beyond the limit is refused by its size alone."""
    path = tmp_path / "rows.json"
    with path.open("wb") as file:
        file.truncate(2**40)
    assert main(["forecast", str(path)]) == 1
    assert "split it into files" in capsys.readouterr().err


def test_what_is_no_file_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A directory is called no file rather than missing, and a file that fails to be read too."""
    assert main(["forecast", str(tmp_path)]) == 1
    assert "is not a file; give a JSON list" in capsys.readouterr().err
    with mock.patch.object(Path, "read_bytes", side_effect=OSError(5, "Input/output error")):
        assert main(["forecast", str(SAMPLE)]) == 1
    assert "cannot be read: Input/output error; give" in capsys.readouterr().err


def test_names_cannot_steer_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Line ends and terminal codes in a row's texts are shown as question marks."""
    path = tmp_path / "rows.json"
    row = {"chip": "M4", "kind": "decode", "engine": "e", "model": "a\nb\x1b[31m"}
    path.write_text(json.dumps([row]))
    assert main(["forecast", str(path)]) == 0
    out = capsys.readouterr().out
    assert "a?b?[31m" in out
    assert "\x1b" not in out
