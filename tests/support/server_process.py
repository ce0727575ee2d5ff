"""A real `brim serve` process on a free port, for tests that speak HTTP."""

import contextlib
import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from brim.config.load import environment_name

START_LIMIT_S = 100.0

EXACT: dict[str, object] = {"models.exact_profile": True}
"""For tests that compare texts: what was reused moves logits by less than near ties differ by, and
by how much, and so which token wins, is the processor's."""


class ServerProcess:
    """`brim serve` with its own directories, so that it meets no other server of this machine.

    Args:
        directory: For everything that it keeps.
        arguments: After `brim serve`.
        settings: Key -> value, as `cache.budget_bytes`; those of this process's environment are
            left out.
        starter: A command line that ends by running what follows it, as of a control group.
    """

    def __init__(
        self,
        directory: Path,
        *arguments: str,
        settings: Mapping[str, object] | None = None,
        starter: Sequence[str] = (),
    ) -> None:
        directory.chmod(0o700)  # as a runtime directory must be
        names = ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR", "XDG_STATE_HOME")
        own = {name: str(directory) for name in names}
        kept = {k: v for k, v in os.environ.items() if not k.startswith("BRIM_")}
        given = {environment_name(key): str(value) for key, value in (settings or {}).items()}
        self.environment = {**kept, **own, **given}
        self.stderr = ""
        self.process = subprocess.Popen(
            [*starter, sys.executable, "-m", "brim", "serve", "--port", "0", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self.environment,
            text=True,
        )
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.stderr += line
            if "listening on" in line:
                self.port = int(line.rpartition(":")[2])
                return
        raise AssertionError(self.stderr)

    def __enter__(self) -> "ServerProcess":
        """Wait until it is ready; it is ended where it never is."""
        try:
            self.wait_ready()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.kill()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def brim(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Another command that finds this server."""
        return subprocess.run(
            [sys.executable, "-m", "brim", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=self.environment,
            text=True,
            timeout=60,
            check=False,
        )

    def ask(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """Status and JSON of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def ps(self) -> list[dict[str, Any]]:
        """What `/brim/ps` says of each model."""
        found: list[dict[str, Any]] = self.ask("GET", "/brim/ps")[1]
        return found

    def wait_ready(self) -> None:
        self.wait_until(lambda: self.ask("GET", "/health")[0] == 200)

    def wait_until(self, fact: Callable[[], bool]) -> None:
        """Poll for a fact that nothing announces."""
        deadline = time.monotonic() + START_LIMIT_S
        while not fact():
            assert time.monotonic() < deadline, f"not in time; the server said: {self.stderr}"
            assert self.process.poll() is None, "the server has ended"
            time.sleep(0.02)

    def end(self) -> int:
        """Wait for its end; the exit code."""
        _, rest = self.process.communicate(timeout=60)
        self.stderr += rest
        assert "Traceback" not in self.stderr
        return self.process.returncode

    def kill(self) -> None:
        """End it at once, and wait for the end of its workers; safe when it has ended."""
        workers = self._children()
        self.process.kill()
        self.process.communicate()
        psutil.wait_procs(workers, timeout=START_LIMIT_S)

    def _children(self) -> list[psutil.Process]:
        found: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            found = psutil.Process(self.process.pid).children(recursive=True)
        return found
