"""Two brim processes on one machine do not grant the same bytes."""

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import require_engine
from support.server_process import ServerProcess

# One process reads both, so that nothing else can move between the two figures but noise.
READ_BOTH = """
import json
from brim.cli.neighbours import machine_beside_servers
from brim.machine.reading import read_machine
alone, beside = read_machine(), machine_beside_servers()
print(json.dumps({
    "alone": alone.others_bytes,
    "beside": beside.others_bytes,
    "new_sources": sorted(beside.sources.keys() - alone.sources.keys()),
    "source": beside.sources["others_bytes"],
}))
"""

NOISE_BYTES = 64 * 1024 * 1024


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    require_engine("llamacpp")
    with ServerProcess(tmp_path_factory.mktemp("server"), "-m", "demo") as server:
        yield server


def others_read_by(server: ServerProcess) -> dict[str, Any]:
    """What a new brim process counts as used by others, without and with its neighbours.

    The median of three: somebody else on the machine may have taken or left memory in between.
    """
    command = [sys.executable, "-c", READ_BOTH]
    found: list[dict[str, Any]] = []
    for _ in range(3):
        done = subprocess.run(command, env=server.environment, capture_output=True, check=True)
        found.append(json.loads(done.stdout))
    return sorted(found, key=lambda each: int(each["beside"] - each["alone"]))[1]


def test_what_a_neighbour_was_granted_counts_as_used(server: ServerProcess) -> None:
    """The reading grows by what the server was granted, less what it holds dirty already."""
    total_bytes = server.ask("GET", "/brim/ledger")[1]["charged_bytes"]
    found = others_read_by(server)
    alone, beside = found["alone"], found["beside"]
    assert alone < beside <= alone + total_bytes + NOISE_BYTES
    assert beside - alone > total_bytes / 4
    assert found["new_sources"] == []
    assert found["source"].endswith("plans of other brim servers")


def test_a_stopped_neighbour_counts_no_more(server: ServerProcess) -> None:
    """After its end the reading is the machine's own."""
    server.brim("stop")
    found = others_read_by(server)
    assert abs(found["beside"] - found["alone"]) < NOISE_BYTES
