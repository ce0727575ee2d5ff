"""`brim events` beside a real server, after it was killed, and while another one takes over."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.server_process import ServerProcess


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path, "-m", "toy") as server:
        # The load is recorded just after the server is ready.
        server.wait_until(lambda: "model loaded" in [event["kind"] for event in heard(server)])
        yield server


def heard(server: ServerProcess) -> list[dict[str, Any]]:
    return list(server.ask("GET", "/brim/events?follow=false")[1])


def events(server: ServerProcess, *arguments: str) -> list[dict[str, Any]]:
    listed = server.brim("events", "--json", *arguments)
    assert listed.returncode == 0, listed.stderr
    found: list[dict[str, Any]] = json.loads(listed.stdout)
    return found


def remote_ports(process: psutil.Process) -> set[int]:
    """Where a process is connected to."""
    return {each.raddr.port for each in process.net_connections() if each.raddr}


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
    # More may have happened since: the machine is a real one.
    assert events(server, "--port", str(server.port))[: len(before)] == before
    server.kill()
    assert events(server)[: len(before)] == before
    table = server.brim("events", "--kind", "model-loaded").stdout.splitlines()
    assert [line.split()[2:5] for line in table[1:]] == [["model", "loaded", "toy"]]


def test_following_goes_on_over_a_restart(server: ServerProcess, tmp_path: Path) -> None:
    """A reader is told of the end of one server and of the start of the next, each event once.

    It listens to whichever runs.
    """
    words = [sys.executable, "-m", "brim", "events", "--follow", "--json", "--limit", "1"]
    with subprocess.Popen(
        words, env=server.environment, stdout=subprocess.PIPE, text=True
    ) as reader:
        try:
            assert reader.stdout is not None
            last = json.loads(reader.stdout.readline())
            assert last == events(server, "--limit", "1")[0]
            listens = psutil.Process(reader.pid)
            server.wait_until(lambda: server.port in remote_ports(listens))
            assert server.brim("stop").returncode == 0
            assert server.end() == 0
            with ServerProcess(tmp_path, "-m", "toy"):
                seen = [last]
                while seen[-1]["kind"] != "model loaded" or len(seen) < 3:
                    seen.append(json.loads(reader.stdout.readline()))
                kept = events(server)
            first = kept.index(last)
            assert seen == kept[first : first + len(seen)]
            kinds = [event["kind"] for event in seen]
            assert kinds.index("server stopped") < kinds.index("server started")
        finally:
            reader.kill()
