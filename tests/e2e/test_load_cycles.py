"""Models that come and go many times: the gateway is as it was before the first of them."""

import sys
import tempfile
from pathlib import Path

import pytest
from support.crowd import GB, one_of_a_crowd, weighing
from support.leftovers import holdings
from support.serving import serving, toy_plan

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(sys.platform != "linux", reason="what a process holds is read from /proc"),
    # Twenty-six processes are started; alone on a machine it takes 25 s.
    pytest.mark.timeout(400),
]

NUM_CYCLES = 24


async def test_two_dozen_loads_and_unloads_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No process, descriptor, thread or file is left over, and each model answers as at first."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    num_others = holdings().children
    plans = [weighing(toy_plan(), name, 7 * GB) for name in ("one", "other")]
    async with serving(*plans) as gateway:
        # Of two that do not fit together each request for the other one is a load and an unload.
        texts = {name: (await one_of_a_crowd(gateway, name, "a")).text for name in ("one", "other")}
        before = holdings(directories=(tmp_path,))
        for _ in range(NUM_CYCLES // 2):
            for name, text in texts.items():
                served = await one_of_a_crowd(gateway, name, "a")
                assert (served.error, served.text) == ("", text)
        after = holdings(directories=(tmp_path,))
        assert gateway.models()[0].pid is None
        assert gateway.models()[1].pid is not None
    assert after.things == before.things
    assert holdings().children == num_others
