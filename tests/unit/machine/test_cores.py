"""The cores that a process may use."""

import os
import sys
import threading
from pathlib import Path

import pytest

from brim.machine import cores

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux has these calls")


def listing(directory: Path, siblings: dict[int, str]) -> Path:
    for cpu, text in siblings.items():
        topology = directory / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(text + "\n")
    return directory


def test_siblings_are_one_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logical processors of one core come together, without those that may not be used."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 4})
    found = cores.usable_cores(listing(tmp_path, {0: "0,4", 1: "1,5", 4: "0,4", 5: "1,5"}))
    assert found == (frozenset({0, 4}), frozenset({1}))


@pytest.mark.parametrize("text", ["", "0-x"])
def test_what_cannot_be_read_is_no_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """A listing that is damaged or absent gives no cores rather than wrong ones."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert cores.usable_cores(listing(tmp_path, {0: text})) == ()
    assert cores.usable_cores(tmp_path / "nowhere") == ()


def test_this_machine_binds_and_frees_a_thread() -> None:
    """The calling thread is among the process's own, can be bound to one core, and freed."""
    before = os.sched_getaffinity(0)
    assert threading.get_native_id() in cores.own_threads()
    try:
        one = {min(before)}
        assert cores.bind(0, one)
        assert os.sched_getaffinity(0) == one
    finally:
        os.sched_setaffinity(0, before)
    assert not cores.bind(2**22 + 1, before)
