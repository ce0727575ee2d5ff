"""Running servers as files, so that `ps` and `stop` find them and never touch a stranger.

One JSON file for each server in the platform's runtime directory.  A process id alone may have been
given out again; together with the time at which the process began it names one process for good.

A lock on the state directory keeps two servers from sharing apps, budgets and events.  The kernel
lets it go with the process that holds it, however that ends.
"""

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import msgspec

from brim.config import places
from brim.config.tree import Settings
from brim.errors import ConfigError
from brim.ledger.processes import is_running, start_time
from brim.runtime.leftovers import remove_leftovers
from brim.runtime.orphans import end_orphans

TOKEN_BYTES = 32
"""Of the operator's token: nobody guesses 256 bits."""

LOCK_NAME = "serve.lock"

MAX_LOCK_BYTES = 4096
"""A lock says who holds it in a hundred."""


class ServerState(msgspec.Struct, frozen=True, kw_only=True):
    """One running server."""

    pid: int
    started_unix_s: float
    """When the process began, by the system."""
    host: str
    port: int
    drain_limit_s: float
    """How long it lets running answers finish when it is stopped."""
    operator_token: str = ""
    """What commands of this user show the server, which has no other way to know them by."""
    state_directory: str = ""

    @property
    def url(self) -> str:
        """Where to reach it from this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    def is_running(self) -> bool:
        """Whether the very process that wrote this is still there."""
        return is_running(self.pid, self.started_unix_s)


class _Holder(msgspec.Struct, frozen=True, kw_only=True):
    """Who holds the lock of a state directory."""

    pid: int
    port: int


def new_operator_token() -> str:
    """A secret that only this server and commands of its user know."""
    return secrets.token_urlsafe(TOKEN_BYTES)


def write_state(
    host: str,
    port: int,
    drain_limit_s: float,
    *,
    operator_token: str = "",
    directory: Path | None = None,
) -> Path:
    """Announce this process as a server; remove the file when it ends.

    Args:
        host: The address it listens on.
        port: The port.
        drain_limit_s: How long it lets running answers finish.
        operator_token: What it takes commands of this user by.
        directory: Its state directory.

    Raises:
        ConfigError: The directory cannot be written.
    """
    state = ServerState(
        pid=os.getpid(),
        started_unix_s=start_time(os.getpid()) or 0.0,
        host=host,
        port=port,
        drain_limit_s=drain_limit_s,
        operator_token=operator_token,
        state_directory="" if directory is None else str(directory),
    )
    path = places.runtime_directory() / f"server-{state.pid}.json"
    try:
        path.parent.mkdir(mode=places.OWNER_ONLY, parents=True, exist_ok=True)
        _write_private(path, msgspec.json.encode(state))
    except OSError as exc:
        raise ConfigError(
            f"{path.parent} cannot be written ({exc.strerror}); brim keeps there which servers "
            "run: set XDG_RUNTIME_DIR to a directory of yours"
        ) from exc
    return path


def running_servers() -> list[ServerState]:
    """Servers that run now, oldest first; files of others are removed."""
    for path in stale_files():
        path.unlink(missing_ok=True)
    return live_servers()


def live_servers() -> list[ServerState]:
    """Servers that run now, oldest first; nothing is removed."""
    found = [state for _, state in _states() if state.is_running()]
    return sorted(found, key=lambda state: state.started_unix_s)


def stale_files() -> list[Path]:
    """Files of servers that run no more."""
    return [path for path, state in _states() if not state.is_running()]


def clean_up(settings: Settings) -> list[str]:
    """End workers and remove files that killed servers left behind; only ours.

    Args:
        settings: Which state directory.

    Returns:
        What was done, in sentences.

    Raises:
        ConfigError: There is no runtime directory that is ours alone.
    """
    done = []
    if ended := end_orphans():
        pids = ", ".join(str(pid) for pid in ended)
        done.append(f"ended what a server left behind when it was killed: worker {pids}")
    for path in stale_files():
        path.unlink(missing_ok=True)
    if num_removed := remove_leftovers(settings):
        done.append(f"removed {num_removed} temporary files of writes that were cut off")
    return done


def _states() -> list[tuple[Path, ServerState]]:
    """Every file that can be read as a server's."""
    found = []
    for path in sorted(places.runtime_directory().glob("server-*.json")):
        try:
            found.append((path, msgspec.json.decode(path.read_bytes(), type=ServerState)))
        except (OSError, msgspec.MsgspecError):
            continue
    return found


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


class StateLock:
    """A state directory that is this server's alone; `locked_state` gives it."""

    def __init__(self, directory: Path, descriptor: int) -> None:
        self.directory = directory
        self._descriptor = descriptor

    def note_port(self, port: int) -> None:
        """Say where the server listens, for whoever is refused."""
        data = msgspec.json.encode(_Holder(pid=os.getpid(), port=port))
        # It is for a message alone: on a full disk the lock holds all the same.
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, data, 0)


@contextlib.contextmanager
def locked_state(settings: Settings) -> Iterator[StateLock]:
    """Hold the state directory that the settings name for this server alone.

    Raises:
        ConfigError: Another server holds it, or it cannot be used.
    """
    directory = places.state_directory(settings)
    descriptor = _locked(directory / LOCK_NAME)
    try:
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)  # what the last holder wrote is not true of us
        yield StateLock(directory, descriptor)
    finally:
        # The file stays: a lock on one that was removed would keep nobody out.
        os.close(descriptor)


def _locked(path: Path) -> int:
    """A descriptor with the lock.

    Raises:
        ConfigError: Another process has it, or the file cannot be made or locked.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as exc:
        raise _unusable(path, exc) from exc
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _holder(descriptor)
        os.close(descriptor)
        raise ConfigError(
            f"{holder} uses the state directory {path.parent} already; stop it with: brim stop, or "
            "give this one a directory of its own with --state-dir or BRIM_SERVER_STATE_DIRECTORY",
            param="server.state_directory",
        ) from None
    except OSError as exc:
        os.close(descriptor)
        raise _unusable(path, exc) from exc
    return descriptor


def _unusable(path: Path, exc: OSError) -> ConfigError:
    return ConfigError(
        f"{path} cannot be locked ({exc.strerror}); name a state directory of yours on a local "
        "disk with --state-dir or BRIM_SERVER_STATE_DIRECTORY",
        param="server.state_directory",
    )


def _holder(descriptor: int) -> str:
    """Whoever has the lock, as far as it says."""
    try:
        holder = msgspec.json.decode(os.pread(descriptor, MAX_LOCK_BYTES, 0), type=_Holder)
    except (OSError, msgspec.MsgspecError):  # it is just starting
        return "another brim server"
    return f"a brim server (pid {holder.pid}, port {holder.port})"


def _write_private(path: Path, data: bytes) -> None:
    """Write a file that only its owner may read, in one step: it holds a secret."""
    scratch = path.with_suffix(".new")
    scratch.unlink(missing_ok=True)  # one of a process that was killed may be open to others
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    scratch.replace(path)
