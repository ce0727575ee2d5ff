"""A request fuzzer against the published OpenAPI description of a real server finds no 500."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.server_process import ServerProcess


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path, "-m", "toy", "--ctx", "256") as server:
        yield server


@pytest.mark.timeout(400)
def test_schemathesis_finds_no_server_error(server: ServerProcess, tmp_path: Path) -> None:
    """Valid and broken requests of every route get answers that the description allows."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "schemathesis.cli",
            "run",
            f"{server.url}/openapi.json",
            "--checks=not_a_server_error,status_code_conformance,content_type_conformance,"
            "response_schema_conformance",
            # Event streams have no end, which takes a reader that knows it: benches/fuzz_server.py.
            "--exclude-path-regex=/events$",
            "--max-examples=40",
            "--seed=1",
            "--generation-database=none",
            # A busy machine takes longer to make up requests.
            "--suppress-health-check=too_slow",
            "--request-timeout=60",
            "--no-color",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=380,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert server.ask("GET", "/health") == (200, {"status": "ok"})
    assert server.ps()[0]["num_deaths"] == 0
    server.wait_until(lambda: server.ps()[0]["num_running"] == 0)
