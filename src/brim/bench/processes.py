"""Processes that a measurement starts: found as trees, ended as trees, weighed as trees.

A process is started as the leader of a session of its own, so that Ctrl-C at the terminal reaches
the measurement alone, which then ends what it started.
"""

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import psutil

from brim.errors import ConfigError
from brim.machine.interface import Machine

STOP_LIMIT_S = 20.0
"""For a server to drain and end when it is told to; then it is killed."""

POLL_S = 0.005
"""Between looks at whether killed processes are gone; the kernel takes milliseconds for GBs."""

LAST_WORDS = 3
"""Lines of a server's output that go into an error: enough for a message, short enough to read."""


class ProcessTree:
    """A command with everything that it starts; its output goes into a file of its own."""

    def __init__(self, command: Sequence[str]) -> None:
        """Start it.

        Raises:
            ConfigError: The program is not there or may not be run.
        """
        descriptor, name = tempfile.mkstemp(prefix="brim-bench-", suffix=".log")
        self._log = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as log:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as exc:
            self._log.unlink()
            raise ConfigError(f"cannot start '{command[0]}': {exc.strerror or exc}") from exc

    @property
    def pid(self) -> int:
        """Of the command itself."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether the command itself still runs."""
        return self._process.poll() is None

    def processes(self) -> list[psutil.Process]:
        """The command and everything below it that is alive."""
        return tree_below([self.pid])

    def last_words(self) -> str:
        """The end of what it printed, on one line."""
        text = self._log.read_text(errors="replace") if self._log.exists() else ""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return " / ".join(lines[-LAST_WORDS:]) or "it printed nothing"

    def stop(self) -> None:
        """Ask the command to end, and end whatever of its tree has not done so in time."""
        tree = self.processes()
        if self.is_running:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_LIMIT_S)
        self._end(tree)
        self._log.unlink(missing_ok=True)

    def kill(self) -> None:
        """End the whole tree at once, as a crash or a power cut would."""
        self._end(self.processes())

    def _end(self, tree: Sequence[psutil.Process]) -> None:
        # First all and then the group: a child that is orphaned by then keeps its group.
        for process in tree:
            with contextlib.suppress(psutil.Error):
                process.kill()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        deadline_s = time.monotonic() + STOP_LIMIT_S
        while any(map(is_alive, tree)) and time.monotonic() < deadline_s:
            time.sleep(POLL_S)


def is_alive(process: psutil.Process) -> bool:
    """Whether a process runs; one that only waits for init to take note of its end does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def tree_below(pids: Iterable[int]) -> list[psutil.Process]:
    """Processes that are there, each followed by everything below it."""
    tree: list[psutil.Process] = []
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            top = psutil.Process(pid)
            tree += [top, *top.children(recursive=True)]
    return tree


def listeners(port: int) -> list[int]:
    """Processes of our own user that listen on a local port; empty where nobody tells.

    It looks at every open file of every process, tens of milliseconds: ask once.
    """
    try:
        found = psutil.net_connections(kind="tcp")
    except psutil.Error:  # macOS tells this to root alone
        return []
    return sorted(
        {c.pid for c in found if c.pid and c.status == psutil.CONN_LISTEN and c.laddr.port == port}
    )


def dirty_bytes(tree: Sequence[psutil.Process], machine: Machine) -> int | None:
    """Memory of a tree that the system would have to swap to take away; None where it is unknown.

    Anonymous memory in proportion to who shares it on Linux, the physical footprint on macOS.
    Mapped weights are left out: they are the same file for every server of a comparison.
    """
    found = [machine.process_memory(process.pid) for process in tree]
    known = [memory.dirty_bytes for memory in found if memory is not None]
    return sum(known) if known else None


def free_port() -> int:
    """A local port that nobody has now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
