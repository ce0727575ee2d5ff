"""A server of the comparison: reached where it runs, or started, killed and started again."""

import asyncio
import shlex
import time
from collections.abc import Sequence

import msgspec
import psutil

from brim.bench.client import Endpoint
from brim.bench.processes import ProcessTree, dirty_bytes, free_port, listeners, tree_below
from brim.bench.serve import Target, reach
from brim.errors import Busy, ConfigError
from brim.machine.interface import Machine

START_LIMIT_S = 300.0
"""For a server to load a model of many GB from a cold disk."""

POLL_S = 0.05
"""Between attempts to reach a server that is starting: what a start's time is known to."""

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


class ServerCommand(msgspec.Struct, frozen=True, kw_only=True):
    """A server that the harness starts itself."""

    name: str
    command: str
    """A command line in which `{port}` stands for the port."""

    @classmethod
    def parse(cls, text: str) -> "ServerCommand":
        """From `NAME=COMMAND`.

        Raises:
            ConfigError: It is not of that form, or no place for the port is in it.

        Example:
            >>> ServerCommand.parse("a=env X=1 serve --port {port}").arguments(80)[-1]
            '80'
        """
        name, _, command = text.partition("=")
        if not name.strip() or not command.strip():
            raise ConfigError(f"'{text}' is not a server; write NAME='COMMAND --port {{port}}'")
        if "{port}" not in command:
            raise ConfigError(f"the command of '{name}' has no {{port}} for the port to go into")
        found = cls(name=name.strip(), command=command)
        found.arguments(0)
        return found

    def arguments(self, port: int) -> list[str]:
        """The words of the command line with the port in place.

        Raises:
            ConfigError: A quote is not closed.
        """
        try:
            words = shlex.split(self.command)
        except ValueError as exc:
            raise ConfigError(f"the command of '{self.name}' cannot be read: {exc}") from exc
        return [word.replace("{port}", str(port)) for word in words]


class Server:
    """One server of the comparison; `open` before anything else, `close` at the end."""

    def __init__(self, source: Endpoint | ServerCommand, machine: Machine) -> None:
        self.name = source.name
        self._source = source
        self._machine = machine
        self._tree: ProcessTree | None = None
        self._target: Target | None = None
        self._listeners: list[int] = []

    @property
    def is_ours(self) -> bool:
        """Whether the harness starts it, and so may kill it."""
        return isinstance(self._source, ServerCommand)

    @property
    def target(self) -> Target:
        """The server as it was reached.

        Raises:
            ConfigError: It was not.
        """
        if self._target is None:
            raise ConfigError(f"'{self.name}' does not run")
        return self._target

    async def open(self) -> float:
        """Reach it, starting it first where it is ours and does not run; the seconds that took.

        Raises:
            ConfigError: It cannot be started, ended at its start, or nothing answers there.
            Busy: It answers and is not ready yet.
            InvalidRequest: It refuses a plain completion.
        """
        start_s = time.monotonic()
        if isinstance(self._source, Endpoint):
            await self._reach(self._source)
        elif self._tree is None or not self._tree.is_running:
            await self._start(self._source)
        return time.monotonic() - start_s

    async def kill(self) -> None:
        """SIGKILL its whole tree, and wait until it is gone."""
        assert self._tree is not None
        await asyncio.to_thread(self._tree.kill)
        self._target = None

    async def close(self) -> None:
        """Stop it where it is ours; safe whatever has become of it."""
        tree, self._tree, self._target = self._tree, None, None
        if tree is not None:
            await asyncio.to_thread(tree.stop)

    def dirty_bytes(self) -> int | None:
        """Memory of its processes; None where the system does not tell whose they are."""
        return dirty_bytes(self._processes(), self._machine)

    def own_pids(self) -> list[int]:
        """Its processes, so that their work is not taken for that of other programs."""
        return [process.pid for process in self._processes()]

    def _processes(self) -> list[psutil.Process]:
        if self._tree is not None:
            return self._tree.processes()
        return tree_below(self._listeners)

    async def _reach(self, endpoint: Endpoint) -> None:
        if self._target is None:
            self._target = await reach(endpoint)
            if endpoint.host in LOOPBACK:
                self._listeners = await asyncio.to_thread(listeners, endpoint.port)

    async def _start(self, command: ServerCommand) -> None:
        if self._tree is not None:
            await asyncio.to_thread(self._tree.stop)
        port = free_port()
        self._tree = ProcessTree(command.arguments(port))
        endpoint = Endpoint.parse(f"{self.name}=http://127.0.0.1:{port}")
        deadline_s, reason = time.monotonic() + START_LIMIT_S, ""
        while time.monotonic() < deadline_s:
            if not self._tree.is_running:
                raise ConfigError(f"'{self.name}' ended at its start: {self._tree.last_words()}")
            try:
                self._target = await reach(endpoint)
            except (ConfigError, Busy) as exc:
                reason = exc.message
            else:
                return
            await asyncio.sleep(POLL_S)
        raise ConfigError(
            f"'{self.name}' did not answer within {START_LIMIT_S:.0f} s: {reason}; "
            f"its last words: {self._tree.last_words()}"
        )


def check_sources(sources: Sequence[Endpoint | ServerCommand]) -> None:
    """Check what can be checked before anything is started.

    Raises:
        ConfigError: There are none, or two share a name.
    """
    if not sources:
        raise ConfigError("no server to measure; name one by --endpoint or --server")
    if len({source.name for source in sources}) < len(sources):
        raise ConfigError("two servers have the same name; give each its own")
