"""Pressure notices: what is opened, and what a watch makes of signals, on pipes and trees."""

import os
import select
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from brim.core.machine import Conditions, Pressure
from brim.machine.pressure_sources import Missing, open_kqueue, open_sources
from brim.machine.pressure_watch import (
    GROUP_SIGNALS_S,
    IN_FORCE,
    NUM_GROUP_SIGNALS,
    PressureWatch,
)

WAIT_S = 60.0
"""For a thread to do what takes it microseconds."""


class Pipe:
    """A source that a test signals."""

    poll_mask = select.POLLIN

    def __init__(self, name: str = "pipe", *, is_group: bool = False) -> None:
        self.name, self.is_group = name, is_group
        self._read, self.write = os.pipe()
        self.is_gone = self.is_closed = False

    def signal(self) -> None:
        os.write(self.write, b"x")

    def fileno(self) -> int:
        return self._read

    def take(self) -> None:
        os.read(self._read, 100)
        if self.is_gone:
            raise FileNotFoundError(2, "the group was removed")

    def close(self) -> None:
        self.is_closed = True
        os.close(self._read)
        os.close(self.write)


class Calls:
    """Counts calls, and lets a test wait for the next one."""

    def __init__(self) -> None:
        self.come = threading.Semaphore(0)
        self.thread_name = ""

    def __call__(self) -> None:
        self.thread_name = threading.current_thread().name
        self.come.release()

    def wait(self) -> bool:
        return self.come.acquire(timeout=WAIT_S)


@pytest.fixture
def watching() -> Iterator[Callable[..., PressureWatch]]:
    """Starts watches that are closed after the test."""
    watches = []

    def start(
        *sources: Pipe | Missing,
        on_pressure: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = lambda: 0.0,
        min_interval_s: float = 0.0,
    ) -> PressureWatch:
        watch = PressureWatch(
            on_pressure, opened=lambda: sources, min_interval_s=min_interval_s, clock=clock
        )
        watch.start()
        watches.append(watch)
        return watch

    yield start
    for watch in watches:
        watch.close()


def num_threads() -> int:
    return sum(thread.name == "brim-pressure-watch" for thread in threading.enumerate())


def test_a_signal_calls_back_from_its_own_thread(watching: Callable[..., PressureWatch]) -> None:
    """Each source calls, and never on the thread that started the watch."""
    calls, first, second = Calls(), Pipe("first"), Pipe("second")
    watch = watching(first, second, Missing("third", "not here"), on_pressure=calls)
    first.signal()
    assert calls.wait()
    second.signal()
    assert calls.wait()
    assert calls.thread_name == "brim-pressure-watch"
    assert watch.sources == {"first": IN_FORCE, "second": IN_FORCE, "third": "not here"}


def test_signals_in_a_row_are_one_call(watching: Callable[..., PressureWatch]) -> None:
    """A storm of signals is one call now, and no other before its time, which an end cuts short."""
    calls, pipe = Calls(), Pipe()
    for _ in range(50):
        pipe.signal()
    watch = watching(pipe, on_pressure=calls, min_interval_s=3600)
    assert calls.wait()
    pipe.signal()
    assert not calls.come.acquire(timeout=0.05)
    watch.close()


def test_without_sources_there_is_no_thread(watching: Callable[..., PressureWatch]) -> None:
    """A system that signals nothing costs nothing, and says why."""
    watch = watching(Missing("stalls", "no such file"))
    assert num_threads() == 0
    assert (watch.is_watching, watch.sources) == (False, {"stalls": "no such file"})


def test_close_ends_thread_and_sources_and_may_be_called_again(
    watching: Callable[..., PressureWatch],
) -> None:
    """After closing there is no thread and no open descriptor of the watch."""
    pipe = Pipe()
    watch = watching(pipe)
    watch.start()
    assert num_threads() == 1
    watch.close()
    watch.close()
    assert (num_threads(), pipe.is_closed, watch.is_watching) == (0, True, False)


def test_a_source_that_is_gone_is_left_out(watching: Callable[..., PressureWatch]) -> None:
    """The others are watched on, and the reason stands where it was in force."""
    calls, lost, kept = Calls(), Pipe("lost"), Pipe("kept")
    watch = watching(lost, kept, on_pressure=calls)
    lost.is_gone = True
    lost.signal()
    kept.signal()
    assert calls.wait()
    while not lost.is_closed:
        pass
    assert watch.sources == {"kept": IN_FORCE, "lost": "the group was removed"}


def test_a_hang_up_is_an_end(watching: Callable[..., PressureWatch]) -> None:
    """A descriptor that reports an error is given up instead of being polled for ever."""
    lost = Pipe("lost")
    watch = watching(lost)
    writer, lost.write = lost.write, os.dup(lost.fileno())
    os.close(writer)  # the last one that could signal
    while watch.is_watching:
        pass
    assert watch.sources == {"lost": "the system has ended it"}


def test_a_callback_that_fails_is_said_and_tried_again(
    watching: Callable[..., PressureWatch], capsys: pytest.CaptureFixture[str]
) -> None:
    """An event loop that has just closed must not end the watch of the next one."""
    calls, pipe = Calls(), Pipe()

    def fail() -> None:
        calls()
        raise RuntimeError("Event loop is closed")

    watch = watching(pipe, on_pressure=fail)
    for _ in range(2):
        pipe.signal()
        assert calls.wait()
    watch.close()
    assert capsys.readouterr().err.count("pressure_callback_failed") == 2


def test_signals_of_a_group_are_a_warning_while_they_last(
    watching: Callable[..., PressureWatch],
) -> None:
    """Many in a few seconds are a warning where there is no level to read; fewer are normal."""
    now_s, calls, group = [0.0], Calls(), Pipe(is_group=True)
    watch = watching(group, on_pressure=calls, clock=lambda: now_s[0])
    quiet = Conditions(sources={"pressure": "none"})
    levels = []
    for number in range(NUM_GROUP_SIGNALS):
        levels.append(watch.completed(quiet).pressure)
        now_s[0] = number * 0.1
        group.signal()
        assert calls.wait()
    assert levels == [Pressure.NORMAL] * NUM_GROUP_SIGNALS
    done = watch.completed(quiet)
    assert done.pressure is Pressure.WARNING
    assert "memory.pressure_level" in done.sources["pressure"]
    now_s[0] = GROUP_SIGNALS_S
    assert watch.completed(quiet).pressure is Pressure.NORMAL


def test_a_level_that_the_system_gives_stays(watching: Callable[..., PressureWatch]) -> None:
    """The system's own level, a simulated machine, and one without groups are left as they are."""
    watch = watching(Pipe(is_group=True))
    for conditions in (Conditions(pressure=Pressure.CRITICAL), Conditions(is_simulated=True)):
        assert watch.completed(conditions) is conditions
    bare = Conditions()
    assert watching(Pipe()).completed(bare) is bare


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def opened(root: Path) -> dict[str, str]:
    """Names below the root of what was opened, and reasons for the rest."""
    found = {}
    for source in open_sources(root):
        name = source.name.replace(str(root), "")
        if isinstance(source, Missing):
            found[name] = source.reason
        else:
            found[name] = IN_FORCE
            source.close()
    return found


linux_alone = pytest.mark.skipif(not hasattr(os, "eventfd"), reason="only Linux has these files")


@linux_alone
def test_the_triggers_are_what_the_kernel_takes_without_root(tmp_path: Path) -> None:
    """A tenth of a second in a window of two, for the machine and for each version 2 group."""
    box = "sys/fs/cgroup/a/box"
    files = {
        "proc/pressure/memory": "",
        "proc/self/cgroup": "0::/a/box\n",
        "proc/self/mountinfo": "29 1 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
        f"{box}/memory.pressure": "",
        "sys/fs/cgroup/a/memory.pressure": "",
    }
    root = tree(tmp_path, files)
    assert opened(root) == {
        "stalls, /proc/pressure/memory": IN_FORCE,
        f"stalls, /{box}/memory.pressure": IN_FORCE,
        "stalls, /sys/fs/cgroup/a/memory.pressure": IN_FORCE,
    }
    for name in ("proc/pressure/memory", f"{box}/memory.pressure"):
        assert (root / name).read_bytes() == b"some 100000 2000000\0"


@linux_alone
def test_version_1_groups_are_asked_up_to_the_top(tmp_path: Path) -> None:
    """Each group above is told of its own limit, so each is asked; one that is not ours is said."""
    memory = "sys/fs/cgroup/memory"
    files = {
        "proc/self/cgroup": "4:memory:/a\n",
        "proc/self/mountinfo": "35 1 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
        f"{memory}/a/memory.pressure_level": "",
        f"{memory}/a/cgroup.event_control": "",
    }
    root = tree(tmp_path, files)
    assert opened(root) == {
        "stalls, /proc/pressure/memory": "No such file or directory",
        f"reclaim, /{memory}/a/memory.pressure_level": IN_FORCE,
        f"reclaim, /{memory}/memory.pressure_level": "No such file or directory",
    }
    event, level, words = (root / memory / "a/cgroup.event_control").read_text().split()
    assert (event.isdigit(), level.isdigit(), words) == (True, True, "medium,local")


class Kqueue:
    """A kernel queue over a pipe, as the module `select` gives it on macOS."""

    KQ_EV_ADD = 1

    def __init__(self, *, refuses: bool = False) -> None:
        self.refuses = refuses
        self.read, self.write = os.pipe()
        self.asked: list[dict[str, Any]] = []
        self.is_closed = False

    def kqueue(self) -> "Kqueue":
        return self

    def kevent(self, ident: int, **options: Any) -> dict[str, Any]:
        return {"ident": ident, **options}

    def control(self, changes: list[dict[str, Any]] | None, num_events: int, *_: float) -> None:
        if self.refuses:
            raise OSError(45, "Operation not supported")
        if changes is None:
            os.read(self.read, num_events)
        else:
            self.asked += changes

    def fileno(self) -> int:
        return self.read

    def close(self) -> None:
        self.is_closed = True
        os.close(self.read)
        os.close(self.write)


def test_the_filter_is_the_kernels(watching: Callable[..., PressureWatch]) -> None:
    """The filter -14 is asked for with all three levels, and what it says calls back."""
    calls, queue = Calls(), Kqueue()
    watching(open_kqueue(queue), on_pressure=calls)
    assert queue.asked == [{"ident": 0, "filter": -14, "flags": 1, "fflags": 7}]
    os.write(queue.write, b"x")
    assert calls.wait()


def test_a_refused_filter_is_left_out() -> None:
    """A kernel that does not know the filter, or a system without kernel queues, is a reason."""
    queue = Kqueue(refuses=True)
    source = open_kqueue(queue)
    assert isinstance(source, Missing)
    assert (source.reason, queue.is_closed) == ("[Errno 45] Operation not supported", True)
    assert isinstance(open_kqueue(object()), Missing)
