"""A server that is killed under traffic, and the next one at once: nothing is in its way."""

import http.client
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import require_engine
from support.hung_worker import Gateway, has_ended
from support.models import pystd_1m_gguf
from support.server_process import EXACT, ServerProcess

SETTINGS = EXACT | {"cache.free_disk_floor_bytes": 0}

MANIFEST = """
name = "editor"
[budgets]
tokens_per_day = 100000
"""

PROMPT = "def total(items):\n    return sum(item.value for item in items)\n" * 12


class Traffic:
    """Clients that stream until their server has gone."""

    def __init__(self, port: int, num_clients: int = 4) -> None:
        self._began = threading.Semaphore(0)
        self._threads = [
            threading.Thread(target=self._stream, args=(port, number), daemon=True)
            for number in range(num_clients)
        ]
        for thread in self._threads:
            thread.start()
        for _ in self._threads:
            assert self._began.acquire(timeout=60), "a client never got a token"

    def _stream(self, port: int, number: int) -> None:
        body = {
            "model": "m", "prompt": f"# {number}\n", "max_tokens": 1500, "ignore_eos": True,
            "stream": True, "temperature": 0,
        }  # fmt: skip
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            connection.request("POST", "/v1/completions", json.dumps(body))
            response = connection.getresponse()
            response.readline()
            self._began.release()
            while response.readline():
                pass
        except (OSError, http.client.HTTPException):
            pass  # its server was killed
        finally:
            connection.close()

    def end(self) -> None:
        for thread in self._threads:
            thread.join(timeout=60)
            assert not thread.is_alive(), "a client hangs on a server that has gone"


def serve(directory: Path, *arguments: str) -> ServerProcess:
    require_engine("llamacpp")
    model = f"m={pystd_1m_gguf()}"
    return ServerProcess(directory, "-m", model, "--ctx", "2048", *arguments, settings=SETTINGS)


@pytest.fixture
def killed(tmp_path: Path) -> Iterator[tuple[ServerProcess, list[psutil.Process], str]]:
    """A server that kept a prompt, counted tokens of an app, and was killed under traffic."""
    with serve(tmp_path) as server:
        manifest = tmp_path / "editor.toml"
        manifest.write_text(MANIFEST)
        added = server.brim("apps", "add", str(manifest), "--json")
        assert added.returncode == 0, added.stderr
        key = json.loads(added.stdout)["key"]
        server.wait_until(lambda: ask(server, key)[0] == 200)
        server.wait_until(lambda: num_written(server) > 0)
        traffic = Traffic(server.port)
        workers = psutil.Process(server.process.pid).children(recursive=True)
        assert workers
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
        traffic.end()
        yield server, workers, key


def ask(server: ServerProcess, key: str) -> tuple[int, Any]:
    """One answer for the app."""
    body = {"model": "m", "prompt": PROMPT, "max_tokens": 8, "ignore_eos": True, "temperature": 0}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        headers = {"authorization": f"Bearer {key}"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def num_written(server: ServerProcess) -> int:
    """Prompts of the app that are on the disk."""
    stats = server.ps()[0]["worker_stats"]
    return int(stats["prefix"]["store"]["num_written"]) if stats else 0


def used_tokens(server: ServerProcess) -> int:
    """What `brim apps usage` says of the app."""
    done = server.brim("apps", "usage", "editor", "--json")
    assert done.returncode == 0, done.stderr
    return sum(
        day["num_prompt_tokens"] + day["num_completion_tokens"]
        for day in rows(json.loads(done.stdout))
    )


def rows(value: Any) -> list[dict[str, Any]]:
    """Every table row with counts, however deep it lies."""
    if isinstance(value, dict):
        if "num_prompt_tokens" in value:
            return [value]
        return [row for each in value.values() for row in rows(each)]
    return [row for each in value for row in rows(each)] if isinstance(value, list) else []


def test_a_start_ends_what_a_killed_server_left_behind(tmp_path: Path) -> None:
    """A worker that hangs and outlived its gateway is gone before the first model is loaded."""
    tmp_path.chmod(0o700)
    gateway = Gateway(tmp_path / "brim" / "workers")
    gateway.kill()
    assert not has_ended(gateway.worker)
    with ServerProcess(tmp_path, "-m", "toy") as server:
        assert has_ended(gateway.worker)
        server.brim("stop")
        server.end()
    assert (
        f"brim: ended what a server left behind when it was killed: worker {gateway.worker.pid}\n"
        in (server.stderr)
    )


def test_the_next_server_starts_at_once_and_has_everything(
    killed: tuple[ServerProcess, list[psutil.Process], str], tmp_path: Path
) -> None:
    """Same port, same directory: no worker of the first lives, its cache and usage are there."""
    first, workers, key = killed
    with serve(tmp_path, "--port", str(first.port)) as second:
        assert second.port == first.port
        psutil.wait_procs(workers, timeout=60)
        assert not [worker for worker in workers if worker.is_running()]
        status, answer = ask(second, key)
        assert status == 200
        assert answer["brim"]["cache"]["source"] == "disk"
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 100
        second.wait_until(lambda: used_tokens(second) > answer["usage"]["total_tokens"])
        assert len(list((tmp_path / "brim").glob("server-*.json"))) == 1
        notes = [int(path.stem) for path in (tmp_path / "brim" / "workers").glob("*.json")]
        assert notes == [second.ps()[0]["pid"]]
        assert second.brim("stop").returncode == 0
    assert not list((tmp_path / "brim").glob("server-*.json"))
    assert not list((tmp_path / "brim" / "workers").iterdir())
