"""What went down lately: workers by brim's own events, the kernel by its reports and its log."""

import os
import platform
import re
import time
from collections.abc import Iterable
from pathlib import Path

from brim.core.event import EventKind
from brim.doctor.facts import Crashes
from brim.machine.cgroup import hierarchies, read_text
from brim.telemetry.event_store import FILE_NAME, EventStore

RECENT_S = 7 * 86_400.0
"""What is older has been mended, or is nobody's concern."""

PANIC_RECENT_S = 30 * 86_400.0
"""A machine that panics once in a month has still the cause of it."""

MAX_EVENTS = 200

PANIC_DIRECTORY = Path("/Library/Logs/DiagnosticReports")
PANIC_GLOB = "panic-full-*.panic"
MAX_PANIC_BYTES = 2 * 1024 * 1024
"""A report has its reason in the first lines; the rest are stacks of every thread."""

GPU_PANIC = re.compile(r"completeMemory\(\)|IOGPU|fPendingMemorySet|cpt_mapcnt_inc")
"""Source: reports of the panic that a raised wired limit and cache churn trigger."""

MAX_LOG_BYTES = 1024 * 1024
KMSG_LINE = re.compile(r"^\d+,\d+,(\d+),[^;]*;")
"""Priority, number, and microseconds since boot.
Source: https://www.kernel.org/doc/Documentation/ABI/testing/dev-kmsg"""

OOM_LINE = re.compile(r"Killed process (\d+) \(([^)]*)\)")
"""Source: mm/oom_kill.c."""

_KINDS = (EventKind.WORKER_DIED, EventKind.MODEL_QUARANTINED, EventKind.UNLOAD_FAILED)


def read_crashes(state_directory: Path) -> Crashes:
    """What went down, by the events in a state directory and by the system.

    Raises:
        ConfigError: The events cannot be read.
    """
    store = EventStore(state_directory / FILE_NAME)
    stored = store.read(MAX_EVENTS, kinds=_KINDS, since_unix_s=time.time() - RECENT_S)
    panics, others = read_panics(PANIC_DIRECTORY, time.time())
    is_linux = platform.system() == "Linux"
    num_kills = oom_kills() if is_linux else None
    return Crashes(
        worker_events=tuple(each.event for each in stored),
        panics=panics,
        other_panics=others,
        num_oom_kills=num_kills,
        oom_victims=oom_victims(_recent_log()) if is_linux else (),
    )


def read_panics(directory: Path, now_unix_s: float) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Reports of kernel panics of the last month, newest first: the GPU's memory, and others."""
    found: list[tuple[float, str, bool]] = []
    for path in directory.glob(PANIC_GLOB):
        try:
            changed = path.stat().st_mtime
            if now_unix_s - changed > PANIC_RECENT_S:
                continue
            with path.open("rb") as file:
                text = file.read(MAX_PANIC_BYTES).decode("utf-8", "replace")
        except OSError:  # reports are the administrators' to read
            continue
        found.append((changed, path.name, GPU_PANIC.search(text) is not None))
    found.sort(reverse=True)
    return (
        tuple(name for _, name, is_gpu in found if is_gpu),
        tuple(name for _, name, is_gpu in found if not is_gpu),
    )


def oom_kills(root: Path = Path("/")) -> int | None:
    """Processes that the kernel has killed in our innermost group with a count; None without."""
    for hierarchy in hierarchies("memory", root):
        name = "memory.events" if hierarchy.version == 2 else "memory.oom_control"
        for directory in hierarchy.directories:
            match = re.search(r"^oom_kill (\d+)$", read_text(directory / name), re.M)
            if match:
                return int(match[1])
    return None


def oom_victims(lines: Iterable[str]) -> tuple[str, ...]:
    """Programs that the kernel's log says it killed, newest last.

    Example:
        >>> oom_victims(["3,1,1,-;Memory cgroup out of memory: Killed process 7 (python) total-vm"])
        ('python (pid 7)',)
    """
    found = [OOM_LINE.search(line) for line in lines]
    return tuple(f"{match[2]} (pid {match[1]})" for match in found if match)


def _recent_log() -> list[str]:
    """Lines of the last week."""
    since_us = (time.clock_gettime(time.CLOCK_BOOTTIME) - RECENT_S) * 1e6
    return [line for line in _kernel_log() if _at_us(line) >= since_us]


def _at_us(line: str) -> int:
    match = KMSG_LINE.match(line)
    return int(match[1]) if match else 0


def _kernel_log() -> list[str]:
    """The kernel's log as far as we may read it; empty where that is root's alone."""
    try:
        descriptor = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return []
    lines, total = [], 0
    try:
        while total < MAX_LOG_BYTES and (data := os.read(descriptor, 8192)):
            total += len(data)
            lines.append(data.decode("utf-8", "replace"))
    except OSError:  # the end of what there is, or overwritten meanwhile
        pass
    finally:
        os.close(descriptor)
    return lines
