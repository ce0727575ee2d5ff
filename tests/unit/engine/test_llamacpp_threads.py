"""How many threads a step of one row takes, by step times as they were measured."""

import itertools
from collections.abc import Callable, Iterator

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.serving import toy_plan

from brim.engine.llamacpp.threads import (
    FEW_STEPS,
    MAX_WAIT_STEPS,
    TRIAL_STEPS,
    WINDOW_STEPS,
    Step,
    StepThreads,
    ThreadPolicy,
    ladder,
)

TWO = msgspec.structs.replace(toy_plan(), num_threads=2, num_batch_threads=2)

Machine = Callable[[int], Step]
"""What a step with that many threads takes."""

IDLE = {
    1: [(31.5, 31.5), (31.2, 31.2), (33.9, 33.4), (31.4, 31.3)],
    2: [(21.9, 21.8), (22.4, 22.3), (21.8, 21.8), (25.6, 23.1), (22.0, 21.9)],
}
ONE_BUSY = {
    1: [(32.1, 32.0), (32.6, 32.5), (35.9, 33.1), (31.9, 31.8)],
    2: [(62.0, 28.1), (41.2, 27.0), (71.5, 30.2), (57.4, 28.3), (64.8, 29.0)],
}
"""The busy process has one core; whichever thread is beside it, the other waits."""
TWO_BUSY = {
    1: [(31.6, 31.4), (61.2, 33.0), (59.8, 32.1), (31.9, 31.8), (62.4, 32.2), (33.0, 31.5)],
    2: [(36.1, 18.2), (36.4, 18.0), (35.8, 18.1), (37.3, 18.4)],
}
"""Both threads share one core and take turns on it, while one thread alone shares its core."""


def machine_of(*phases: tuple[int, dict[int, list[tuple[float, float]]]]) -> Machine:
    """Replays recorded (wall, CPU) milliseconds: so many steps of each phase, the last for ever."""
    numbers = itertools.count()
    turns: dict[tuple[int, int], Iterator[tuple[float, float]]] = {}

    def step(num_threads: int) -> Step:
        number, index = next(numbers), 0
        for length, _ in phases[:-1]:
            if number < length:
                break
            number, index = number - length, index + 1
        key = (index, num_threads)
        if key not in turns:
            turns[key] = itertools.cycle(phases[index][1][num_threads])
        wall_ms, cpu_ms = next(turns[key])
        return Step(wall_ms / 1e3, cpu_ms / 1e3)

    return step


def drive(policy: ThreadPolicy, machine: Machine, num_steps: int) -> list[tuple[int, float]]:
    """(threads, seconds) of that many steps."""
    found = []
    for _ in range(num_steps):
        num_threads = policy.num_threads
        step = machine(num_threads)
        policy.record(step)
        found.append((num_threads, step.wall_s))
    return found


def test_an_idle_machine_is_left_alone() -> None:
    """Where no time is lost, every step takes all threads: nothing is tried."""
    taken = drive(ThreadPolicy(2), machine_of((0, IDLE)), 1000)
    assert {num_threads for num_threads, _ in taken} == {2}


def test_beside_a_busy_process_one_thread_computes() -> None:
    """After one window and one trial, hardly anything is lost against one thread from the start."""
    taken = drive(ThreadPolicy(2), machine_of((0, ONE_BUSY)), 1000)
    assert [n for n, _ in taken[:WINDOW_STEPS]] == [2] * WINDOW_STEPS
    alone_s = sum(wall for wall, _ in ONE_BUSY[1]) / len(ONE_BUSY[1]) / 1e3
    settled_s = [seconds for _, seconds in taken[WINDOW_STEPS:]]
    assert sum(settled_s) / len(settled_s) < 1.05 * alone_s


def test_all_threads_come_back() -> None:
    """When the busy process ends, all threads compute again within the longest wait."""
    taken = drive(ThreadPolicy(2), machine_of((600, ONE_BUSY), (0, IDLE)), 1200)
    assert taken[599][0] == 1
    back = 600 + MAX_WAIT_STEPS + WINDOW_STEPS + TRIAL_STEPS
    assert {num_threads for num_threads, _ in taken[back:]} == {2}


def test_the_shorter_time_decides_not_the_contention() -> None:
    """Two threads that wait beside busy processes stay where one would take longer."""
    taken = drive(ThreadPolicy(2), machine_of((0, TWO_BUSY)), 1000)
    assert sum(num_threads == 2 for num_threads, _ in taken) > 900


def test_a_hopeless_trial_ends_early() -> None:
    """Trying a number that takes far longer costs one step, and ever more seldom."""
    collapsed = {1: ONE_BUSY[1], 2: [(400.0, 390.0)]}
    policy = ThreadPolicy(2)
    drive(policy, machine_of((0, ONE_BUSY)), 200)
    taken = drive(policy, machine_of((0, collapsed)), 1000)
    assert sum(num_threads == 2 for num_threads, _ in taken) <= 1000 // MAX_WAIT_STEPS + 1


def test_a_changed_machine_is_looked_at_again_at_once() -> None:
    """After many trials in vain, contention of another kind is answered within two windows."""
    policy = ThreadPolicy(2)
    drive(policy, machine_of((0, TWO_BUSY)), 500)
    taken = drive(policy, machine_of((0, ONE_BUSY)), 2 * WINDOW_STEPS)
    assert taken[-1][0] == 1


@pytest.mark.parametrize("best", [8, 7, 4, 1])
def test_more_cores_have_more_to_choose_from(best: int) -> None:
    """Of eight cores as many are taken as take least time, whichever that is."""
    times = {
        n: [(20.0 + 10 * abs(i - ladder(8).index(best)), 12.0)] for i, n in enumerate(ladder(8))
    }
    taken = drive(ThreadPolicy(8), machine_of((0, times)), 2000)
    assert sum(num_threads == best for num_threads, _ in taken[500:]) > 1300


@given(st.lists(st.tuples(st.floats(1e-6, 10), st.floats(0, 1)), max_size=60), st.integers(1, 12))
def test_whatever_is_measured_a_known_number_comes_out(
    steps: list[tuple[float, float]], most: int
) -> None:
    """The number of threads is always one of those worth trying."""
    policy = ThreadPolicy(most)
    for wall_s, share in steps:
        policy.record(Step(wall_s, wall_s * share))
        assert policy.num_threads in ladder(most)


class Library:
    """Notes what llama.cpp would be told."""

    def __init__(self, *, has_gpu: bool = False) -> None:
        self.has_gpu = has_gpu
        self.threads: list[tuple[int, int]] = []
        self.status = 0

    def llama_supports_gpu_offload(self) -> bool:
        return self.has_gpu

    def llama_set_n_threads(self, _context: object, one_row: int, more_rows: int) -> None:
        self.threads.append((one_row, more_rows))

    def llama_decode(self, _context: object, _batch: object) -> int:
        return self.status


class Notes:
    """Notes where threads are put, and what is computed meanwhile."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def hold(self) -> None:
        self.calls.append("hold")

    def let_go(self) -> None:
        self.calls.append("let go")

    def release(self) -> None:
        self.calls.append("release")


class Rows:
    """A batch of that many rows."""

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = n_tokens


def test_only_steps_of_one_row_are_changed() -> None:
    """A prompt, and several sequences together, keep the threads that they have."""
    library = Library()
    threads = StepThreads(library, TWO, Notes())
    for num_rows in (512, 1, 8, 1):
        assert threads.decode(None, Rows(num_rows)) == 0
    assert library.threads == [(2, 2), (2, 2)]


def test_a_gpu_is_not_waited_for_with_fewer_threads() -> None:
    """Where a GPU computes, the calling thread is off its core and that means nothing."""
    library = Library(has_gpu=True)
    threads = StepThreads(library, TWO, Notes())
    for _ in range(100):
        threads.decode(None, Rows(1))
    assert library.threads == []


def test_a_failed_step_counts_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an aborted step took says nothing about threads; its status is handed on."""
    library = Library()
    library.status = 2
    threads = StepThreads(library, TWO, Notes())
    monkeypatch.setattr(ThreadPolicy, "record", lambda *_: pytest.fail("recorded"))
    assert threads.decode(None, Rows(1)) == 2


def test_threads_have_their_places_where_something_is_in_the_way() -> None:
    """All threads are kept apart once they lose time, and when they are tried again, not else."""
    calm, policy = ThreadPolicy(2), ThreadPolicy(2)
    drive(calm, machine_of((0, IDLE)), 100)
    assert not calm.needs_places
    drive(policy, machine_of((0, ONE_BUSY)), FEW_STEPS)
    assert policy.needs_places
    for _ in range(300):
        drive(policy, machine_of((0, ONE_BUSY)), 1)
        assert policy.needs_places == (policy.num_threads == 2)
    drive(policy, machine_of((0, IDLE)), 300)
    assert not policy.needs_places


@pytest.mark.parametrize("is_in_the_way", [True, False])
def test_places_are_held_for_the_step(monkeypatch: pytest.MonkeyPatch, is_in_the_way: bool) -> None:
    """A step is between holding and letting go, whether one row or many; else nothing is held."""
    places = Notes()
    threads = StepThreads(Library(), TWO, places)
    monkeypatch.setattr(ThreadPolicy, "needs_places", is_in_the_way)
    threads.decode(None, Rows(1))
    threads.decode(None, Rows(512))
    assert places.calls == (["hold", "let go"] * 2 if is_in_the_way else ["release"] * 2)
