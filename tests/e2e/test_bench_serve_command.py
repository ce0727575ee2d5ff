"""`brim bench serve` as a real process against real servers that it starts itself."""

import asyncio
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.models import pystd_1m_gguf

from brim.bench.serving.alone import cold
from brim.bench.serving.harness import Comparison, Wanted
from brim.bench.serving.server import ServerCommand
from brim.bench.serving.session import Figure, Session
from brim.bench.serving.workloads import Workload
from brim.machine.reading import machine_at_hand

BRIM = [sys.executable, "-m", "brim"]

SMALL = ["--scale", "0.5", "--rates", "20", "--requests-per-rate", "4", "--seed", "7"]


def environment(directory: Path) -> dict[str, str]:
    """Directories of its own, so that the servers meet nobody's account or prompts."""
    directory.chmod(0o700)
    names = ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR", "XDG_STATE_HOME")
    kept = {k: v for k, v in os.environ.items() if not k.startswith("BRIM_")}
    return {**kept, **dict.fromkeys(names, str(directory))}


def server(name: str, *options: str) -> list[str]:
    command = shlex.join([*BRIM, "serve", "-m", str(pystd_1m_gguf()), *options])
    return ["--server", f"{name}={command} --port {{port}}"]


def test_every_workload_gives_its_figures_against_brim_itself(tmp_path: Path) -> None:
    """All workloads run to their end, with figures above zero, and nothing failed."""
    done = subprocess.run(
        [*BRIM, "bench", "serve", *server("brim"), *SMALL, "--repetitions", "1", "--force",
         "--json", "-w", "recorded", "--limit", "6", "--depths", "512,1024",
         *(word for name in ("single", "cold", "stall", "shared-prefix", "agents", "restart",
                             "throughput", "load", "depth") for word in ("-w", name))],
        env=environment(tmp_path), capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    failures = [row for row in report["rows"] if row["failure"]]
    assert not failures
    found = {(row["workload"], row["figure"]): row["value"]["median"] for row in report["rows"]}
    for key in (
        ("single", "decode_tok_s"), ("cold", "ttft_s"), ("stall", "longest_gap_s"),
        ("stall", "ttft_growth"), ("shared-prefix", "wall_s"), ("agents", "ttft_later_p50_s"),
        ("restart", "restart_over_cold"), ("throughput", "output_tok_s"),
        ("load", "goodput_req_s"), ("depth", "decode_tok_s"), ("recorded", "output_tok_s"),
    ):  # fmt: skip
        assert found[key] > 0, key
    assert ("shared-prefix", "memory_growth_bytes") in found
    assert found["load", "num_failed"] == 0
    assert "left)" in done.stderr


def test_ctrl_c_prints_what_there_is_and_leaves_no_server(tmp_path: Path) -> None:
    """The turns that were complete are in the table, and every process that was started is gone."""
    process = subprocess.Popen(
        [*BRIM, "bench", "serve", *server("brim"), *SMALL, "--repetitions", "500", "--force",
         "-w", "cold"],
        env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if "3/500" in line:
                break
        started = psutil.Process(process.pid).children(recursive=True)
        assert len(started) >= 2
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "prefill_tok_s" in out
    assert "interrupted: figures are of the" in err
    assert not [p for p in started if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_a_server_that_dies_is_started_again_for_the_next_workload(tmp_path: Path) -> None:
    """Its death is the result of the workload that it died of, and of no other."""

    async def dies(session: Session) -> list[Figure]:
        await session.server.kill()
        return await cold(session)

    tmp_path.chmod(0o700)
    names = ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR", "XDG_STATE_HOME")
    own = [f"{name}={tmp_path}" for name in names]
    command = shlex.join(["env", *own, *BRIM, "serve", "-m", "demo"])
    wanted = Wanted(
        sources=(ServerCommand(name="brim", command=f"{command} --port {{port}}"),),
        workloads=(Workload(name="dies", run=dies), Workload(name="cold", run=cold)),
        repetitions=1,
        seed=7,
        must_be_calm=False,
        patience_s=0.0,
    )
    report = asyncio.run(Comparison(wanted, machine_at_hand()).measure())
    (failed,) = [row for row in report.rows if row.failure]
    assert failed.workload == "dies"
    assert "does not run" in str(failed.failure)
    assert report.median("cold", "brim", "prefill_tok_s") is not None


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("false {port}", "'brim' ended at its start: it printed nothing"),
        ("/no/such/program {port}", "cannot start '/no/such/program': No such file"),
        ("env python3 -S -c 'raise SystemExit(\"bad model\")' {port}", "at its start: bad model"),
    ],
)
def test_a_server_that_does_not_start_ends_the_run_with_its_words(
    tmp_path: Path, command: str, complaint: str
) -> None:
    """One sentence, exit code 1, and no wait for a server that has ended."""
    done = subprocess.run(
        [*BRIM, "bench", "serve", "--server", f"brim={command}", "--force"],
        env=environment(tmp_path), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr
