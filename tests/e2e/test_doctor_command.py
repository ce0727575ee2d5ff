"""`brim doctor` on the machine that runs the tests, with and without a server."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.server_process import ServerProcess

from brim.doctor.registry import CHECKS

LATE = ("no answer within", "gives no answer")
NUM_TRIES = 10


def diagnosed(done: "subprocess.CompletedProcess[str]") -> dict[str, dict[str, Any]]:
    """Findings by check, and the exit code that follows from them."""
    findings = {finding["check"]: finding for finding in json.loads(done.stdout)}
    has_problem = any(finding["verdict"] == "problem" for finding in findings.values())
    assert done.returncode == (1 if has_problem else 0)
    assert done.stderr == ""
    return findings


def examined(server: ServerProcess, *checks: str) -> dict[str, dict[str, Any]]:
    """Findings once these checks had their answers.

    Doctor gives a question two seconds, and a busy machine may take longer; what it says is the
    same however often it is asked.
    """
    for _ in range(NUM_TRIES):
        findings = diagnosed(server.brim("doctor", "--json"))
        if not any(words in findings[check]["found"] for check in checks for words in LATE):
            break
    return findings


@pytest.fixture
def server(tmp_path: Path) -> ServerProcess:
    return ServerProcess(tmp_path, "-m", "toy")


def test_every_check_is_answered(server: ServerProcess) -> None:
    """Each has a finding with words and a reason, and what is not well a way out."""
    with server:
        findings = examined(server, "served-models", "permissions", "stale-state", "llamacpp-build")
        assert set(findings) == {check.name for check in CHECKS}
        for finding in findings.values():
            assert finding["found"]
            assert finding["why"]
            assert finding["mend"] or finding["verdict"] in ("ok", "note")
        assert findings["served-models"]["found"] == "served: toy"
        assert findings["permissions"]["verdict"] == "ok", findings["permissions"]
        assert findings["stale-state"]["verdict"] == "ok", findings["stale-state"]
        # With or without a GPU, or without what this processor has: as it was built.
        assert findings["llamacpp-build"]["found"].startswith("llama-cpp-python 0.")


def test_the_page_for_people_has_what_is_wrong_first(server: ServerProcess) -> None:
    """A secret that others can read is a problem with the command that mends it, at the top."""
    with server:
        state = server.environment["HOME"]
    file = Path(state) / "brim" / "forecasts.sqlite"
    file.parent.chmod(0o755)
    file.touch()
    file.chmod(0o644)
    for _ in range(NUM_TRIES):
        done = server.brim("doctor")
        if not any(words in done.stdout for words in LATE):
            break
    lines = done.stdout.splitlines()
    assert done.returncode == 1
    assert lines[0].startswith("problem  ")
    # Without any space: a long path is broken over lines.
    assert f"{file}canbereadbyothers" in "".join(done.stdout.split())
    assert f"    mend: chmod go-rwx '{file}'" in lines
    verdicts = [line.split()[0] for line in lines if not line.startswith(" ")][:-1]
    order = ["problem", "warning", "note", "ok"]
    assert [order.index(verdict) for verdict in verdicts] == sorted(
        order.index(verdict) for verdict in verdicts
    )
    assert lines[-1].endswith(" well")


def test_what_is_well_has_its_reason_where_all_is_wanted(server: ServerProcess) -> None:
    """`--all` shows each check in full; without it, what is well takes one line."""
    with server:
        short, full = (server.brim("doctor", *words).stdout for words in ((), ("--all",)))
    assert full.count("why: ") == len(CHECKS)
    assert short.count("why: ") < len(CHECKS)


def test_a_killed_server_and_its_file_are_noted(server: ServerProcess) -> None:
    """Until the next start, which cleans up."""
    with server:
        pass  # killed at the end of the block
    findings = examined(server, "served-models", "stale-state")
    stale = findings["stale-state"]
    assert stale["verdict"] == "note"
    assert f"server-{server.process.pid}.json" in stale["found"]
    assert findings["served-models"]["found"] == "no server runs"


def test_no_backend_is_loaded() -> None:
    """Engines are asked in processes of their own: doctor's own has neither."""
    program = (
        "import sys\nfrom brim.cli.app import main\nmain(['doctor', '--json'])\n"
        "sys.exit(any(m.split('.')[0] in ('mlx', 'llama_cpp') for m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == 0
