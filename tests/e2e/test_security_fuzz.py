"""A short run of the server's fuzzer; `make fuzz-server` runs it for ten minutes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import require_engine

FUZZER = Path(__file__).parents[2] / "benches" / "fuzz_server.py"


@pytest.mark.timeout(200)
def test_twenty_seconds_of_damaged_requests_find_nothing() -> None:
    """No 500, no hang, no growth, no dead worker, and enough was sent and answered to say so."""
    require_engine("llamacpp")
    done = subprocess.run(
        [sys.executable, str(FUZZER), "--seconds", "20", "--seed", "3"],
        capture_output=True,
        text=True,
        timeout=190,
        check=False,
    )
    report = json.loads(done.stdout)
    assert done.returncode == 0, report["findings"]
    assert {"200", "400", "401", "403", "404", "405", "431"} <= set(report["answers"])
    assert report["num_sent"] > 100
