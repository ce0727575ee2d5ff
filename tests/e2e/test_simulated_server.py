"""A real server, worker and model on a simulated machine does what the scenario's log says."""

import json
from pathlib import Path
from typing import Any

import pytest
from golden.golden_scenarios import EXAMPLES, LOGS
from support.server_process import ServerProcess

NAME = "browser-fills-memory"

SPEED = 6
"""Answers, loads and unloads of the demo model must fit between two steps of the scenario, which
leaves four seconds and more for each, also on a machine with other things to do."""

LOADS = ("model loading", "model loaded")
"""What the runtime does when somebody asks: how long it takes is the real machine's business."""


def told(event: dict[str, Any]) -> tuple[str, str, str]:
    """What happened, to which model, and the level that it was about."""
    detail = event.get("detail", {})
    return event["kind"], event.get("model", ""), str(detail.get("memory", ""))


@pytest.mark.timeout(300)  # nearly a minute of it is the scenario's
def test_a_simulated_server_does_what_the_log_says(tmp_path: Path) -> None:
    """The same happens to real processes in the same order, measured, and marked as simulated."""
    lines = (LOGS / f"{NAME}.jsonl").read_text().splitlines()
    expected = [told(event) for event in map(json.loads, lines) if event["kind"] not in LOADS]
    arguments = ("-m", "chat=demo", "--simulate", str(EXAMPLES / f"{NAME}.toml"))
    with ServerProcess(tmp_path, *arguments, "--simulate-speed", str(SPEED)) as server:

        def events() -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = json.loads(server.brim("events", "--json").stdout)
            return found

        server.wait_until(lambda: any(event["kind"] == "kv grown" for event in events()))
        found = events()
        server.process.terminate()
        assert server.end() == 0
    assert all(event["is_simulated"] for event in found)
    begun = next(i for i, event in enumerate(found) if event["kind"] == "stance changed")
    governed = [event for event in found[begun:] if event["kind"] not in LOADS]
    assert [told(event) for event in governed] == expected
    assert [event["kind"] for event in found].count("model loaded") == 2
    for event in found:
        if event["kind"] in ("kv shrunk", "model unloaded"):
            assert event["after_bytes"] < event["before_bytes"]
    assert "simulated: chat is ready" in server.stderr
    assert "simulated: MacBook Air M4:10:16" in server.stderr
    assert all(
        "simulated=True" in line for line in server.stderr.splitlines() if "stance_changed" in line
    )
