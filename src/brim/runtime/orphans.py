"""Workers that outlive their gateway: noted while they run, ended by whoever starts next.

A gateway that is killed cannot end its workers.  Their socket ends with it, and Linux kills them,
but one that hangs in a backend on macOS holds its gigabytes until somebody ends it.  So each worker
is noted in a file of its own, with the times at which it and its gateway began: a process id may
have been given out again, and nobody else's process may be ended.
"""

import functools
import os
import signal
import time
from pathlib import Path

import msgspec

from brim.config import places
from brim.errors import ConfigError
from brim.ledger.processes import is_running, start_time
from brim.telemetry.events import log_event

END_LIMIT_S = 5.0
"""For the system to take back the memory of a killed process: a second for tens of gigabytes."""

POLL_S = 0.02

WORKER_MODULE = "brim.worker"


class WorkerNote(msgspec.Struct, frozen=True, kw_only=True):
    """One worker, as its gateway wrote it down."""

    pid: int
    started_unix_s: float
    """When the process began, by the system."""
    gateway_pid: int
    gateway_started_unix_s: float


def notes_directory() -> Path:
    """Where the notes lie; made by `note_worker`.

    Raises:
        ConfigError: There is no directory that is ours alone.
    """
    return places.runtime_directory() / "workers"


def note_worker(pid: int, directory: Path | None = None) -> None:
    """Write down a worker of this process; never fails, since a note is no reason to refuse a load.

    Args:
        pid: The worker.
        directory: Where notes lie, unless it is the usual place.
    """
    started = start_time(pid)
    if started is None:
        return
    note = WorkerNote(
        pid=pid,
        started_unix_s=started,
        gateway_pid=os.getpid(),
        gateway_started_unix_s=_own_start(os.getpid()),
    )
    try:
        path = _path(pid, directory)
        path.parent.mkdir(mode=places.OWNER_ONLY, parents=True, exist_ok=True)
        # Whoever starts in this moment must not take half a note for one that is about nobody.
        scratch = path.with_suffix(".new")
        scratch.write_bytes(msgspec.json.encode(note))
        scratch.replace(path)
    except (OSError, ConfigError) as exc:
        log_event("worker_not_noted", pid=pid, reason=exc)


def forget_worker(pid: int, directory: Path | None = None) -> None:
    """Remove the note of a worker that has ended; never fails."""
    try:
        _path(pid, directory).unlink(missing_ok=True)
    except (OSError, ConfigError) as exc:
        log_event("worker_note_left", pid=pid, reason=exc)


def find_orphans(directory: Path | None = None) -> list[WorkerNote]:
    """Workers that run although their gateway has ended."""
    return [note for _, note in _notes(directory) if note is not None and is_orphan(note)]


def stale_notes(directory: Path | None = None) -> list[Path]:
    """Notes about workers that have ended, which the next start removes."""
    return [
        path
        for path, note in _notes(directory)
        if note is None or not is_running(note.pid, note.started_unix_s)
    ]


def end_orphans(directory: Path | None = None) -> list[int]:
    """End the workers of gateways that have ended, and remove notes that are about nobody.

    Returns when their memory is free, or after `END_LIMIT_S`.

    Returns:
        The process ids that were ended.

    Raises:
        ConfigError: There is no directory that is ours alone.
    """
    ended = []
    for path, note in _notes(directory):
        if note is None or not is_running(note.pid, note.started_unix_s):
            path.unlink(missing_ok=True)
        elif is_orphan(note) and _end(note):
            log_event("orphan_ended", pid=note.pid, gateway_pid=note.gateway_pid)
            path.unlink(missing_ok=True)
            ended.append(note.pid)
    return ended


def is_orphan(note: WorkerNote) -> bool:
    """Whether this very worker runs, its very gateway does not, and it is a worker of it."""
    if is_running(note.gateway_pid, note.gateway_started_unix_s):
        return False
    return is_running(note.pid, note.started_unix_s) and _is_worker_of(note.pid, note.gateway_pid)


def _is_worker_of(pid: int, gateway_pid: int) -> bool:
    """Whether its command line is that of a worker of this gateway, and it is its child no more."""
    import psutil

    try:
        process = psutil.Process(pid)
        words, parent = process.cmdline(), process.ppid()
    except psutil.Error:
        return False
    return WORKER_MODULE in words and f"--parent={gateway_pid}" in words and parent != gateway_pid


def _end(note: WorkerNote) -> bool:
    """Kill an orphan, and wait until the system has its memory back; whether it is gone."""
    try:
        os.kill(note.pid, signal.SIGKILL)
    except ProcessLookupError:
        return True
    except PermissionError as exc:
        log_event("orphan_stays", pid=note.pid, reason=exc)
        return False
    deadline = time.monotonic() + END_LIMIT_S
    while is_running(note.pid, note.started_unix_s):
        if time.monotonic() > deadline:
            log_event("orphan_stays", pid=note.pid, reason="it does not end")
            return False
        time.sleep(POLL_S)
    return True


def _notes(directory: Path | None) -> list[tuple[Path, WorkerNote | None]]:
    """Every note with its file; None in place of one that cannot be read as a note."""
    found: list[tuple[Path, WorkerNote | None]] = []
    for path in sorted((directory or notes_directory()).glob("*.json")):
        try:
            found.append((path, msgspec.json.decode(path.read_bytes(), type=WorkerNote)))
        except msgspec.MsgspecError:
            found.append((path, None))
        except OSError:
            continue  # it has just been removed
    return found


def _path(pid: int, directory: Path | None) -> Path:
    return (directory or notes_directory()) / f"{pid}.json"


@functools.cache
def _own_start(pid: int) -> float:
    """When this process began; asked once for each id, since a fork has another."""
    return start_time(pid) or 0.0
