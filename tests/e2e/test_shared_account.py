"""Several brim processes and one machine: nobody is granted what another one has."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.server_process import ServerProcess

from brim.ledger.book import Book

# A machine of 16 GB of which nobody uses anything: half of it fits once.
GRANT_HALF = """
import sys
from pathlib import Path
from brim.core.machine import MachineSpec
from brim.core.memory import MemoryTerms
from brim.ledger.account import Account
from brim.ledger.book import Book, beside
machine = MachineSpec(name="m", system="linux", ram_bytes=16 * 10**9, others_bytes=0)
terms = MemoryTerms(weights_bytes=8 * 10**9, kv_bytes=0, compute_bytes=0, overhead_bytes=0)
account = Account()
print("ready", flush=True)
sys.stdin.readline()
with Book(Path(sys.argv[1])).open() as page:
    granted = account.ask(terms, beside(machine, page.others())).verdict != "no"
    if granted:
        page.write([("model", 8 * 10**9)])
print("granted" if granted else "refused", flush=True)
sys.stdin.readline()
"""


def test_of_processes_that_start_in_the_same_moment_one_is_granted(tmp_path: Path) -> None:
    """Six ask at once for half of the machine; one gets it, and after its end another does."""
    path = tmp_path / "grants.json"

    def started() -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-c", GRANT_HALF, str(path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def go(process: "subprocess.Popen[str]") -> None:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()

    def said(process: "subprocess.Popen[str]") -> str:
        assert process.stdout is not None
        return process.stdout.readline().strip()

    processes = [started() for _ in range(6)]
    try:
        assert [said(process) for process in processes] == ["ready"] * 6
        for process in processes:
            go(process)
        answers = [said(process) for process in processes]
        assert sorted(answers) == ["granted", *["refused"] * 5]
        processes[answers.index("granted")].kill()
        processes[answers.index("granted")].wait()
        processes.append(started())
        assert said(processes[-1]) == "ready"
        go(processes[-1])
        assert said(processes[-1]) == "granted"
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.fixture
def crowded(tmp_path: Path) -> Iterator[Book]:
    """This process holds all of the machine, as far as servers in this directory can see."""
    tmp_path.chmod(0o700)
    book = Book(tmp_path / "brim" / "grants.json")
    with book.open() as page:
        page.write([("everything", 10**15)])
    yield book
    book.erase()


@pytest.mark.usefixtures("crowded")
def test_a_server_does_not_start_into_memory_that_is_taken(tmp_path: Path) -> None:
    """It ends with 3 and one sentence that names the bytes, the binding term and the ways."""
    server = ServerProcess(tmp_path, "-m", "toy")
    assert server.end() == 3
    said = server.stderr.splitlines()[-1]
    assert said.startswith("brim: toy needs ")
    assert "by ram minus others and reserve): " in said
    assert said.endswith("or load it anyway with --force")


@pytest.mark.usefixtures("crowded")
def test_force_starts_it_all_the_same(tmp_path: Path) -> None:
    """What was forced in is served, requests included, and the account says how it stands."""
    with ServerProcess(tmp_path, "-m", "toy", "--force") as server:
        body = {"model": "toy", "prompt": "a", "max_tokens": 2}
        assert server.ask("POST", "/v1/completions", body)[0] == 200
        status, account = server.ask("GET", "/brim/ledger")
        assert (status, account["entries"][0]["is_forced"]) == (200, True)
        assert account["charged_bytes"] > account["tight_bytes"]


def test_a_server_waits_for_memory_and_serves_when_it_is_free(
    tmp_path: Path, crowded: Book
) -> None:
    """`--wait` says what is missing, /health says loading, and the model comes up by itself."""
    server = ServerProcess(tmp_path, "-m", "toy", "--wait", "60")
    try:
        assert server.process.stderr is not None
        said = server.process.stderr.readline()
        assert said.startswith("brim: waiting for memory, 60 s at most: toy needs ")
        assert server.ask("GET", "/health")[1]["status"] == "loading"
        crowded.erase()
        server.wait_ready()
        body = {"model": "toy", "prompt": "a", "max_tokens": 2}
        assert server.ask("POST", "/v1/completions", body)[0] == 200
    finally:
        server.kill()


def test_a_wait_ends_with_the_refusal(tmp_path: Path, crowded: Book) -> None:
    """Whoever holds the memory does not go: exit code 3 when the seconds are over."""
    began = time.monotonic()
    server = ServerProcess(tmp_path, "-m", "toy", "--wait", "0.5")
    assert server.end() == 3
    assert time.monotonic() - began >= 0.5
    with crowded.open() as page:
        assert page.others() == []


def test_a_killed_server_leaves_no_bytes_behind(tmp_path: Path) -> None:
    """Its lines are dropped with it; the next one starts and writes its own."""
    for _ in range(2):
        with ServerProcess(tmp_path, "-m", "toy") as server:
            before = server.ps()[0]["entry"]["charged_bytes"]
            with Book(tmp_path / "brim" / "grants.json").open() as page:
                lines = page.others()
            assert {line.pid for line in lines} == {server.process.pid}
            (line,) = (line for line in lines if line.name == "toy")
            # The worker may have been measured again meanwhile, and is charged what it holds.
            charged_bytes = [before, server.ps()[0]["entry"]["charged_bytes"]]
            assert 0 < line.num_bytes <= max(charged_bytes)


def test_forced_requests_are_the_operators_to_allow(tmp_path: Path) -> None:
    """403 unless the settings allow it; an unknown word beside it is refused by name."""
    forced = {"model": "toy", "prompt": "a", "max_tokens": 2, "brim": {"force": True}}
    with ServerProcess(tmp_path, "-m", "toy") as server:
        status, answer = server.ask("POST", "/v1/completions", forced)
        assert (status, answer["error"]["param"]) == (403, "brim.force")
        assert "models.allow_force" in answer["error"]["message"]
        status, answer = server.ask("POST", "/v1/completions", {**forced, "brim": {"forced": True}})
        assert (status, answer["error"]["param"]) == (400, "brim.forced")
        assert "did you mean `force`?" in answer["error"]["message"]
    config = tmp_path / "brim" / "brim.toml"
    config.write_text("[models]\nallow_force = true\n")
    with ServerProcess(tmp_path, "-m", "toy") as server:
        assert server.ask("POST", "/v1/completions", forced)[0] == 200


def test_ps_shows_the_account_and_the_forecasts_error(tmp_path: Path) -> None:
    """The table has the load's error, below it stand engine and budget; JSON has all of it."""
    with ServerProcess(tmp_path, "-m", "demo") as server:
        table = server.brim("ps").stdout.splitlines()
        assert "error" in table[0].split()
        assert " % " in table[1]
        assert table[2].startswith("demo runs on llamacpp: the model is in GGUF form")
        assert table[3].startswith("memory: ")
        assert " comfortable (" in table[3]
        [model] = server.ps()
        terms = {each["term"] for each in model["forecast_errors"]}
        assert terms >= {"weights_bytes", "kv_bytes", "compute_bytes"}
        # Between two answers the worker may have been measured again.
        server.wait_until(
            lambda: server.ask("GET", "/brim/ledger")[1]["entries"] == [server.ps()[0]["entry"]]
        )
        account = server.ask("GET", "/brim/ledger")[1]
        assert account["kv_committed_bytes"] == model["plan"]["memory"]["kv_bytes"]
    assert len(list(tmp_path.rglob("forecasts.sqlite"))) == 1
