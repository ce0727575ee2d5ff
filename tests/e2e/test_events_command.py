"""`brim events` beside a real server, after it was killed, and while another one takes over."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.server_process import ServerProcess


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path, "-m", "toy") as server:
        yield server


def events(server: ServerProcess, *arguments: str) -> list[dict[str, Any]]:
    listed = server.brim("events", "--json", *arguments)
    assert listed.returncode == 0, listed.stderr
    found: list[dict[str, Any]] = json.loads(listed.stdout)
    return found


def test_events_outlive_a_killed_server(server: ServerProcess) -> None:
    """What was recorded before a kill -9 is listed as it was while the server ran."""
    before = events(server)
    kinds = [event["kind"] for event in before]
    assert kinds[0] == "server started"
    assert "model loaded" in kinds
    loaded = before[kinds.index("model loaded")]
    assert (loaded["model"], loaded["after_bytes"] > 0, loaded["took_s"] > 0) == (
        "toy", True, True,
    )  # fmt: skip
    assert events(server, "--port", str(server.port)) == before
    server.kill()
    assert events(server) == before
    table = server.brim("events", "--kind", "model-loaded").stdout.splitlines()
    assert [line.split()[2:5] for line in table[1:]] == [["model", "loaded", "toy"]]


def test_following_goes_on_over_a_restart(server: ServerProcess, tmp_path: Path) -> None:
    """A reader that follows is told of the end of one server and of the start of the next."""
    words = [sys.executable, "-m", "brim", "events", "--follow", "--json", "--limit", "1"]
    with subprocess.Popen(
        words, env=server.environment, stdout=subprocess.PIPE, text=True
    ) as reader:
        try:
            assert reader.stdout is not None
            last = json.loads(reader.stdout.readline())
            assert last == events(server, "--limit", "1")[0]
            assert server.brim("stop").returncode == 0
            assert server.end() == 0
            with ServerProcess(tmp_path, "-m", "toy"):
                seen = []
                while "server started" not in seen:
                    seen.append(json.loads(reader.stdout.readline())["kind"])
            assert "server stopped" in seen
        finally:
            reader.kill()
