"""Every `brim ...` in the documentation is a command line that brim takes."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from brim.cli.app import app

ROOT = Path(__file__).parents[3]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])

NOT_SHELL = {"python", "json", "toml"}
"""Blocks in other languages; all others, and those without one, are read as shell."""

FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def code_lines(text: str) -> Iterator[str]:
    """Lines of fenced and indented blocks, and what stands between backticks."""
    for language, block in FENCED.findall(text):
        if language not in NOT_SHELL:
            yield from block.splitlines()
    for line in FENCED.sub("", text).splitlines():
        if line.startswith("    "):
            yield line
        else:
            yield from re.findall(r"`([^`]+)`", line)


def commands(text: str) -> Iterator[list[str]]:
    """The words after each `brim` that stands where a shell looks for a command.

    Raises:
        ValueError: A line is no shell, for example for want of a quote.
    """
    for line in code_lines(text):
        if not re.search(r"\bbrim\b", code := re.sub(r"(^|\s)#\s.*", "", line)):
            continue
        lexer = shlex.shlex(code, posix=True, punctuation_chars="|&;")
        lexer.whitespace_split, lexer.commenters = True, ""
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("|&;"):
                if "brim" in words:
                    yield words[words.index("brim") + 1 :]
                words = []
            else:
                words.append(word)


def check(words: list[str]) -> dict[str, Any]:
    """Parse a command line as brim does, up to running it; gives its values.

    A mere mention, as of `brim bench serve`, need not have what the command requires.

    Raises:
        Exception: A command, option or value that does not exist.
    """
    command: Any = typer.main.get_command(app)
    path, rest = "brim", list(words)
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        assert rest[0] in command.commands, f"{path} has no command {rest[0]}"
        command, path = command.commands[rest[0]], f"{path} {rest[0]}"
        del rest[0]
    if not rest:
        return {}
    assert not hasattr(command, "commands"), f"{path} is no command"
    found: dict[str, Any] = command.make_context(path, rest).params
    return found


DOCUMENTED = [
    pytest.param(words, id=f"{page.relative_to(ROOT)}: brim {' '.join(words)}")
    for page in PAGES
    for words in commands(page.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize("words", DOCUMENTED)
def test_documented_command_lines_exist(words: list[str]) -> None:
    """Its command and options exist, its values are taken, and no model stands as the prompt."""
    assert check(words).get("prompt") not in {"demo", "toy"}


def test_advice_names_commands_that_exist() -> None:
    """Each `brim ...` that a message tells the reader to run is a command."""
    sources = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("src/brim/**/*.py"))
    advised = set(re.findall(r'[a-z]: "?brim ([a-z]+)', re.sub(r'"\s+f?"', "", sources)))
    assert {"convert", "serve", "stop", "config"} <= advised
    assert advised <= set(getattr(typer.main.get_command(app), "commands"))  # noqa: B009


def test_the_pages_are_read() -> None:
    """The readme and two other pages have command lines, in blocks and in sentences."""
    found = [str(param.id).partition(":")[0] for param in DOCUMENTED]
    assert {"README.md", "docs/demo-model.md", "docs/benchmarks.md"} <= set(found)
    assert found.count("README.md") >= 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("    cat x | brim run -m demo 'a b'   # told\n", [["run", "-m", "demo", "a b"]]),
        ("```sh\nbrim ps && brim stop; echo brim\n```\n", [["ps"], ["stop"], []]),
        ("```\n$ nice brim serve -e a=http://x#m\n```\n", [["serve", "-e", "a=http://x#m"]]),
        ("Ask `brim ps`, or `brim  stop --port 1`.\n", [["ps"], ["stop", "--port", "1"]]),
        ('brim run; `"brim": {"a": 1}`, `python -m brim.config.document`\n', []),
        ("```python\nbrim = 1\n```\n    make demo  # installs brim and more\n", []),
    ],
)
def test_command_lines_are_found(text: str, expected: list[list[str]]) -> None:
    """Code is searched wherever a shell would find a command, and prose is not."""
    assert list(commands(text)) == expected


@pytest.mark.parametrize(
    "words",
    [
        ["fly"],
        ["run", "--temprature", "1", "x"],
        ["run", "demo", "a prompt"],
        ["config", "set", "x"],
        ["serve", "--port", "many"],
        ["bench", "speed", "--prompt", "512"],
    ],
)
def test_wrong_command_lines_are_noticed(words: list[str]) -> None:
    """What the real command would refuse fails the check."""
    with pytest.raises(Exception, match=r"o such|no command|nexpected|valid|Missing"):
        check(words)
