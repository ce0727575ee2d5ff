"""Probes of memory and disk, on small buffers and with clocks that count."""

import itertools
import os
from pathlib import Path

import pytest

from brim.machine.bandwidth import read_bandwidth, thread_counts
from brim.machine.disk import disk_read_rate
from brim.machine.others_load import OthersLoad


def test_threads_are_doubled_up_to_all_cores() -> None:
    """Every machine measures one thread and all of them."""
    assert [thread_counts(n) for n in (1, 2, 6, 8)] == [(1,), (1, 2), (1, 2, 4, 6), (1, 2, 4, 8)]


def test_the_best_pass_counts() -> None:
    """Bytes over the shortest of the passes that fit into the time."""
    # Begin, then for each pass: its start, its end, and whether the time is over.
    ticks = iter([0.0, 0.0, 2.0, 2.0, 2.0, 2.5, 2.5, 2.5, 9.0, 11.0])
    (sample,) = read_bandwidth((1,), limit_s=10, buffer_bytes=2**20, clock=lambda: next(ticks))
    assert sample.bytes_per_s == 2**20 / 0.5


def test_several_threads_share_the_buffer() -> None:
    """Each reads its part in whole pages; what is left over is not counted."""
    clock = itertools.count().__next__
    found = read_bandwidth((1, 3), limit_s=1, buffer_bytes=2**20, clock=clock)
    assert [sample.num_threads for sample in found] == [1, 3]
    assert [sample.bytes_per_s for sample in found] == [2**20, 2**20 // 3 // 4096 * 4096 * 3]


def test_a_real_probe_takes_at_least_one_pass() -> None:
    """Also where no time is given at all."""
    (sample,) = read_bandwidth((1,), limit_s=0.0, buffer_bytes=2**20)
    assert 0 < sample.bytes_per_s < float("inf")


def _ticking(*lengths: float) -> "itertools.chain[float]":
    """A clock that is asked twice for each read, which took so long."""
    times = [0.0]
    for length in lengths:
        times += [times[-1] + length, times[-1] + length]
    return itertools.chain(times)


def test_a_disk_is_as_fast_as_the_first_read(tmp_path: Path) -> None:
    """The second read comes from memory and only shows that the first did not."""
    path = tmp_path / "file"
    path.write_bytes(bytes(10**6))
    ticks = _ticking(1.0, 0.1)
    assert disk_read_rate(path, clock=lambda: next(ticks)) == pytest.approx(1e6)


def test_a_disk_in_memory_has_no_rate(tmp_path: Path) -> None:
    """Two reads of one speed: the page cache could not be emptied."""
    path = tmp_path / "file"
    path.write_bytes(bytes(10**6))
    ticks = _ticking(0.1, 0.1)
    assert disk_read_rate(path, clock=lambda: next(ticks)) is None


def test_the_load_of_others_is_what_is_left_of_all() -> None:
    """A share from 0 to 1, also when a process named as ours has gone."""
    watch = OthersLoad((os.getpid(), 2**22 + 1))
    assert 0 <= watch.busy_fraction() <= 1


def test_own_work_is_not_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seconds of all processors' time, one of them ours, in a second of two processors."""
    import psutil

    from brim.machine import others_load

    busy, own = iter([10.0, 12.0]), iter([3.0, 4.0])

    class Times:
        system = nice = 0.0

        def __init__(self, user: float) -> None:
            self.user = user

    monkeypatch.setattr(psutil, "cpu_times", lambda: Times(next(busy)))
    monkeypatch.setattr(psutil, "cpu_count", lambda: 2)
    monkeypatch.setattr(others_load, "_own_s", lambda _pid: next(own))
    clock = itertools.count().__next__
    assert OthersLoad((1,), clock=clock).busy_fraction() == 0.5
