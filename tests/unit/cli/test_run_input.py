"""What `brim run` reads before it loads anything."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from brim.cli import run
from brim.cli.app import main


class Piped:
    """Standard input that another program holds the other end of."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.near, self.far = socket.socketpair()
        self.stdin = open(self.near.fileno(), encoding="utf-8", closefd=False)
        monkeypatch.setattr("sys.stdin", self.stdin)

    def close(self) -> None:
        for end in (self.stdin, self.near, self.far):
            end.close()


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch) -> Iterator[Piped]:
    piped = Piped(monkeypatch)
    yield piped
    piped.close()


@pytest.mark.parametrize(("prompt", "whole"), [(None, "from afar"), ("Ask:", "Ask:\n\nfrom afar")])
def test_a_socket_is_read_as_a_pipe_is(piped: Piped, prompt: str | None, whole: str) -> None:
    """Text from a program that gives its children sockets is answered, with and without PROMPT."""
    piped.far.sendall(b"from afar")
    piped.far.close()
    assert run._prompt(prompt, raw=False) == whole


def test_a_silent_pipe_is_told_of(piped: Piped, monkeypatch: pytest.MonkeyPatch) -> None:
    """Input that stays open and silent is announced; what comes after that counts."""
    notes = []

    def answer(note: str) -> None:
        notes.append(note)
        piped.far.sendall(b"late")
        piped.far.close()

    monkeypatch.setattr("brim.cli.errors.say", answer)
    monkeypatch.setattr(run, "PIPE_PATIENCE_S", 0.0)
    assert run._prompt("Ask:", raw=False) == "Ask:\n\nlate"
    assert notes == ["reading piped input; press Ctrl-D to end it"]


def test_input_that_comes_at_once_is_not_told_of(
    piped: Piped, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pipe that has something to say is read in silence."""
    piped.far.sendall(b"x")
    piped.far.close()
    assert run._prompt(None, raw=False) == "x"
    assert capsys.readouterr().err == ""


def test_stray_bytes_in_a_prompt_are_replaced(piped: Piped) -> None:
    """Bytes of the command line that are no UTF-8 become the replacement character."""
    piped.far.close()
    prompt = run._prompt(os.fsdecode(b"S\xe3o Paulo"), raw=False)
    assert prompt == "S\N{REPLACEMENT CHARACTER}o Paulo"


def test_an_empty_model_is_not_the_demo(piped: Piped, capsys: pytest.CaptureFixture[str]) -> None:
    """-m with nothing, as from an unset variable, is refused instead of answered by the demo."""
    piped.far.close()
    assert main(["run", "-m", "", "hi"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("brim: no model was named; give the path of a .gguf file")


def test_devices_hold_no_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/null is no input; a redirected file is."""
    with Path(os.devnull).open(encoding="utf-8") as null:
        monkeypatch.setattr("sys.stdin", null)
        assert run._prompt("Ask:", raw=False) == "Ask:"
    (tmp_path / "notes").write_text("noted")
    with (tmp_path / "notes").open(encoding="utf-8") as file:
        monkeypatch.setattr("sys.stdin", file)
        assert run._prompt("Ask:", raw=False) == "Ask:\n\nnoted"
