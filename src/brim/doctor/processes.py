"""What else runs on this machine, by program: who holds memory, who serves models, who indexes."""

import platform
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from brim.doctor.facts import OtherServer, Processes, Program
from brim.machine.cgroup import read_text
from brim.machine.linux import parse_kib_lines
from brim.machine.process import process_memory

MIN_BYTES = 50_000_000
"""A program below is nobody's reason for a model that does not fit."""

NUM_PROGRAMS = 8

PORT_LIMIT_S = 0.2
"""A program on this machine that listens accepts at once."""

INDEXERS = frozenset(
    {
        "mds", "mds_stores", "mdworker", "mdworker_shared", "localsearch-3",
        "localsearch-extractor-3", "tracker-miner-fs-3", "tracker-extract-3", "baloo_file",
        "baloo_file_extractor",
    }
)  # fmt: skip
"""Of macOS, GNOME and KDE."""

INDEXER_WINDOW_S = 0.25
INDEXER_BUSY = 0.1
"""Of one processor: an indexer that has nothing to read wakes for less."""


class KnownServer(NamedTuple):
    """An inference server and how it is recognised."""

    name: str
    processes: frozenset[str]
    """Names of its processes, or of its app bundle."""
    words: tuple[str, ...] = ()
    """A word of its command line, where the process is an interpreter."""
    port: int | None = None
    """That it listens on by default, where nothing else is known to."""
    stop: str = "kill {pid}"


KNOWN_SERVERS = (
    KnownServer(
        "Ollama", frozenset({"ollama", "Ollama.app"}), port=11434,
        stop="ollama stop MODEL (ollama ps lists them), or quit Ollama",
    ),
    KnownServer(
        "LM Studio", frozenset({"LM Studio.app", "lm-studio", "LM Studio", "llmworker"}), port=1234,
        stop="lms unload --all, or quit LM Studio",
    ),
    KnownServer("llama-server", frozenset({"llama-server"})),
    KnownServer("llamafile", frozenset({"llamafile"})),
    KnownServer("mlx_lm.server", frozenset({"mlx_lm.server"}), ("mlx_lm.server", "mlx_lm")),
    KnownServer("oMLX", frozenset({"omlx", "oMLX.app"}), ("omlx",)),
    KnownServer("vLLM", frozenset({"vllm"}), ("vllm", "vllm_mlx", "vllm-mlx")),
    KnownServer("SGLang", frozenset(), ("sglang", "sglang.launch_server")),
    KnownServer("exo", frozenset({"exo", "EXO.app"}), ("exo",)),
    KnownServer("LocalAI", frozenset({"local-ai"})),
    KnownServer("KoboldCpp", frozenset({"koboldcpp"}), ("koboldcpp.py",)),
    KnownServer("Jan", frozenset({"Jan.app", "cortex-server"})),
    KnownServer("GPT4All", frozenset({"gpt4all", "GPT4All.app"}), ("gpt4all",)),
)  # fmt: skip
"""Source: the projects' own documentation of command and default port."""


class Running(NamedTuple):
    """One process as the system lists it."""

    pid: int
    name: str
    exe: str
    words: tuple[str, ...]
    """Of its command line."""


class Held(NamedTuple):
    """Memory of one process."""

    dirty_bytes: int
    resident_bytes: int


def read_processes() -> Processes:
    """What runs now; takes some tens of milliseconds."""
    return survey(list(_running()), _held, _answers, _busy_indexers)


def survey(
    running: Sequence[Running],
    held: Callable[[int], Held | None],
    answers: Callable[[int], bool],
    busy_indexers: Callable[[], Iterable[str]] = tuple,
) -> Processes:
    """Processes by program.

    Args:
        running: All that the system lists.
        held: What a process holds; None where it is gone or not ours to read.
        answers: Whether something listens on a port of this machine.
        busy_indexers: Programs that index now.
    """
    sums: dict[str, list[int]] = {}
    servers: dict[str, OtherServer] = {}
    own_bytes = 0
    for process in running:
        memory = held(process.pid)
        if memory is None:
            continue
        if is_ours(process):
            own_bytes += memory.dirty_bytes
            continue
        program = program_of(process)
        known = _known_server(process, program)
        if known is not None:
            servers[known.name] = _with(servers.get(known.name), known, process.pid, memory)
        each = sums.setdefault(program, [0, 0, 0])
        each[0] += 1
        each[1] += memory.dirty_bytes
        each[2] += memory.resident_bytes
    for known in KNOWN_SERVERS:
        if known.port is not None and known.name not in servers and answers(known.port):
            servers[known.name] = OtherServer(
                name=f"something on {known.name}'s port {known.port}",
                pid=None,
                held_bytes=0,
                stop=known.stop.format(pid="PID"),
            )
    programs = [
        Program(name=name, num_processes=each[0], dirty_bytes=each[1], resident_bytes=each[2])
        for name, each in sums.items()
        if each[1] >= MIN_BYTES
    ]
    programs.sort(key=lambda program: program.dirty_bytes, reverse=True)
    return Processes(
        programs=tuple(programs[:NUM_PROGRAMS]),
        own_bytes=own_bytes,
        other_servers=tuple(servers.values()),
        indexers=tuple(sorted(set(busy_indexers()))),
    )


def is_ours(process: Running) -> bool:
    """Whether it is a process of brim.

    Example:
        >>> is_ours(Running(1, "python3", "", ("python3", "-P", "-m", "brim.worker", "--fd=3")))
        True
    """
    if any(word == "brim" or word.startswith("brim.") for word in _module(process.words)):
        return True
    return any(Path(word).name == "brim" for word in process.words[:2])


def program_of(process: Running) -> str:
    """What a person calls the program that a process belongs to.

    Example:
        >>> exe = "/Applications/Google Chrome.app/Contents/Frameworks/H.app/Contents/MacOS/H"
        >>> program_of(Running(1, "H", exe, ()))
        'Google Chrome.app'
        >>> program_of(Running(1, "python3.11", "", ("python3", "-m", "mlx_lm.server")))
        'python mlx_lm.server'
    """
    for part in Path(process.exe).parts:
        if part.endswith(".app"):
            return part
    if process.name.lower().startswith("python"):
        module = _module(process.words)
        script = next((w for w in process.words[1:] if not w.startswith("-")), "")
        what = module[0] if module else Path(script).name
        return f"python {what}".strip()
    return process.name


def _module(words: Sequence[str]) -> tuple[str, ...]:
    """What an interpreter runs with -m."""
    after = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "-m"]
    return tuple(after[:1])


def _known_server(process: Running, program: str) -> KnownServer | None:
    names = {process.name, program, Path(process.exe).name}
    if process.words:
        names.add(Path(process.words[0]).name)
    # A script that an interpreter runs, or its module: not any argument, such as a model's name.
    scripts = {Path(word).name for word in process.words[1:2]} | set(_module(process.words))
    is_interpreter = process.name.lower().startswith(("python", "uv"))
    for known in KNOWN_SERVERS:
        if names & known.processes or (is_interpreter and scripts & set(known.words)):
            return known
    return None


def _with(server: OtherServer | None, known: KnownServer, pid: int, memory: Held) -> OtherServer:
    """The server with one more process; its largest one is named."""
    # Weights that are mapped are in no dirty figure, and the page cache has no room for ours.
    held_bytes = max(memory.dirty_bytes, memory.resident_bytes)
    before = 0 if server is None else server.held_bytes
    named = pid if server is None or server.pid is None or held_bytes > before else server.pid
    return OtherServer(
        name=known.name,
        pid=named,
        held_bytes=before + held_bytes,
        stop=known.stop.format(pid=named),
    )


def _running() -> Iterable[Running]:
    import psutil

    for process in psutil.process_iter(["name", "exe", "cmdline"]):
        info = process.info
        words = tuple(info["cmdline"] or ())
        yield Running(process.pid, info["name"] or "", info["exe"] or "", words)


def _held(pid: int) -> Held | None:
    """By /proc/PID/status, which costs no walk over page tables, or the system's own account."""
    if platform.system() == "Linux":
        status = parse_kib_lines(read_text(Path(f"/proc/{pid}/status")))
        if "VmRSS" not in status:  # gone, or a thread of the kernel
            return None
        dirty = status.get("RssAnon", 0) + status.get("RssShmem", 0) + status.get("VmSwap", 0)
        return Held(dirty, status["VmRSS"])
    memory = process_memory(pid)
    return None if memory is None else Held(memory.dirty_bytes, memory.resident_bytes)


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), PORT_LIMIT_S):
            return True
    except OSError:
        return False


def _busy_indexers() -> list[str]:
    """Indexers that took processor time just now."""
    if platform.system() == "Darwin":
        return parse_busy_indexers(_ps())
    import psutil

    found = [p for p in psutil.process_iter(["name"]) if p.info["name"] in INDEXERS]
    if not found:
        return []
    before = {process.pid: _cpu_s(process) for process in found}
    time.sleep(INDEXER_WINDOW_S)
    limit_s = INDEXER_BUSY * INDEXER_WINDOW_S
    return [p.info["name"] for p in found if _cpu_s(p) - before[p.pid] > limit_s]


def _cpu_s(process: object) -> float:
    import psutil

    assert isinstance(process, psutil.Process)
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)


def _ps() -> str:
    """`ps` may see root's processes on macOS, which psutil may not."""
    try:
        done = subprocess.run(
            ["/bin/ps", "-axo", "%cpu=,comm="],
            capture_output=True, text=True, timeout=1.5, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def parse_busy_indexers(text: str) -> list[str]:
    r"""Indexers with processor time, from lines of percent and command.

    Example:
        >>> parse_busy_indexers(" 41.2 /System/Library/mds_stores\n  0.0 /usr/libexec/mds\n")
        ['mds_stores']
    """
    found = []
    for line in text.splitlines():
        percent, _, command = line.strip().partition(" ")
        name = Path(command.strip()).name
        try:
            share = float(percent.replace(",", ".")) / 100
        except ValueError:
            continue
        if name in INDEXERS and share > INDEXER_BUSY:
            found.append(name)
    return found
