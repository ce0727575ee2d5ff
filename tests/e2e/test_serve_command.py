"""`brim serve`, `ps` and `stop` as real processes: started, listed, drained, gone."""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

START_LIMIT_S = 30.0


class Server:
    """A `brim serve` process with its own directories."""

    def __init__(self, tmp_path: Path, *arguments: str) -> None:
        tmp_path.chmod(0o700)  # as a runtime directory must be
        own = {name: str(tmp_path) for name in ("HOME", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR")}
        kept = {k: v for k, v in os.environ.items() if not k.startswith("BRIM_")}
        self._environment = {**kept, **own}
        self.stderr = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "brim", "serve", "--port", "0", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self._environment,
            text=True,
        )
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.stderr += line
            if "listening on" in line:
                self.port = int(line.rpartition(":")[2])
                return
        raise AssertionError(self.stderr)

    def brim(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Another command that finds this server."""
        return subprocess.run(
            [sys.executable, "-m", "brim", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=self._environment,
            text=True,
            timeout=60,
            check=False,
        )

    def ask(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """Status and JSON of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_LIMIT_S
        while self.ask("GET", "/health")[0] != 200:
            assert time.monotonic() < deadline, "not ready"
            assert self.process.poll() is None
            time.sleep(0.02)

    def end(self) -> int:
        """Wait for its end; the exit code."""
        _, rest = self.process.communicate(timeout=60)
        self.stderr += rest
        assert "Traceback" not in self.stderr
        return self.process.returncode


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path, "-m", "toy")
    try:
        server.wait_ready()
        yield server
    finally:
        server.process.kill()
        server.process.communicate()


def long_answer(server: Server, num_tokens: int) -> tuple[threading.Thread, list[Any]]:
    """An answer that is being made while the test goes on."""
    answers: list[Any] = []
    body = {"model": "toy", "prompt": "a", "max_tokens": num_tokens, "ignore_eos": True}
    thread = threading.Thread(
        target=lambda: answers.append(server.ask("POST", "/v1/completions", body))
    )
    thread.start()
    while server.ask("GET", "/brim/ps")[1][0]["num_running"] == 0:
        assert thread.is_alive()
    return thread, answers


def test_ps_lists_and_stop_ends_the_server(server: Server, tmp_path: Path) -> None:
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


def test_a_running_answer_finishes_and_new_ones_are_refused(server: Server) -> None:
    """After SIGTERM the running answer comes whole, a new request gets 503, the exit code is 0."""
    thread, answers = long_answer(server, 4000)
    server.process.send_signal(signal.SIGTERM)
    refused = 200
    while thread.is_alive() and refused == 200:
        refused, body = server.ask("POST", "/v1/completions", {"model": "toy", "prompt": "b",
                                                               "max_tokens": 1})  # fmt: skip
    assert refused == 503, body
    thread.join()
    status, body = answers[0]
    assert status == 200
    assert body["usage"]["completion_tokens"] == 4000
    assert server.end() == 0
    assert "running; stopping when done, in 30 s at the latest" in server.stderr


def test_a_second_signal_ends_at_once(server: Server) -> None:
    """Whoever asks twice does not wait for the answer, and the answer ends with an error."""
    thread, answers = long_answer(server, 8000)
    server.process.send_signal(signal.SIGINT)
    assert server.process.stderr is not None
    server.stderr += server.process.stderr.readline()
    server.stderr += server.process.stderr.readline()
    server.process.send_signal(signal.SIGINT)
    thread.join()
    assert answers[0][0] >= 500
    assert server.end() == 0


def test_a_signal_while_loading_ends_the_server(tmp_path: Path) -> None:
    """SIGTERM before the model is ready ends the server with 0 and leaves no process behind."""
    server = Server(tmp_path, "-m", "demo")
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0
    assert list(tmp_path.glob("brim/server-*.json")) == []
