"""A real server on this very machine, with its governor."""

import json
from pathlib import Path
from typing import Any

from support.server_process import ServerProcess


def test_an_idle_model_leaves_memory_and_comes_back(tmp_path: Path) -> None:
    """After its idle time its process is gone, announced and measured; a request loads it anew."""
    settings = {"governor.idle_unload_s": 3.0}
    with ServerProcess(tmp_path, "-m", "toy", settings=settings) as server:

        def events(kind: str) -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = json.loads(server.brim("events", "--json").stdout)
            return [event for event in found if event["kind"] == kind]

        server.wait_until(lambda: server.ps()[0]["state"] == "unloaded")
        server.wait_until(lambda: bool(events("model unloaded")))
        (unloaded,) = events("model unloaded")
        assert unloaded["cause"] == "it was idle for 3 s"
        assert unloaded["before_bytes"] > unloaded["after_bytes"] == 0
        assert events("model leaving")
        assert server.ps()[0]["pid"] is None
        body = {"model": "toy", "prompt": "a", "max_tokens": 2}
        assert server.ask("POST", "/v1/completions", body)[0] == 200
        server.wait_until(lambda: len(events("model loaded")) == 2)
        server.process.terminate()
        assert server.end() == 0
        assert "model_unloaded model=toy" in server.stderr
