"""Running servers as files, so that `ps` and `stop` find them and never touch a stranger.

One JSON file for each server in the platform's runtime directory.  A process id alone may have been
given out again; together with the time at which the process began it names one process for good.
"""

import os
import warnings
from pathlib import Path

import msgspec

from brim.errors import ConfigError

SAME_START_S = 2.0
"""The kernel counts ticks since boot; turned into a time of day it may move with the clock."""


class ServerState(msgspec.Struct, frozen=True, kw_only=True):
    """One running server."""

    pid: int
    started_unix_s: float
    """When the process began, by the system."""
    host: str
    port: int
    drain_limit_s: float
    """How long it lets running answers finish when it is stopped."""

    @property
    def url(self) -> str:
        """Where to reach it from this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    def is_running(self) -> bool:
        """Whether the very process that wrote this is still there."""
        started = _start_time(self.pid)
        return started is not None and abs(started - self.started_unix_s) < SAME_START_S


def state_directory() -> Path:
    """Where the files lie; made by `write_state`.

    Raises:
        ConfigError: There is no directory that is ours alone.
    """
    import platformdirs

    with warnings.catch_warnings():
        # It warns where XDG_RUNTIME_DIR is open to others, and then takes another directory.
        warnings.simplefilter("ignore")
        try:
            return platformdirs.user_runtime_path("brim", appauthor=False)
        except OSError as exc:
            raise ConfigError(f"no place for the state of running servers: {exc}") from exc


def write_state(host: str, port: int, drain_limit_s: float) -> Path:
    """Announce this process as a server; remove the file when it ends.

    Raises:
        ConfigError: The directory cannot be written.
    """
    state = ServerState(
        pid=os.getpid(),
        started_unix_s=_start_time(os.getpid()) or 0.0,
        host=host,
        port=port,
        drain_limit_s=drain_limit_s,
    )
    path = state_directory() / f"server-{state.pid}.json"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.encode(state))
    except OSError as exc:
        raise ConfigError(
            f"{path.parent} cannot be written ({exc.strerror}); brim keeps there which servers "
            "run: set XDG_RUNTIME_DIR to a directory of yours"
        ) from exc
    return path


def running_servers() -> list[ServerState]:
    """Servers that run now, oldest first; files of others are removed."""
    found = []
    for path in state_directory().glob("server-*.json"):
        try:
            state = msgspec.json.decode(path.read_bytes(), type=ServerState)
        except (OSError, msgspec.DecodeError):
            continue
        if state.is_running():
            found.append(state)
        else:
            path.unlink(missing_ok=True)
    return sorted(found, key=lambda state: state.started_unix_s)


def one_server(port: int | None) -> ServerState:
    """The running server, or the one of several that listens on `port`.

    Raises:
        ConfigError: There is none, or the port has to say which.
    """
    servers = [server for server in running_servers() if port in (None, server.port)]
    if not servers:
        where = "" if port is None else f" on port {port}"
        raise ConfigError(f"no server is running{where}; start one with: brim serve")
    if len(servers) > 1:
        ports = ", ".join(str(server.port) for server in servers)
        raise ConfigError(f"several servers are running; say which with --port: {ports}")
    return servers[0]


def _start_time(pid: int) -> float | None:
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None
