"""Running servers as files: found, told from strangers, and cleaned up."""

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from brim.cli.app import main
from brim.cli.state import ServerState, one_server, running_servers, write_state
from brim.errors import ConfigError


def test_a_written_state_is_found(own_directories: Path) -> None:
    """A server that announced itself is found with its address, and its file is private to us."""
    path = write_state("127.0.0.1", 4711, 30.0)
    assert [(s.pid, s.port, s.url) for s in running_servers()] == [
        (os.getpid(), 4711, "http://127.0.0.1:4711")
    ]
    assert one_server(None) == one_server(4711)
    assert path.parent == own_directories
    assert own_directories.stat().st_mode & 0o077 == 0


def test_a_stranger_with_the_same_pid_is_left_alone(
    own_directories: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A process that began at another time than the state says is not stopped; its file goes."""
    path = write_state("127.0.0.1", 4711, 30.0)
    state = msgspec.json.decode(path.read_bytes(), type=ServerState)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stranger:
        other = msgspec.structs.replace(
            state, pid=stranger.pid, started_unix_s=state.started_unix_s - 3600
        )
        path.write_bytes(msgspec.json.encode(other))
        assert main(["stop"]) == 1
        assert stranger.poll() is None
        stranger.kill()
    assert capsys.readouterr().err == "brim: no server is running; start one with: brim serve\n"
    assert not path.exists()


def test_damaged_state_files_are_passed_over(own_directories: Path) -> None:
    """A file that is no state does not hide the others."""
    write_state("127.0.0.1", 4711, 30.0)
    (own_directories / "server-1.json").write_text("{")
    assert len(running_servers()) == 1


def test_several_servers_need_a_port(own_directories: Path) -> None:
    """Where several servers run, the port must say which one is meant."""
    path = write_state("127.0.0.1", 1, 30.0)
    state = msgspec.json.decode(path.read_bytes(), type=ServerState)
    second = msgspec.json.encode(msgspec.structs.replace(state, port=2))
    (own_directories / "server-x.json").write_bytes(second)
    with pytest.raises(ConfigError, match="several servers are running; say which with --port"):
        one_server(None)
    assert one_server(2).port == 2
    with pytest.raises(ConfigError, match="no server is running on port 3"):
        one_server(3)


def test_a_directory_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the directory and what to set."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("brim.config.places.runtime_directory", lambda: tmp_path / "file" / "brim")
    with pytest.raises(ConfigError, match=r"file/brim cannot be written .* XDG_RUNTIME_DIR"):
        write_state("127.0.0.1", 1, 30.0)


@pytest.mark.parametrize(
    ("host", "url"),
    [("0.0.0.0", "http://127.0.0.1:1"), ("::", "http://[::1]:1"), ("box", "http://box:1")],
)
def test_url_reaches_the_server_from_here(host: str, url: str) -> None:
    """An address that means every interface is reached at the local one."""
    state = ServerState(pid=1, started_unix_s=0.0, host=host, port=1, drain_limit_s=1.0)
    assert state.url == url
