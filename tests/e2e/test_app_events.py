"""The event streams of a real server: what apps and the operator hear of, and when they end."""

import http.client
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.server_process import ServerProcess

from brim.apps.registry import FILE_NAME, Registry
from brim.core.app import App, Budgets

LISTEN_S = 30.0


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    registry = Registry(tmp_path / FILE_NAME)
    apps = (
        App(name="mail", models=("small",), budgets=Budgets(tokens=40)),
        App(name="chat", models=("other",)),
    )
    keys = {app.name: registry.add(app, "") for app in apps}
    registry.close()
    return keys


@pytest.fixture
def server(tmp_path: Path, keys: dict[str, str]) -> Iterator[ServerProcess]:
    settings = {"server.state_directory": tmp_path, "worker.restart_backoff_s": 0.01}
    with ServerProcess(
        tmp_path, "-m", "small=toy", "-m", "other=toy", "--ctx", "256", settings=settings
    ) as server:
        yield server


class Stream:
    """An open event stream."""

    def __init__(self, server: ServerProcess, path: str, key: str = "") -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=LISTEN_S)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._connection.request("GET", path, headers=headers)
        self._response = self._connection.getresponse()
        assert self._response.status == 200
        self.heard: list[dict[str, Any]] = []

    def until(self, kind: str) -> dict[str, Any]:
        """Read up to the next event of a kind."""
        for event in self._events():
            self.heard.append(event)
            if event["kind"] == kind:
                return event
        raise AssertionError(f"the stream ended without '{kind}': {self.heard}")

    def rest(self) -> None:
        """Read to the end of the stream."""
        self.heard += self._events()
        self.close()

    def close(self) -> None:
        """Leave."""
        self._response.close()
        self._connection.close()

    def _events(self) -> Iterator[dict[str, Any]]:
        for line in self._response:
            if line.startswith(b"data: "):
                yield json.loads(line[6:])


def use(server: ServerProcess, key: str, model: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    body = {"model": model, "prompt": "abcd", "max_tokens": 30, "ignore_eos": True}
    headers = {"Authorization": f"Bearer {key}"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    assert connection.getresponse().status == 200
    connection.close()


def test_each_hears_of_its_own_and_the_operator_of_everything(
    server: ServerProcess, keys: dict[str, str]
) -> None:
    """A budget that gets tight and a worker that dies reach whom they concern, and the log."""
    mail = Stream(server, "/brim/v1/events", keys["mail"])
    chat = Stream(server, "/brim/v1/events", keys["chat"])
    operator = Stream(server, "/brim/events")
    assert mail.until("power full") == mail.heard[1]
    assert mail.heard[0]["kind"] in ("memory free", "memory short")
    use(server, keys["mail"], "small")
    tight = mail.until("budget tightening")
    assert tight["detail"]["limit"] == 40
    status = {each["name"]: each for each in server.ps()}
    kill(status["other"]["pid"])
    assert chat.until("model failed")["model"] == "other"
    assert operator.until("worker died")["model"] == "other"
    told = {(event["kind"], event.get("app", "")) for event in operator.heard}
    assert ("budget tightening", "mail") in told
    server.process.terminate()
    began_s = time.monotonic()
    for stream in (mail, chat, operator):
        stream.rest()
    assert server.end() == 0
    assert time.monotonic() - began_s < LISTEN_S
    assert all(event.get("model", "small") == "small" for event in mail.heard)
    assert all(event.get("model", "other") == "other" for event in chat.heard)
    assert not [event for event in chat.heard if event["kind"].startswith("budget")]
    assert "Cancel" not in server.stderr


def kill(pid: int) -> None:
    psutil.Process(pid).kill()


def test_history_is_there_for_whoever_asks_late(server: ServerProcess) -> None:
    """The list of what is kept has the loads of the start, and `since` leaves them out."""

    def events() -> list[dict[str, Any]]:
        status, found = server.ask("GET", "/brim/events?follow=false")
        assert status == 200
        return list(found)

    def loaded() -> set[str]:
        return {each["model"] for each in events() if each["kind"] == "model loaded"}

    # The last load is recorded just after the server is ready.
    server.wait_until(lambda: loaded() == {"small", "other"})
    newest = max(each["at_unix_s"] for each in events())
    status, later = server.ask("GET", f"/brim/events?follow=false&since={newest}")
    assert status == 200
    assert all(each["at_unix_s"] > newest for each in later)


SCENARIO = """
machine = "M4 Pro:20:24"
end_s = 600

[[step]]
at_s = 0
others_bytes = 6_000_000_000
pressure = "normal"
thermal = "nominal"
is_low_power = false

[[step]]
at_s = 20
pressure = "critical"
is_low_power = true

[[step]]
at_s = 60
pressure = "normal"
is_low_power = false
"""


def test_a_machine_that_gets_tight_says_so_to_apps_and_refuses_with_the_reason(
    tmp_path: Path, keys: dict[str, str]
) -> None:
    """Critical memory and low power reach the stream; new requests are 503 until both are over."""
    scenario = tmp_path / "tight.toml"
    scenario.write_text(SCENARIO)
    settings = {"server.state_directory": tmp_path}
    arguments = ("-m", "small=toy", "--simulate", str(scenario), "--simulate-speed", "10")
    with ServerProcess(tmp_path, *arguments, settings=settings) as server:
        stream = Stream(server, "/brim/v1/events", keys["mail"])
        short = stream.until("memory short")
        assert (short["level"], short["admits"]) == ("critical", False)
        assert short["reason"]
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        body = {"model": "small", "prompt": "abcd", "max_tokens": 2}
        connection.request("POST", "/v1/completions", json.dumps(body))
        response = connection.getresponse()
        answer = json.loads(response.read())
        assert response.status == 503
        assert float(response.headers["Retry-After"]) >= 1
        assert "memory" in answer["error"]["message"]
        kinds = {each["kind"] for each in stream.heard}
        if "power saving" not in kinds:
            assert stream.until("power saving")["level"] == "saving"
        stream.until("memory free")
        connection.request("POST", "/v1/completions", json.dumps(body))
        assert connection.getresponse().status == 200
        connection.close()
        stream.close()
