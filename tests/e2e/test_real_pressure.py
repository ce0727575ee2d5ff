"""A server whose models do not fit, under the kernel's own pressure: nothing here is simulated.

Three models and a browser share a control group that holds two of them.  The long version, two
minutes with a table and a plot, is benches/pressure.py.
"""

import asyncio
import tempfile
from pathlib import Path

import pytest
from conftest import require_engine
from support.cgroup import MIB, unavailable_reason
from support.pressure import NEEDED_BYTES, REAL_LAYERS, SWAP_BYTES, roomy_server, run_pressed
from support.traffic import Errand, errands_of, reference_answers

UNAVAILABLE = unavailable_reason(with_swap=True, needs_bytes=NEEDED_BYTES)

pytestmark = [
    pytest.mark.skipif(bool(UNAVAILABLE), reason=UNAVAILABLE),
    # A machine that is busy, or that has to wait for a disk, loads gigabytes slowly.
    pytest.mark.timeout(600),
]

NUM_CLIENTS = 4
STORM_PER_S = 200.0
"""Major faults: at 0.1 ms each, the group would wait for pages during a fiftieth of the time; the
storm of the same traffic without a governor has thousands."""

COURSE = ((0.0, 0.1), (0.1, 1.6), (0.7, 0.1))
FAST_MIB_PER_S = 300

References = tuple[list[Errand], dict[tuple[str, str], str]]


@pytest.fixture(scope="module")
def references() -> References:
    """Some errands for each model, and what they are answered without pressure."""
    require_engine("llamacpp")
    chosen = [
        errand
        for model in REAL_LAYERS
        for errand in errands_of(model)
        if errand.name in ("chat-5", "chat-9", "long-0", "long-3")
    ]
    with (
        tempfile.TemporaryDirectory() as directory,
        roomy_server(Path(directory)) as server,
    ):
        return asyncio.run(reference_answers(server.url, chosen))


def test_three_models_that_do_not_fit_serve_everyone(
    references: References, tmp_path: Path
) -> None:
    """No process is killed, nothing thrashes, and each accepted request has its one answer."""
    errands, texts = references
    found = run_pressed(
        tmp_path,
        errands,
        is_governed=True,
        seconds=10.0,
        num_clients=NUM_CLIENTS,
        course=COURSE,
        browser_mib_per_s=FAST_MIB_PER_S,
    )
    assert found.num_oom_kills == 0
    assert found.is_browser_alive
    assert found.faults(texts) == []
    assert len(found.accepted) >= NUM_CLIENTS
    assert found.worst_major_faults_per_s < found.idle_major_faults_per_s + STORM_PER_S
    unloaded = [event for event in found.events if event["kind"] in ("model unloaded", "kv shrunk")]
    assert unloaded, "nothing had to give way, so nothing was shown"
    assert "Traceback" not in found.stderr


def test_the_same_without_a_governor_is_killed_or_thrashes(
    references: References, tmp_path: Path
) -> None:
    """Everything is loaded by force: the kernel kills processes, or they wait for pages."""
    errands, _ = references
    found = run_pressed(
        tmp_path,
        errands,
        is_governed=False,
        seconds=8.0,
        num_clients=NUM_CLIENTS,
        swap_bytes=SWAP_BYTES // 4,
        course=COURSE,
        browser_mib_per_s=FAST_MIB_PER_S,
        patience_s=1.0,
        reply_limit_s=4.0,
    )
    assert found.num_oom_kills or found.worst_major_faults_per_s > 10 * STORM_PER_S
    assert found.before.peak_bytes > 0.9 * 4 * 1024 * MIB
