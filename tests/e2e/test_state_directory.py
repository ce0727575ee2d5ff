"""One server for each state directory: a second is refused, and a dead one keeps nobody out."""

import json
import os
import signal
import stat
from pathlib import Path

from support.server_process import ServerProcess


def test_a_second_server_on_one_state_directory_is_refused(tmp_path: Path) -> None:
    """In one sentence with the first one's pid and port and the ways out; its own directory is."""
    with ServerProcess(tmp_path, "-m", "toy") as first:
        refused = first.brim("serve", "--port", "0", "-m", "toy")
        assert refused.returncode == 1
        assert refused.stderr == (
            f"brim: a brim server (pid {first.process.pid}, port {first.port}) uses the state "
            f"directory {tmp_path / 'brim'} already; stop it with: brim stop, or give this one a "
            "directory of its own with --state-dir or BRIM_SERVER_STATE_DIRECTORY\n"
        )
        own = {"server.state_directory": tmp_path / "second"}
        with ServerProcess(tmp_path, "-m", "toy", settings=own):
            assert (tmp_path / "second" / "serve.lock").exists()


def test_the_lock_of_a_killed_server_keeps_nobody_out(tmp_path: Path) -> None:
    """The kernel lets go of it; the file that is left behind does not count."""
    with ServerProcess(tmp_path, "-m", "toy") as first:
        os.kill(first.process.pid, signal.SIGKILL)
        first.process.wait()
    assert (tmp_path / "brim" / "serve.lock").exists()
    with ServerProcess(tmp_path, "-m", "toy") as second:
        assert second.ask("GET", "/health")[0] == 200


def test_what_a_server_says_of_itself_is_its_users_alone(tmp_path: Path) -> None:
    """Its state file has a token that commands show it, and nobody else may read it."""
    with ServerProcess(tmp_path, "-m", "toy") as server:
        [path] = tmp_path.rglob("server-*.json")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        said = json.loads(path.read_bytes())
        assert len(said["operator_token"]) >= 32
        assert said["state_directory"] == str(tmp_path / "brim")
        assert server.brim("ps").returncode == 0
        assert server.brim("stop").returncode == 0
    assert not list(tmp_path.rglob("server-*.json"))


def test_a_state_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """The start ends with one sentence that names the setting."""
    (tmp_path / "file").write_text("")
    with ServerProcess(tmp_path, "-m", "toy") as server:
        refused = server.brim("serve", "--state-dir", str(tmp_path / "file" / "state"))
        assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
        assert "file/state cannot be made" in refused.stderr
        assert "server.state_directory" in refused.stderr
