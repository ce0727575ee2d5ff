"""What the benches share: starting servers and competitors, and reading what a process used.

Everything that is started here is stopped here, by its own process id, also after an error.
"""

import contextlib
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self, TypeVar

import msgspec
import psutil
from bare_loop import Order, Ran

from brim.bench.stats import Summary, summarise
from brim.cli.planning import plan_model
from brim.config.tree import Settings
from brim.core.plan import Plan
from brim.machine.reading import read_machine

Answer = TypeVar("Answer", bound=msgspec.Struct)

# Being told to stop must stop the children too: as an exception, so that every `finally` runs.
signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))

START_LIMIT_S = 120.0
"""For a server to load a model of a few GB from a cold disk."""

STOP_LIMIT_S = 20.0
"""For a server to drain and end; then it is killed."""

MAX_OTHERS = 0.10
"""Cores that others may use during a sample: above a desktop's background, below any real work."""

COMPETITOR_LIMIT_S = 600.0
"""A competitor ends by itself after this long, whatever becomes of the bench."""


def describe_machine() -> str:
    """The machine's class, for the head of a report."""
    return f"{os.cpu_count()} cores, {platform.machine()} {platform.system()}"


def served_plan(model: str) -> Plan:
    """The plan that `brim serve -m MODEL` makes with default settings on this machine."""
    return plan_model(model, read_machine(), Settings())


# --- processes ---------------------------------------------------------------------------------


class Served(msgspec.Struct, frozen=True):
    """A running server."""

    pid: int
    port: int
    log: Path

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def workers(self) -> list[int]:
        """Process ids below it."""
        return [child.pid for child in psutil.Process(self.pid).children(recursive=True)]


def brim_serve(model: str, *options: str) -> list[str]:
    """The command line of brim's server, without a port."""
    return [sys.executable, "-m", "brim", "serve", "-m", model, *options]


def llama_server(program: str, plan: Plan) -> list[str]:
    """llama-server with its own defaults, one slot, for the plan's model and window."""
    return [program, "-m", plan.model.paths[0], "-c", str(plan.context_tokens), "-np", "1"]


@contextlib.contextmanager
def serving(
    command: Sequence[str], environment: Mapping[str, str] | None = None
) -> Iterator[Served]:
    """Start a server on a free port, wait until `/health` says 200, and stop it at the end.

    Args:
        command: Its command line; `--port N` is appended.
        environment: Added to this process's environment.
    """
    port = free_port()
    with tempfile.NamedTemporaryFile(suffix=".log", delete=False) as log:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | dict(environment or {}),
        )
    served = Served(process.pid, port, Path(log.name))
    try:
        _wait_healthy(process, served)
        yield served
    finally:
        _stop(process)
    served.log.unlink()


def _wait_healthy(process: "subprocess.Popen[bytes]", served: Served) -> None:
    deadline_s = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            break
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            if urllib.request.urlopen(served.url + "/health", timeout=5).status == 200:
                return
        time.sleep(0.05)
    raise SystemExit(f"the server did not start; its last words:\n{_tail(served.log)}")


def _tail(path: Path) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-15:])


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def free_port() -> int:
    """A port that nobody has now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


class Child:
    """A script beside this one as a child process; use it as a context manager.

    It reads a JSON value a line, first the plan and then orders, and answers each order by a line.

    Args:
        name: Of whom is said that it ended.
        command: The script's file name and its arguments.
        plan: How it loads the model.
        environment: All that it sees.
    """

    def __init__(
        self, name: str, command: Sequence[str], plan: Plan, environment: Mapping[str, str]
    ) -> None:
        self.name = name
        self._command = command
        self._plan = plan
        self._environment = environment

    def __enter__(self) -> Self:
        script, *arguments = self._command
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self._environment,
        )
        self._send(self._plan)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.kill()
        self._process.communicate()

    def _ask(self, order: msgspec.Struct, answer: type[Answer]) -> Answer:
        """Have one order done."""
        self._send(order)
        stdout = self._process.stdout
        assert stdout is not None
        line = stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended; its message is above")
        return msgspec.json.decode(line, type=answer)

    def _send(self, value: msgspec.Struct) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        stdin.write(msgspec.json.encode(value) + b"\n")
        stdin.flush()


class BareLoop(Child):
    """bare_loop.py as a child process."""

    def __init__(self, plan: Plan, environment: Mapping[str, str]) -> None:
        # Only what the plan sets may steer the threads, as in a worker.
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "GGML_"))}
        super().__init__("the bare loop", ["bare_loop.py"], plan, kept | dict(environment))

    def run(self, order: Order) -> Ran:
        """Have one order done."""
        return self._ask(order, Ran)


_SPIN = """
import os, time
end, parent = time.monotonic() + {limit_s}, os.getppid()
while time.monotonic() < end and os.getppid() == parent:
    for _ in range(100_000):
        pass
"""


@contextlib.contextmanager
def competitors(number: int) -> Iterator[None]:
    """That many processes that compute without pause, at the same priority."""
    code = _SPIN.format(limit_s=COMPETITOR_LIMIT_S)
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(number)]
    try:
        time.sleep(0.3)  # until all of them have started and spin
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


# --- readings ----------------------------------------------------------------------------------


def cpu_s(pid: int) -> float:
    """CPU time of a process's living threads, to the nanosecond where Linux tells.

    Threads that have ended are left out: use it between moments with the same threads.
    """
    tasks = Path(f"/proc/{pid}/task")
    if not (tasks.parent / "schedstat").exists():
        times = psutil.Process(pid).cpu_times()
        return float(times.user + times.system)
    spent = [(task / "schedstat").read_text().split()[0] for task in tasks.iterdir()]
    return sum(map(int, spent)) / 1e9


def quietly(measure: Callable[[], float], *, attempts: int = 6) -> float:
    """A sample taken while other programs left the machine alone, or the quietest of several.

    Only processes that live through the measurement count as ours, so it must start and end none.
    """
    found: list[tuple[float, float]] = []
    for _ in range(attempts):
        start_s, before_s = time.monotonic(), _others_s()
        sample = measure()
        others = (_others_s() - before_s) / (time.monotonic() - start_s)
        found.append((others, sample))
        if others < MAX_OTHERS:
            break
    return min(found)[1]


def _others_s() -> float:
    """CPU time that other processes, and interrupts, have taken since boot; 0 where unknown."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = map(
        int, stat.read_text().split("\n")[0].split()[1:]
    )
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    own = psutil.Process()
    return busy - sum(cpu_s(pid) for pid in (own.pid, *(c.pid for c in own.children(True))))


def private_bytes(pid: int) -> dict[str, int]:
    """Terms of /proc/PID/smaps_rollup that grow when a process leaks, in bytes."""
    found = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value, *_ = line.split()
        if name in ("Pss_Anon:", "Private_Dirty:", "Private_Clean:", "Rss:"):
            found[name[:-1]] = int(value) * 1024
    return found


# --- reports -----------------------------------------------------------------------------------


def show(label: str, samples: Sequence[float], unit: str = "", digits: int = 2) -> Summary:
    """Print one figure with its spread."""
    found = summarise(samples)
    print(
        f"{label:44} {found.median:10.{digits}f} {unit:8} "
        f"({found.minimum:.{digits}f} to {found.maximum:.{digits}f}, n={found.num_samples})",
        flush=True,
    )
    return found
