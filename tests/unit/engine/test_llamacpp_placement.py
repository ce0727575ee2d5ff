"""Which core each compute thread runs on."""

import threading
from collections.abc import Collection

import pytest

from brim.engine.llamacpp.placement import MAX_SEARCHES, Placement
from brim.machine import cores

TWO_CORES = (frozenset({0, 4}), frozenset({1, 5}))
EVERYWHERE = frozenset({0, 1, 4, 5})


class System:
    """Threads that there are, and what each is bound to; 0 is the calling one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.threads = {100}
        self.bound: dict[int, Collection[int]] = {}
        monkeypatch.setattr(cores, "usable_cores", lambda: TWO_CORES)
        monkeypatch.setattr(cores, "own_threads", lambda: frozenset(self.threads))
        monkeypatch.setattr(cores, "bind", self.bind)

    def bind(self, thread_id: int, cpus: Collection[int]) -> bool:
        self.bound[thread_id] = cpus
        return thread_id in {0, *self.threads}


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> System:
    return System(monkeypatch)


def test_each_thread_has_a_core_during_a_step(system: System) -> None:
    """The calling thread is bound for the step alone, the one that OpenMP started stays."""
    places = Placement(2)
    places.hold()
    system.threads.add(101)  # the first step starts it
    places.let_go()
    places.hold()
    assert system.bound == {0: TWO_CORES[0], 101: TWO_CORES[1]}
    places.let_go()
    assert system.bound == {0: EVERYWHERE, 101: TWO_CORES[1]}


def test_fewer_threads_run_anywhere(system: System) -> None:
    """What was bound is free again before a step with fewer threads."""
    places = Placement(2)
    system.threads.add(101)
    places.hold()
    places.let_go()
    places.release()
    assert set(system.bound.values()) == {EVERYWHERE}


def test_other_threads_are_left_alone(system: System) -> None:
    """Neither what ran before nor a thread of Python's is taken for a compute thread."""
    places = Placement(2)
    started, done = threading.Event(), threading.Event()

    def wait() -> None:
        started.set()
        done.wait(5)

    thread = threading.Thread(target=wait)
    thread.start()
    started.wait(5)
    assert thread.native_id is not None
    system.threads |= {101, thread.native_id}
    places.hold()
    done.set()
    thread.join()
    assert set(system.bound) == {0, 101}


def test_what_is_not_found_is_given_up(system: System) -> None:
    """Where another number of threads has started, nothing is bound after a few steps, or stays."""
    places = Placement(2)
    system.threads |= {101, 102}
    for _ in range(MAX_SEARCHES):
        places.hold()
        places.let_go()
    assert system.bound == {0: EVERYWHERE}
    system.bound.clear()
    places.hold()
    places.let_go()
    assert system.bound == {}


@pytest.mark.parametrize("num_threads", [1, 3])
def test_only_as_many_threads_as_cores_are_bound(system: System, num_threads: int) -> None:
    """One thread, or more than there are cores, are for the system to place."""
    places = Placement(num_threads)
    system.threads |= {101, 102}
    places.hold()
    places.let_go()
    assert system.bound == {}


def test_a_sandbox_that_forbids_it_is_respected(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After one refusal nothing is bound any more, the calling thread neither."""
    places = Placement(2)
    system.threads.add(101)
    monkeypatch.setattr(
        cores, "bind", lambda thread_id, cpus: system.bind(thread_id, cpus) and not thread_id
    )
    places.hold()
    places.let_go()
    system.bound.pop(101)
    monkeypatch.setattr(cores, "bind", system.bind)
    places.hold()
    places.let_go()
    assert system.bound == {}
