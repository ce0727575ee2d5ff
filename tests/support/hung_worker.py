"""A gateway with a worker that hangs and outlives it."""

import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

# Plays a gateway: starts a worker as the real one does, notes it, and waits to be killed.
GATEWAY = """
import os, socket, subprocess, sys
from pathlib import Path
from brim.runtime.orphans import note_worker
ours, theirs = socket.socketpair()
arguments = ["-P", "-m", "brim.worker", f"--fd={theirs.fileno()}", f"--parent={os.getpid()}"]
worker = subprocess.Popen(
    [sys.executable, *arguments],
    pass_fds=(theirs.fileno(),),
    stdout=subprocess.DEVNULL,
    env=os.environ | {"PYTHONPATH": sys.argv[2]},
)
os.waitpid(worker.pid, os.WUNTRACED)
note_worker(worker.pid, Path(sys.argv[1]))
print(worker.pid, flush=True)
sys.stdin.readline()
"""


HOOK = "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\n"
"""A worker's sitecustomize: it stops before a line of ours has run, and so before it has asked the
system to be ended with its gateway."""


class Gateway:
    """A process that has started a worker, which hangs."""

    def __init__(self, directory: Path) -> None:
        self._hook = tempfile.TemporaryDirectory()
        Path(self._hook.name, "sitecustomize.py").write_text(HOOK)
        self.process = subprocess.Popen(
            [sys.executable, "-c", GATEWAY, str(directory), self._hook.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.worker = psutil.Process(int(self.process.stdout.readline()))

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=60)
        self._hook.cleanup()


def has_ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
