"""`brim serve`, `ps` and `stop` as real processes: started, listed, drained, gone."""

import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.server_process import ServerProcess
from support.serving import ENDLESS


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path, "-m", "toy") as server:
        yield server


def long_answer(server: ServerProcess, num_tokens: int) -> tuple[threading.Thread, list[Any]]:
    """An answer that is being made while the test goes on."""
    answers: list[Any] = []
    body = {
        "model": "toy", "prompt": "a", "max_tokens": num_tokens, "ignore_eos": True,
        "brim": {"overflow": "shift"},
    }  # fmt: skip
    thread = threading.Thread(
        target=lambda: answers.append(server.ask("POST", "/v1/completions", body))
    )
    thread.start()
    while server.ask("GET", "/brim/ps")[1][0]["num_running"] == 0:
        assert thread.is_alive()
    return thread, answers


def test_ps_lists_and_stop_ends_the_server(server: ServerProcess, tmp_path: Path) -> None:
    """The model is listed with its bytes, stop ends the server, and its file goes."""
    listed = server.brim("ps", "--json")
    assert listed.returncode == 0, listed.stderr
    found = json.loads(listed.stdout)
    assert found["server"]["port"] == server.port
    assert found["models"][0]["state"] == "ready"
    table = server.brim("ps").stdout.splitlines()
    assert table[0].split()[:3] == ["model", "state", "engine"]
    assert table[1].split()[:3] == ["toy", "ready", "toy"]
    assert len(list(tmp_path.glob("brim/server-*.json"))) == 1
    stopped = server.brim("stop", "--port", str(server.port))
    assert stopped.returncode == 0, stopped.stderr
    assert server.end() == 0
    assert list(tmp_path.glob("brim/server-*.json")) == []
    assert server.brim("stop").returncode == 1


def test_a_running_answer_finishes_and_new_ones_are_refused(server: ServerProcess) -> None:
    """After SIGTERM the running answer comes whole, a new request gets 503, the exit code is 0."""
    thread, answers = long_answer(server, 10_000)
    server.process.send_signal(signal.SIGTERM)
    refused = 200
    while thread.is_alive() and refused == 200:
        refused, body = server.ask("POST", "/v1/completions", {"model": "toy", "prompt": "b",
                                                               "max_tokens": 1})  # fmt: skip
    assert refused == 503, body
    thread.join()
    status, body = answers[0]
    assert status == 200
    assert body["usage"]["completion_tokens"] == 10_000
    assert server.end() == 0
    assert "running; stopping when done, in 30 s at the latest" in server.stderr


def test_a_second_signal_ends_at_once(server: ServerProcess) -> None:
    """Whoever asks twice does not wait for the answer, and the answer ends with an error."""
    thread, answers = long_answer(server, ENDLESS)
    server.process.send_signal(signal.SIGINT)
    assert server.process.stderr is not None
    while "stopping when done" not in server.stderr:
        server.stderr += server.process.stderr.readline()
    server.process.send_signal(signal.SIGINT)
    thread.join()
    assert answers[0][0] >= 500
    assert server.end() == 0


def test_a_signal_while_loading_ends_the_server(tmp_path: Path) -> None:
    """SIGTERM before the model is ready ends the server with 0 and leaves no process behind."""
    server = ServerProcess(tmp_path, "-m", "demo")
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0
    assert list(tmp_path.glob("brim/server-*.json")) == []


def test_models_of_one_file_are_served_under_their_own_names(tmp_path: Path) -> None:
    """-m NAME=REF names a model; without it the second of one name is refused before loading."""
    server = ServerProcess(tmp_path, "-m", "toy", "-m", "Other:1=toy")
    try:
        server.wait_ready()
        assert [model["name"] for model in server.ps()] == ["toy", "Other:1"]
        body = {"model": "Other:1", "prompt": "a", "max_tokens": 2}
        assert server.ask("POST", "/v1/completions", body)[0] == 200
        own = ("--port", "0", "--state-dir", str(tmp_path / "second"))
        refused = server.brim("serve", *own, "-m", "toy", "-m", "toy")
    finally:
        server.kill()
    assert refused.returncode == 1
    assert refused.stderr == (
        "brim: two models are named 'toy'; give one another name: -m NAME=toy\n"
    )
