"""The lock on a state directory, and what a start cleans up."""

import os
import stat
from pathlib import Path

import msgspec
import pytest

from brim.cli.state import (
    LOCK_NAME,
    ServerState,
    clean_up,
    live_servers,
    locked_state,
    new_operator_token,
    running_servers,
    write_state,
)
from brim.config.places import state_directory
from brim.config.tree import ServerSettings, Settings
from brim.errors import ConfigError


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(server=ServerSettings(state_directory=str(tmp_path / "state")))


def test_one_holds_a_state_directory_at_a_time(settings: Settings, tmp_path: Path) -> None:
    """Whoever comes second is told who has it; when that one ends, the directory is free."""
    with locked_state(settings) as lock:
        assert lock.directory == tmp_path / "state"
        with pytest.raises(ConfigError, match=r"^another brim server uses the state directory"):
            locked_state(settings).__enter__()
        lock.note_port(4711)
        holder = rf"^a brim server \(pid {os.getpid()}, port 4711\) uses .*/state already; stop it"
        with pytest.raises(ConfigError, match=holder):
            locked_state(settings).__enter__()
    with locked_state(settings):
        pass


def test_a_state_directory_is_its_owners_alone(settings: Settings, tmp_path: Path) -> None:
    """It is made with mode 0700, and its lock with 0600."""
    with locked_state(settings):
        assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
        assert stat.S_IMODE((tmp_path / "state" / LOCK_NAME).stat().st_mode) == 0o600


def test_a_lock_is_no_way_to_write_elsewhere(settings: Settings, tmp_path: Path) -> None:
    """A link in its place is refused, and what it leads to stays as it is."""
    (tmp_path / "precious").write_text("text")
    (state_directory(settings) / LOCK_NAME).symlink_to(tmp_path / "precious")
    with pytest.raises(ConfigError, match="cannot be locked"):
        locked_state(settings).__enter__()
    assert (tmp_path / "precious").read_text() == "text"


def test_a_secret_is_never_in_a_file_that_others_can_read(own_directories: Path) -> None:
    """The token's file has mode 0600, whatever a killed process left under its name before."""
    own_directories.mkdir()
    left = own_directories / f"server-{os.getpid()}.new"
    left.touch(mode=0o666)
    left.chmod(0o666)
    token = new_operator_token()
    path = write_state("127.0.0.1", 1, 30.0, operator_token=token)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [server.operator_token for server in running_servers()] == [token]
    assert not left.exists()
    assert new_operator_token() != token


def test_looking_at_servers_removes_nothing(own_directories: Path) -> None:
    """The files of those that have ended stay until the next start cleans up."""
    path = write_state("127.0.0.1", 1, 30.0)
    state = msgspec.json.decode(path.read_bytes(), type=ServerState)
    gone = own_directories / "server-1.json"
    gone.write_bytes(msgspec.json.encode(msgspec.structs.replace(state, started_unix_s=1.0)))
    assert [server.pid for server in live_servers()] == [os.getpid()]
    assert gone.exists()
    assert clean_up(Settings()) == []
    assert not gone.exists()
    assert path.exists()
