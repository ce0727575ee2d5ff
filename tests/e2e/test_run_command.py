"""`brim run` as a real process: what goes where, and how it is stopped."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

RUN = [sys.executable, "-m", "brim", "run"]
ENDLESS = ["-m", "toy", "--raw", "-n", "50000", "--seed", "1", "a"]
"""Twelve seconds of answer, far beyond the window, which OVERFLOWS lets it leave behind."""

OVERFLOWS = {"BRIM_MODELS_OVERFLOW": "shift"}
LIMIT_S = 60.0
LETTERS = tuple(bytes([code]) for code in b"abcdefghijklmnopqrstuvwxyz")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Nothing of the user's own settings."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("BRIM_")}
    names = ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")
    own = {name: str(tmp_path) for name in names}
    return {**kept, **own, "TERM": "dumb"}  # line editing without escape sequences


def run(
    environment: dict[str, str], *arguments: str, stdin: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*RUN, *arguments], input=stdin, capture_output=True, env=environment, timeout=60,
        check=False,
    )  # fmt: skip


def test_only_the_answer_goes_to_stdout(environment: dict[str, str]) -> None:
    """The demo answers without -m, the same for the same seed, and says so on stderr."""
    first, second = (run(environment, "--seed", "1", "-n", "12", "Add two.") for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    assert len(first.stdout) > 3
    assert b"the small demo answers" in first.stderr
    assert b"12 tokens" in first.stderr


def test_piped_text_follows_the_prompt(environment: dict[str, str]) -> None:
    """PROMPT and piped text are one prompt, as if both had been typed."""
    greedy = ("-m", "demo", "--raw", "--temp", "0", "-n", "8")
    both = run(environment, *greedy, "import os", stdin=b"class A:\n    def")
    typed = run(environment, *greedy, "import os\n\nclass A:\n    def")
    piped = run(environment, *greedy, stdin=b"import os\n\nclass A:\n    def")
    assert both.returncode == 0, both.stderr
    assert both.stdout == typed.stdout == piped.stdout != b""


def test_a_prompt_of_an_earlier_run_is_not_read_again(environment: dict[str, str]) -> None:
    """The second run finds it on disk and says the same; with --no-cache nothing is found."""
    environment["BRIM_CACHE_FREE_DISK_FLOOR_BYTES"] = "0"  # the tests' disk may have less left
    environment["BRIM_MODELS_EXACT_PROFILE"] = "true"  # so that equal texts are no luck
    words = " ".join(f"def function_{number}(items):" for number in range(40))
    greedy = ("-m", "demo", "--raw", "--temp", "0", "-n", "8", words)
    first, second = (run(environment, *greedy) for _ in range(2))
    alone = run(environment, *greedy, "--no-cache")
    assert first.returncode == alone.returncode == 0, first.stderr
    assert first.stdout == second.stdout == alone.stdout
    said = [
        re.search(rb"prompt tokens \((\d+) from disk\)", each.stderr) for each in (first, alone)
    ]
    assert said == [None, None]
    found = re.search(rb"(\d+) prompt tokens \((\d+) from disk\)", second.stderr)
    assert found is not None, second.stderr
    assert int(found[2]) >= int(found[1]) - 1 > 128


def test_ctrl_c_stops_the_answer(environment: dict[str, str]) -> None:
    """SIGINT to the whole group, as a terminal sends it, ends the command with 130 and no noise."""
    with subprocess.Popen(
        [*RUN, *ENDLESS], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment | OVERFLOWS, start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert os.read(process.stdout.fileno(), 1)
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130
    assert stderr == b""


def test_a_reader_that_leaves_ends_it_quietly(environment: dict[str, str]) -> None:
    """A broken stdout pipe ends the command without a word."""
    with subprocess.Popen(
        [*RUN, *ENDLESS], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment | OVERFLOWS,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        assert os.read(process.stdout.fileno(), 1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(LIMIT_S) != 0


class Terminal:
    """A person at a terminal."""

    def __init__(self, environment: dict[str, str], *arguments: str) -> None:
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.execve(RUN[0], [*RUN, *arguments], environment)
        self.seen = b""

    def type(self, text: bytes) -> None:
        os.write(self._fd, text)

    def interrupt(self, *texts: bytes) -> bytes:
        """Press Ctrl-C until one of the texts comes, as a person would.

        Python may see a signal that comes just before it waits for a key only with the next key.
        """
        return self.wait_for(*texts, key=b"\x03")

    def wait_for(self, *texts: bytes, key: bytes = b"") -> bytes:
        """Read until one of the texts has come; returns everything up to it.

        Args:
            texts: What ends the wait.
            key: Pressed now and after each second without a text.
        """
        deadline = time.monotonic() + LIMIT_S
        self.type(key)
        while not any(text in self.seen for text in texts):
            assert time.monotonic() < deadline, self.seen
            if select.select([self._fd], [], [], 1.0)[0]:
                self.seen += os.read(self._fd, 4096)
            else:
                self.type(key)
        end = min(at + len(text) for text in texts if (at := self.seen.find(text)) >= 0)
        seen, self.seen = self.seen[:end], self.seen[end:]
        return seen

    def end(self) -> int:
        """Wait for the command; its exit code."""
        _, status = os.waitpid(self.pid, 0)
        os.close(self._fd)
        return os.waitstatus_to_exitcode(status)


def num_prompt_tokens(turn: bytes) -> int:
    """From the line that follows an answer."""
    return int(turn.split(b" prompt tokens")[0].split()[-1])


def test_a_conversation_remembers(environment: dict[str, str]) -> None:
    """At a terminal turns are answered in turn, each prompt longer, until /clear forgets them."""
    terminal = Terminal(environment, "--temp", "0", "-n", "20")
    terminal.wait_for(b"an answer\r\n> ")
    lengths = []
    for line in (b"Return the sum.", b"Return the sum.", b"/clear", b"Return the sum."):
        terminal.type(line + b"\n")
        turn = terminal.wait_for(b"/clear\r\n> ", b" tok/s\r\n> ", b"see -n\r\n> ")
        if b"prompt tokens" in turn:
            lengths.append(num_prompt_tokens(turn))
    first, second, after_clear = lengths
    assert second > first == after_clear
    terminal.type(b"\x04")
    assert terminal.end() == 0


def test_a_conversation_does_not_read_its_earlier_turns_again(environment: dict[str, str]) -> None:
    """The second prompt finds at least the first one in memory, and the line after it says so."""
    terminal = Terminal(environment, "--temp", "0", "-n", "20", "--no-cache")
    terminal.wait_for(b"an answer\r\n> ")
    turns = []
    for line in (b"Return the sum of the items of a list of numbers.\n", b"Once more.\n"):
        terminal.type(line)
        turns.append(terminal.wait_for(b" tok/s\r\n> ", b"see -n\r\n> "))
    found = re.search(rb"(\d+) prompt tokens \((\d+) from memory\)", turns[1])
    assert found is not None, turns
    assert num_prompt_tokens(turns[0]) - 1 <= int(found[2]) < int(found[1])
    terminal.type(b"/exit\n")
    assert terminal.end() == 0


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_stray_byte_does_not_end_a_conversation(environment: dict[str, str], errors: str) -> None:
    """A byte that is no UTF-8 is answered as a replaced character, whatever the locale says."""
    # In this locale line editing passes on what it would drop in others.
    own = {"LC_ALL": "C", "PYTHONIOENCODING": f"utf-8:{errors}"}
    terminal = Terminal({**environment, **own}, "--temp", "0", "-n", "8")
    terminal.wait_for(b"an answer\r\n> ")
    for line in (b"S\xe3o Paulo\n", b"Return the sum.\n"):
        terminal.type(line)
        assert b"prompt tokens" in terminal.wait_for(b"see -n\r\n> ", b" tok/s\r\n> ")
    terminal.type(b"/exit\n")
    assert terminal.end() == 0


def test_a_full_conversation_says_how_to_go_on(environment: dict[str, str]) -> None:
    """Answers shrink to the room that is left; when there is none, /clear helps and is named."""
    terminal = Terminal(environment, "--temp", "9", "--ctx", "256", "-n", "100")
    came = terminal.wait_for(b"an answer\r\n> ")
    num_turns = 0
    while b"/clear starts anew" not in came:
        terminal.type(b"Return the sum of the items of a list.\n")
        came = terminal.wait_for(b" tok/s\r\n> ", b"see -n\r\n> ", b"is full\r\n> ", b"anew\r\n> ")
        assert b"ask for at most" not in came
        assert all(int(number) <= 100 for number in re.findall(rb" s, (\d+) tokens", came))
        num_turns += 1
    assert b"context is 256; shorten it" in came
    assert num_turns > 2
    terminal.type(b"/clear\n")
    terminal.type(b"Return the sum.\n")
    assert b"prompt tokens" in terminal.wait_for(b" tok/s\r\n> ", b"see -n\r\n> ", b"anew\r\n> ")
    terminal.type(b"/exit\n")
    assert terminal.end() == 0


def test_a_failed_answer_is_not_remembered(environment: dict[str, str]) -> None:
    """What a dead worker left of an answer, and its question, are no part of the next prompt."""
    terminal = Terminal(environment, "--temp", "9", "-n", "2000")
    terminal.wait_for(b"an answer\r\n> ")
    terminal.type(b"Return the sum.\n")
    terminal.wait_for(b"Return the sum.\r\n")
    terminal.wait_for(*LETTERS)  # the answer has begun
    for worker in psutil.Process(terminal.pid).children():
        worker.kill()
    assert b"prompt tokens" not in terminal.wait_for(b"the worker of model", b"prompt tokens")
    terminal.wait_for(b"\r\n> ")
    lengths = []
    for line in (b"Return the sum.\n", b"/clear\n", b"Return the sum.\n"):
        terminal.type(line)
        turn = terminal.wait_for(b"/clear\r\n> ", b" tok/s\r\n> ", b"see -n\r\n> ")
        if b"prompt tokens" in turn:
            lengths.append(num_prompt_tokens(turn))
    after_failure, after_clear = lengths
    assert after_failure == after_clear
    terminal.type(b"/exit\n")
    assert terminal.end() == 0


def test_ctrl_c_at_a_terminal_keeps_the_conversation(environment: dict[str, str]) -> None:
    """Ctrl-C stops the answer that is being made, and at the prompt it ends nothing."""
    terminal = Terminal(environment, "--temp", "9", "-n", "4000")
    terminal.wait_for(b"an answer\r\n> ")
    assert b"nothing to stop" in terminal.interrupt(b"an answer\r\n> ")
    came = b""
    while b"stopped" not in came:  # again where the answer was over before the key was pressed
        terminal.type(b"Answer this\n")
        terminal.wait_for(b"Answer this\r\n")
        came = terminal.interrupt(b"stopped\r\n> ", b"an answer\r\n> ")
    terminal.type(b"/exit\n")
    assert terminal.end() == 0
