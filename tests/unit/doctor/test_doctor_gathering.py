"""What is gathered: in bounded time, whatever hangs or fails, and in other programs' words."""

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.doctor_facts import GIB, MAC
from support.models import plan_for

from brim.config.tree import ServerSettings, Settings
from brim.doctor import builds, crashes, folders, state_files
from brim.doctor import gather as gathering
from brim.doctor.facts import ServedModel
from brim.doctor.gather import gather
from brim.doctor.processes import Held, Running, survey
from brim.errors import ConfigError
from brim.registry.sources import DEMO_PATH


@pytest.fixture
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """No directory of whoever runs the tests."""
    monkeypatch.setattr("brim.config.places.runtime_directory", lambda: tmp_path / "run")
    return Settings(server=ServerSettings(state_directory=str(tmp_path)))


def test_a_question_that_hangs_holds_nobody_up() -> None:
    """The others are answered, and that it hangs is said."""
    never = threading.Event()
    asked: dict[str, Callable[[], Any]] = {"machine": lambda: MAC, "conditions": never.wait}
    facts = gather(asked, limit_s=60.0, limits_s={"conditions": 0.05})
    assert facts.machine == MAC
    assert facts.conditions is None
    assert facts.unread["conditions"] == "no answer within 0.05 s"
    assert facts.unread["stale"] == "nobody was asked"
    never.set()


def test_a_question_that_fails_costs_no_other_answer() -> None:
    """A refusal is quoted, and a defect named."""

    def refuses() -> None:
        raise ConfigError("no such directory; make it")

    def breaks() -> None:
        raise ZeroDivisionError("by zero")

    facts = gather({"machine": lambda: MAC, "cache": refuses, "stale": breaks})
    assert facts.machine == MAC
    assert facts.unread["cache"] == "no such directory; make it"
    assert facts.unread["stale"] == "ZeroDivisionError: by zero"


CHROME = "/Applications/Google Chrome.app/Contents/Frameworks/Helper.app/Contents/MacOS/Helper"

RUNNING = [
    Running(1, "Helper", CHROME, (CHROME,)),
    Running(2, "Helper", CHROME, (CHROME,)),
    Running(3, "ollama", "/usr/local/bin/ollama", ("ollama", "serve")),
    Running(4, "ollama", "/usr/local/bin/ollama", ("ollama", "runner", "--port", "4")),
    Running(5, "llama-server", "/opt/llama-server", ("llama-server", "-m", "x.gguf")),
    Running(6, "python3.11", "/usr/bin/python3.11", ("python3", "-m", "mlx_lm.server")),
    Running(7, "python3.11", "/usr/bin/python3.11", ("python3", "-P", "-m", "brim.worker")),
    Running(8, "python3.11", "/usr/bin/python3.11", ("python3", "/venv/bin/brim", "serve")),
    Running(9, "python3.11", "/usr/bin/python3.11", ("python3", "eval.py", "--model", "exo")),
    Running(10, "gone", "/bin/gone", ("gone",)),
    Running(11, "small", "/bin/small", ("small",)),
]

HELD = {
    1: Held(2 * GIB, 3 * GIB), 2: Held(GIB, GIB), 3: Held(GIB // 8, GIB // 8),
    4: Held(GIB, 9 * GIB), 5: Held(GIB // 4, 5 * GIB), 6: Held(4 * GIB, 4 * GIB),
    7: Held(2 * GIB, 2 * GIB), 8: Held(GIB, GIB), 9: Held(GIB // 2, GIB // 2), 11: Held(1, 1),
}  # fmt: skip


def test_processes_are_summed_by_program_and_servers_are_known() -> None:
    """Helpers count as their app, brim's own as nobody's, a model's name is no server."""
    found = survey(RUNNING, HELD.get, lambda port: False)
    assert [(p.name, p.num_processes, p.dirty_bytes) for p in found.programs[:2]] == [
        ("python mlx_lm.server", 1, 4 * GIB),
        ("Google Chrome.app", 2, 3 * GIB),
    ]
    assert "small" not in {program.name for program in found.programs}
    assert "python eval.py" in {program.name for program in found.programs}
    assert found.own_bytes == 3 * GIB
    servers = {server.name: server for server in found.other_servers}
    assert set(servers) == {"Ollama", "llama-server", "mlx_lm.server"}
    assert (servers["Ollama"].pid, servers["Ollama"].held_bytes) == (4, 9 * GIB + GIB // 8)
    assert servers["llama-server"].stop == "kill 5"


def test_a_server_that_only_its_port_gives_away_is_found() -> None:
    """Such as another user's, whose processes we may not look into; a known one is not doubled."""
    found = survey([], HELD.get, lambda port: port == 11434)
    [server] = found.other_servers
    assert (server.name, server.pid) == ("something on Ollama's port 11434", None)
    found = survey(RUNNING[2:3], HELD.get, lambda port: port == 11434)
    assert [server.name for server in found.other_servers] == ["Ollama"]


def test_the_rate_of_a_disk_is_measured_past_the_page_cache(tmp_path: Path) -> None:
    """A file of 16 MB and more gives a figure, or none where the system has no such reads."""
    path = tmp_path / "model.gguf"
    path.write_bytes(bytes(folders.MIN_READ_BYTES - 1))
    assert folders.read_rate(path) is None
    path.write_bytes(bytes(folders.MIN_READ_BYTES))
    rate = folders.read_rate(path)
    assert rate is None or rate > 0
    assert folders.read_rate(tmp_path / "missing") is None


def test_folders_of_models_are_looked_at_once(tmp_path: Path) -> None:
    """By their largest file, links followed; what is gone is left out."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "models").mkdir()
    (tmp_path / "blobs" / "x").write_bytes(b"x" * 100)
    (tmp_path / "models" / "a.gguf").symlink_to(tmp_path / "blobs" / "x")
    (tmp_path / "models" / "b.gguf").write_bytes(b"y")
    paths = [tmp_path / "models" / name for name in ("a.gguf", "b.gguf", "gone.gguf")]
    [folder] = folders.read_folders(paths)
    assert folder.path == str(tmp_path / "models")
    assert folder.file_system


@pytest.mark.parametrize(
    ("name", "is_hidden"),
    [("models", False), (".cache/models", True), ("models.noindex/a", True), ("marked/a", True)],
)
def test_search_passes_over_folders_that_are_marked(
    tmp_path: Path, name: str, is_hidden: bool
) -> None:
    """By a dot, a suffix or a file, in the folder itself or above."""
    folder = tmp_path / name
    folder.mkdir(parents=True)
    if name.startswith("marked"):
        (tmp_path / "marked" / folders.NEVER_INDEX).touch()
    assert folders.is_hidden_from_search(folder) is is_hidden


PANIC = 'panic(cpu 3 caller 0xfffffe): "completeMemory() prepare count underflow" @IOGPUMemory.cpp'


def test_panics_are_sorted_by_their_reason(tmp_path: Path) -> None:
    """Those of the GPU's memory apart, newest first, and none that is older than a month."""
    now = 1e9
    for name, text, age_s in (
        ("panic-full-1.panic", PANIC, 86_400),
        ("panic-full-2.panic", PANIC, 3_600),
        ("panic-full-3.panic", "panic: watchdog timeout", 60),
        ("panic-full-4.panic", PANIC, 90 * 86_400),
        ("other.ips", PANIC, 60),
    ):
        (tmp_path / name).write_text(text)
        os.utime(tmp_path / name, (now - age_s, now - age_s))
    gpu, other = crashes.read_panics(tmp_path, now)
    assert gpu == ("panic-full-2.panic", "panic-full-1.panic")
    assert other == ("panic-full-3.panic",)


@pytest.mark.parametrize("version", [1, 2])
def test_kills_are_counted_by_our_group(tmp_path: Path, version: int) -> None:
    """In either version of control groups; none is known where there is no such file."""
    proc, group = tmp_path / "proc/self", tmp_path / "cg/box"
    proc.mkdir(parents=True)
    group.mkdir(parents=True)
    kind = "cgroup2 cgroup rw" if version == 2 else "cgroup cgroup rw,memory"
    (proc / "mountinfo").write_text(f"1 0 0:1 / /cg rw - {kind}\n")
    (proc / "cgroup").write_text("0::/box\n" if version == 2 else "4:memory:/box\n")
    assert crashes.oom_kills(tmp_path) is None
    name = "memory.events" if version == 2 else "memory.oom_control"
    (group / name).write_text("low 0\noom_kill 3\n")
    assert crashes.oom_kills(tmp_path) == 3


def test_modes_are_read_and_shielded_by_their_directory(tmp_path: Path) -> None:
    """A file in a directory that others cannot enter is safe whatever its mode."""
    for name, mode in (("private", 0o700), ("open", 0o755)):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(mode)
        (tmp_path / name / "apps.sqlite").touch(mode=0o644)
    found = state_files.read_permissions([tmp_path / "private", tmp_path / "open", tmp_path / "no"])
    secrets = {Path(p.path).parent.name: p for p in found if p.is_secret}
    assert secrets["private"].is_shielded
    assert not secrets["open"].is_shielded
    assert {p.mode for p in found if p.is_directory} == {0o700, 0o755}
    assert all(p.is_own and p.is_writable for p in found)


def test_what_was_left_behind_is_found(tmp_path: Path, own_places: Settings) -> None:
    """Files of dead servers, notes about nobody, writes that were cut off, what was put aside."""
    (tmp_path / "run" / "workers").mkdir(parents=True)
    (tmp_path / "run" / "workers" / "1.json").write_text("{")
    for name in ("fresh.new", "old.new", "forecasts.sqlite.damaged"):
        (tmp_path / name).touch()
    os.utime(tmp_path / "old.new", (1.0, 1.0))
    dead = tmp_path / "run" / "server-1.json"
    found = state_files.read_stale([tmp_path, tmp_path], own_places, [dead])
    assert [Path(path).name for path in found.files] == ["server-1.json", "1.json", "old.new"]
    assert found.damaged == (str(tmp_path / "forecasts.sqlite.damaged"),)
    assert found.orphans == ()


def test_processors_say_what_they_can_do() -> None:
    """By the flags of x86 and the features of ARM; nothing where neither is said."""
    assert builds.parse_cpuinfo("Features\t: fp asimd asimddp i8mm\n")[-1] == "i8mm"
    assert builds.parse_cpuinfo("processor : 0\n") == ()


def test_the_demo_lies_in_no_folder_of_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody could put its file elsewhere; those of other models that are served are looked at."""
    mine = Path(shutil.copy(DEMO_PATH, tmp_path / "mine.gguf"))
    monkeypatch.setattr(gathering, "list_local", list)
    plans = [plan_for("llamacpp", path=path) for path in (DEMO_PATH, mine)]
    found = gathering._model_files(lambda: [ServedModel(plan=plan) for plan in plans])
    assert found == [str(mine)]
