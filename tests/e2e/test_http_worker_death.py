"""`kill -9` of the worker behind a real server, seen by its HTTP clients."""

import http.client
import json
import os
import signal
import threading
from collections.abc import Iterator

import pytest
from conftest import require_engine
from support.server_process import ServerProcess

NUM_CLIENTS = 8


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    require_engine("llamacpp")
    with ServerProcess(tmp_path_factory.mktemp("server"), "-m", "demo") as server:
        yield server


class StreamingClient(threading.Thread):
    """Reads one streamed completion to its end and keeps every event."""

    def __init__(self, port: int, number: int) -> None:
        super().__init__()
        self.events: list[str] = []
        self.has_text = threading.Event()
        self._port = port
        self._body = json.dumps(
            {
                "model": "demo",
                "prompt": f"def f{number}(x):",
                "max_tokens": 900,
                "ignore_eos": True,
                "stream": True,
            }
        )

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        connection.request("POST", "/v1/completions", self._body)
        for line in connection.getresponse():
            if line.startswith(b"data: "):
                self.events.append(line[6:].decode().strip())
                self.has_text.set()
        connection.close()


def test_every_stream_gets_an_error_event_and_the_next_request_is_served(
    server: ServerProcess,
) -> None:
    """Eight streams end with one error event each, and the model answers again at once."""
    clients = [StreamingClient(server.port, number) for number in range(NUM_CLIENTS)]
    for client in clients:
        client.start()
    for client in clients:
        assert client.has_text.wait(60)
    os.kill(server.ps()[0]["pid"], signal.SIGKILL)
    for client in clients:
        client.join(60)
        assert not client.is_alive()
        last = json.loads(client.events[-1])
        assert "demo" in last["error"]["message"]
        assert "SIGKILL" in last["error"]["message"] or "killed" in last["error"]["message"]
        assert sum("error" in json.loads(event) for event in client.events) == 1
    status, answer = server.ask(
        "POST", "/v1/completions", {"model": "demo", "prompt": "def f(x):", "max_tokens": 4}
    )
    assert status == 200, answer
    assert server.ps()[0]["num_deaths"] == 1
