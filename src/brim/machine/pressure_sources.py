"""What the system tells of memory pressure by itself, each as a file descriptor to poll.

Linux: PSI triggers (https://docs.kernel.org/accounting/psi.html) of the machine and of version 2
groups, and memory.pressure_level (cgroup-v1/memory.html) of version 1 groups.  macOS: the kqueue
filter of <sys/event_private.h>, which any process may use; the headers are all that it was written
from, so whatever fails there leaves the notification out, and polling goes on.
"""

import os
import select
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from brim.machine.cgroup import hierarchies

STALL_US = 100_000
WINDOW_US = 2_000_000
"""A tenth of a second lost in two: 5 %, which avg10, being smoothed, shows only seconds later.
Without root the kernel takes windows of whole multiples of 2 s alone."""

GROUP_LEVEL = "medium,local"
"""Of version 1 groups: told from here on.  'low' says that file pages were reclaimed, which is what
they are for.  'critical' is told as 'medium' as well, and is no surer sign of trouble: a process
that wrote 400 MB of files in a group of 150 MB, 90 of them taken, had it told to it three times.
Without 'local' the groups above are told of a neighbour's own limit too: 84 times in 3 s.
Source: https://docs.kernel.org/admin-guide/cgroup-v1/memory.html, section 11."""

EVFILT_MEMORYSTATUS = -14
NOTE_ALL_LEVELS = 1 | 2 | 4
"""bsd/sys/event_private.h: NOTE_MEMORYSTATUS_PRESSURE_NORMAL, _WARN and _CRITICAL."""


class PressureSource(Protocol):
    """Something that becomes ready when memory is short."""

    name: str
    poll_mask: int
    is_group: bool
    """Whether a signal says that a group of ours finds it hard to reclaim memory."""

    def fileno(self) -> int:
        """To poll."""
        ...

    def take(self) -> None:
        """Take the signal, so that the next one can be told from it.

        Raises:
            OSError: The source is gone for good.
        """
        ...

    def close(self) -> None:
        """Give the descriptor back."""
        ...


class Missing(NamedTuple):
    """A source that cannot be had here."""

    name: str
    reason: str


def open_sources(root: Path = Path("/")) -> Iterator[PressureSource | Missing]:
    """Every source of this system, open, or the reason why not; the caller closes them."""
    if sys.platform == "darwin":
        yield open_kqueue()
        return
    yield _opened(StallTrigger, root / "proc/pressure/memory")
    for hierarchy in hierarchies("memory", root):
        # A group is told of the reclaim that its own limit causes, so each one is asked.
        for directory in hierarchy.directories:
            if hierarchy.version == 2:
                path = directory / "memory.pressure"
                if path.exists():  # /proc/pressure/memory has said why, where no group has it
                    yield _opened(StallTrigger, path)
            else:
                yield _opened(GroupPressure, directory)


def _opened(kind: type["StallTrigger | GroupPressure"], path: Path) -> PressureSource | Missing:
    try:
        return kind(path)
    except OSError as exc:
        return Missing(kind.name_of(path), exc.strerror or str(exc))


class StallTrigger:
    """A PSI trigger: ready when tasks waited for memory for `STALL_US` of a window.

    Args:
        path: /proc/pressure/memory, or a version 2 group's memory.pressure.

    Raises:
        OSError: The kernel measures no stalls, or does not let us.
    """

    poll_mask = select.POLLPRI
    is_group = False

    def __init__(self, path: Path) -> None:
        self.name = self.name_of(path)
        self._file = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        try:
            os.write(self._file, f"some {STALL_US} {WINDOW_US}\0".encode())
        except OSError:
            os.close(self._file)
            raise

    @staticmethod
    def name_of(path: Path) -> str:
        """For people."""
        return f"stalls, {path}"

    def fileno(self) -> int:
        """The trigger lives as long as this descriptor."""
        return self._file

    def take(self) -> None:
        """Polling has taken the signal; a stall has no level."""
        return

    def close(self) -> None:
        """End the trigger."""
        os.close(self._file)


class GroupPressure:
    """Ready when a version 1 group finds it hard to reclaim memory.

    Args:
        directory: Of the group.

    Raises:
        OSError: The group has no levels, or is not ours to ask.
    """

    poll_mask = select.POLLIN
    is_group = True

    def __init__(self, directory: Path) -> None:
        self.name = self.name_of(directory)
        self._directory = directory
        self._event = _eventfd()
        try:
            # The kernel keeps the level's file itself; only the event's descriptor has to stay.
            pressure = os.open(directory / "memory.pressure_level", os.O_RDONLY)
            try:
                control = os.open(directory / "cgroup.event_control", os.O_WRONLY)
                try:
                    os.write(control, f"{self._event} {pressure} {GROUP_LEVEL}".encode())
                finally:
                    os.close(control)
            finally:
                os.close(pressure)
        except OSError:
            os.close(self._event)
            raise

    @staticmethod
    def name_of(directory: Path) -> str:
        """For people."""
        return f"reclaim, {directory}/memory.pressure_level"

    def fileno(self) -> int:
        """Counts events that were not taken."""
        return self._event

    def take(self) -> None:
        """Read the count.  A group's removal is an event as well, the last one."""
        os.read(self._event, 8)
        if not self._directory.is_dir():
            raise FileNotFoundError(f"{self._directory} was removed")

    def close(self) -> None:
        """The kernel takes the registration back."""
        os.close(self._event)


def _eventfd() -> int:
    make: Any = getattr(os, "eventfd", None)
    if make is None:
        raise OSError("this system has no eventfd")
    return int(make(0, os.O_CLOEXEC | os.O_NONBLOCK))


class KernelQueue:
    """macOS: ready when the kernel tells this process its level of memory pressure.

    It tells processes of 10 MB and more first, says nothing at the beginning, and at most four
    times a second.

    Args:
        calls: The module `select`, or one like it.

    Raises:
        OSError: The kernel refuses the filter.
    """

    poll_mask = select.POLLIN
    is_group = False

    def __init__(self, calls: Any) -> None:
        self.name = "kqueue EVFILT_MEMORYSTATUS"
        self._queue = calls.kqueue()
        wanted = calls.kevent(
            0, filter=EVFILT_MEMORYSTATUS, flags=calls.KQ_EV_ADD, fflags=NOTE_ALL_LEVELS
        )
        try:
            self._queue.control([wanted], 0)
        except OSError:
            self._queue.close()
            raise

    def fileno(self) -> int:
        """The queue's own, which can be polled."""
        return int(self._queue.fileno())

    def take(self) -> None:
        """Empty the queue; the level itself is read with the other conditions."""
        self._queue.control(None, 4, 0)

    def close(self) -> None:
        """End the watch."""
        self._queue.close()


def open_kqueue(calls: Any = select) -> PressureSource | Missing:
    """The notification of macOS, or why it cannot be had."""
    try:
        return KernelQueue(calls)
    except (OSError, AttributeError, TypeError, ValueError) as exc:
        return Missing("kqueue EVFILT_MEMORYSTATUS", str(exc))
