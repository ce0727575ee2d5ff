"""Subcommands, their exit codes, and errors as one sentence."""

import json
from pathlib import Path

import pytest

import brim
from brim.cli.app import main
from brim.cli.errors import exit_code_of, report, sentence
from brim.config.load import all_fields
from brim.errors import BrimError, ConfigError, DoesNotFit, all_error_classes


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    """The help lists the subcommands and ends well."""
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for command in ("run", "serve", "ps", "stop", "models", "convert", "bench", "config"):
        assert f"\n  {command} " in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """--version prints the version and nothing else."""
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"brim {brim.__version__}\n"


@pytest.mark.parametrize("group", [[], ["config"], ["bench"]])
def test_a_group_without_a_command_prints_its_help(
    capsys: pytest.CaptureFixture[str], group: list[str]
) -> None:
    """Whoever names no command reads the same help as --help gives, line by line, and gets 2."""
    assert main([*group, "--help"]) == 0
    help_text = capsys.readouterr().out
    assert main(group) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", help_text)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fly"], "No such command 'fly'; see: brim --help"),
        (["run", "--temprature", "1", "x"], "No such option"),
        (["run", "-n", "0", "x"], "'-n'"),
        (["run", "--seed", "many", "x"], "'--seed'"),
        (["serve", "--objective", "speed"], "'--objective'"),
        (["config", "set"], "No such command 'set'"),
        (["convert", "model.gguf", "a-checkpoint"], "must end in .gguf, not be 'a-checkpoint'"),
    ],
)
def test_bad_usage_is_one_sentence_and_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    """A wrong command line gives one line on stderr that says what and where to look, and 2."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("brim: ")
    assert words in err
    assert "--help\n" in err
    assert err.count("\n") == 1


def test_config_show_prints_value_and_origin(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every setting stands with its value and its origin, in the table and as JSON."""
    monkeypatch.setenv("BRIM_SERVER_PORT", "99")
    assert main(["config", "show"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(all_fields())
    assert [line.split() for line in lines if line.startswith("server.port")] == [
        ["server.port", "99", "BRIM_SERVER_PORT"]
    ]
    assert main(["config", "show", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {"key": "server.port", "value": 99, "origin": "BRIM_SERVER_PORT"} in rows


def test_wrong_settings_end_a_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A setting that does not exist is one sentence with file and line, and 1."""
    (tmp_path / "brim.toml").write_text("[server]\nprot = 1\n")
    assert main(["config", "show"]) == 1
    err = capsys.readouterr().err
    assert "brim.toml:2: there is no setting 'server.prot'; did you mean 'server.port'?" in err
    assert err.count("\n") == 1


def test_models_lists_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    """The demo model is always there, with its quant."""
    assert main(["models", "--json"]) == 0
    rows = {row["reference"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["demo"]["spec"]["quant"] == "Q8_0"
    assert main(["models"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("demo ")


@pytest.mark.parametrize("name", sorted(all_error_classes()))
def test_exit_codes_of_our_errors(name: str) -> None:
    """What does not fit is 3; every other error that brim raises is 1."""
    error = all_error_classes()[name]("x")
    assert exit_code_of(error) == (3 if isinstance(error, DoesNotFit) else 1)


def test_an_interrupt_is_130() -> None:
    """Ctrl-C ends a command as shells have it."""
    assert exit_code_of(KeyboardInterrupt()) == 130


def test_errors_are_one_line() -> None:
    """Messages of several lines become one, and unexpected errors say how to see more."""
    assert sentence(BrimError("a\n  b")) == "a b"
    assert sentence(PermissionError(13, "Permission denied", "/x")) == (
        "Permission denied: /x; BRIM_DEBUG=1 shows where it happened"
    )
    assert sentence(KeyError("k")) == (
        "unexpected KeyError: 'k'; BRIM_DEBUG=1 shows where it happened"
    )


def test_debugging_shows_where(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A traceback is printed only when BRIM_DEBUG asks for it."""
    report(ConfigError("x"))
    assert capsys.readouterr().err == "brim: x\n"
    monkeypatch.setenv("BRIM_DEBUG", "1")
    report(ConfigError("x"))
    assert "ConfigError: x" in capsys.readouterr().err
