"""Sends a real server ten minutes of requests that are damaged in every way, in parallel.

    python benches/fuzz_server.py                       # ten minutes
    python benches/fuzz_server.py --seconds 20 --seed 7

`brim serve` runs with two models, two apps, a budget and a limit.  Against every route go bodies
made from its own OpenAPI description and then damaged, and against its port broken HTTP, slow
senders, readers that do not read, and clients that leave at any moment.  A finding is a 500, an
error of the engine, a complete request without a complete answer in time, a death of a worker or
of the server, a traceback, or growth of the gateway's memory or descriptors between two pauses,
the first after a warm-up.  Exit code 1 with findings.
"""

import argparse
import contextlib
import gc
import http.client
import json
import random
import socket
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).parent))

from fuzz_requests import Generator
from support.server_process import ServerProcess

from brim.apps.registry import FILE_NAME, Registry
from brim.core.app import App, Budgets, Limits

NUM_ATTACKERS = 6
"""More than the cores of the machine that this was written on, so that requests meet."""

HANG_S = 60.0
"""For the answer to a complete request: the longest that is asked for takes seconds, beside five
others on two cores."""

WARM_UP_PART = 0.25
"""Of the time: by then every module is imported and every pool has its size."""

MAX_WARM_UP_S = 60.0

SETTLE_S = 8.0
"""Longest that a pause waits for connections to be gone."""

MAX_GROWTH_BYTES = 16 << 20
"""Between the pauses: half a largest body, which the C library may keep in a heap of its own."""

MAX_GROWTH_DESCRIPTORS = 2
"""A database that was opened in between."""

NUM_SAMPLES_EACH = 10
"""Samples of memory for each that is reported: one every 20 s."""

FINE_STATUSES = frozenset({503, 507})
"""Above 499, and no failure of ours: full, or too large for the machine."""


class Findings:
    """What went wrong, and counts of what was answered; shared by the attackers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.found: list[str] = []
        self.slowest_s = 0.0
        self.resident_bytes: list[int] = []
        """Of the gateway, every two seconds of the attack."""

    def note(self, status: str, took_s: float = 0.0) -> None:
        """Count an answer."""
        with self._lock:
            self.counts[status] += 1
            self.slowest_s = max(self.slowest_s, took_s)

    def add(self, what: str, sent: bytes = b"") -> None:
        """Keep a finding with what led to it."""
        with self._lock:
            self.found.append(f"{what}: {sent[:600]!r}")


class Attacker(threading.Thread):
    """Sends one thing after the other until it is told to stop."""

    def __init__(self, port: int, generator: Generator, findings: Findings) -> None:
        super().__init__(daemon=True)
        self._port = port
        self._make = generator
        self._findings = findings
        self._is_over = threading.Event()

    def stop(self) -> None:
        """End after the exchange that is under way."""
        self._is_over.set()

    def run(self) -> None:
        """Attack."""
        ways = (
            [self._complete] * 12 + [self._broken] * 4 + [self._leave, self._dawdle, self._listen]
        )
        while not self._is_over.is_set():
            way = self._make.rng.choice(ways)
            try:
                way()
            except TimeoutError:
                self._findings.add(f"nothing happened for {HANG_S:g} s in {way.__name__}")
            except OSError:
                self._findings.note("connection closed")

    def _connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self._port), timeout=HANG_S)

    def _complete(self) -> None:
        """A whole request: it must get a whole answer."""
        path, sent = self._make.request()
        with self._connect() as sock:
            began_s = time.monotonic()
            try:
                sock.sendall(sent)
            except ConnectionError:
                pass  # refused before its end: the answer may be there all the same
            try:
                self._read(sock, sent, path, began_s)
            except TimeoutError:
                self._findings.add(f"no whole answer in {HANG_S:g} s", sent)

    def _read(self, sock: socket.socket, sent: bytes, path: str, began_s: float) -> None:
        response = http.client.HTTPResponse(sock, method=sent.split(b" ", 1)[0].decode("latin-1"))
        try:
            response.begin()
            is_endless = path.partition("?")[0].endswith("/events") and response.status == 200
            body = response.read(1) if is_endless else response.read()
        except (http.client.HTTPException, ValueError):
            self._findings.note("cut")
            return
        finally:
            response.close()
        self._findings.note(str(response.status), time.monotonic() - began_s)
        if response.status >= 500 and response.status not in FINE_STATUSES:
            self._findings.add(f"status {response.status} {body[:300]!r}", sent)
        if b'"code":"brim_error"' in body or b'"code":"engine_error"' in body:
            self._findings.add(f"an error of ours {body[-300:]!r}", sent)

    def _broken(self) -> None:
        """Bytes that may end anywhere: any answer or none will do, as long as it is no 500."""
        sent = self._make.broken()
        with self._connect() as sock:
            sock.sendall(sent)
            if self._make.rng.random() < 0.5:
                sock.shutdown(socket.SHUT_WR)
            sock.settimeout(0.3)
            with contextlib.suppress(TimeoutError):
                answer = sock.recv(4096)
                self._findings.note(f"broken {answer[9:12].decode('latin-1') or 'closed'}")
                if answer[9:12] in (b"500", b"501", b"502"):
                    self._findings.add("a 500 for broken HTTP", sent)

    def _leave(self) -> None:
        """Send some or all, and be gone at once, with or without a word."""
        _, sent = self._make.request()
        with self._connect() as sock:
            sock.sendall(sent[: self._make.rng.randint(0, len(sent))])
            if self._make.rng.random() < 0.5:
                # Close with a reset instead of an end.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._findings.note("left")

    def _dawdle(self) -> None:
        """Send slowly, and do not read what comes."""
        _, sent = self._make.request()
        with self._connect() as sock:
            for start in range(0, min(len(sent), 2000), 100):
                sock.sendall(sent[start : start + 100])
                self._is_over.wait(self._make.rng.uniform(0, 0.05))
            self._is_over.wait(0.5)
        self._findings.note("dawdled")

    def _listen(self) -> None:
        """Hold an event stream for a moment."""
        path = self._make.rng.choice(("/brim/events", "/brim/v1/events", "/brim/v1/events?since=x"))
        with self._connect() as sock:
            sock.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            answer = sock.recv(4096)
            self._is_over.wait(self._make.rng.uniform(0, 2))
        self._findings.note(f"listened {answer[9:12].decode('latin-1')}")


class Watched:
    """The gateway as its system sees it."""

    def __init__(self, server: ServerProcess) -> None:
        self._server = server
        self._process = psutil.Process(server.process.pid)

    def settled(self) -> tuple[int, int]:
        """Resident bytes and descriptors, once connections are closed."""
        deadline_s = time.monotonic() + SETTLE_S
        while self._is_connected() and time.monotonic() < deadline_s:
            time.sleep(0.2)
        time.sleep(1.0)  # for what follows the end of a connection
        return self._process.memory_info().rss, self._process.num_fds()

    def resident_bytes(self) -> int:
        """As it is now, requests in work included."""
        return int(self._process.memory_info().rss)

    def _is_connected(self) -> bool:
        found = self._process.net_connections("tcp")
        return any(each.status != psutil.CONN_LISTEN for each in found)


def attack(
    server: ServerProcess, document: dict[str, Any], keys: list[str], seed: int, seconds: float,
    findings: Findings, watched: "Watched",
) -> None:  # fmt: skip
    """Run the attackers for a while."""
    models = [each["name"] for each in server.ps()]
    attackers = [
        Attacker(
            server.port,
            Generator(random.Random(f"{seed}-{number}"), document, models, keys),
            findings,
        )
        for number in range(NUM_ATTACKERS)
    ]
    for attacker in attackers:
        attacker.start()
    deadline_s = time.monotonic() + seconds
    while time.monotonic() < deadline_s and server.process.poll() is None:
        began_s = time.monotonic()
        with contextlib.suppress(OSError, ValueError):
            server.ask("GET", "/health")
            findings.note("health", time.monotonic() - began_s)
        findings.resident_bytes.append(watched.resident_bytes())
        time.sleep(min(2.0, max(0.0, deadline_s - time.monotonic())))
    for attacker in attackers:
        attacker.stop()
    for attacker in attackers:
        attacker.join(2 * HANG_S)
        if attacker.is_alive():
            findings.add("an attacker did not come back")
    gc.collect()


def add_apps(directory: Path) -> list[str]:
    """Keys of an app without bounds and one with some, and two that nobody has."""
    registry = Registry(directory / FILE_NAME)
    bounded = App(
        name="bounded",
        models=("small",),
        budgets=Budgets(tokens=20_000),
        limits=Limits(requests_per_minute=120, max_concurrent=2, memory_share=0.5),
    )
    keys = [registry.add(App(name="free"), ""), registry.add(bounded, "")]
    registry.close()
    return [*keys, "brim-nobody", "sk-none", "\xff", "brim-" + "x" * 5000]


def fuzz(seconds: float, seed: int, models: list[str]) -> dict[str, Any]:
    """One run; what it found and measured."""
    findings = Findings()
    with tempfile.TemporaryDirectory(prefix="brim-fuzz-") as name:
        directory = Path(name)
        keys = add_apps(directory)
        settings = {
            "server.state_directory": directory,
            "server.allowed_origins": "https://app.example",
            "cache.free_disk_floor_bytes": 0,
        }
        arguments = [part for model in models for part in ("-m", model)]
        with ServerProcess(directory, *arguments, "--ctx", "256", settings=settings) as server:
            words: list[str] = []
            # Read all the time: a server whose stderr is full would wait for us.
            threading.Thread(target=_keep, args=(server, words), daemon=True).start()
            document = server.ask("GET", "/openapi.json")[1]
            watched = Watched(server)
            warm_up_s = min(WARM_UP_PART * seconds, MAX_WARM_UP_S)
            attack(server, document, keys, seed, warm_up_s, findings, watched)
            before = watched.settled()
            attack(server, document, keys, seed + 1, seconds - warm_up_s, findings, watched)
            after = watched.settled()
            deaths = sum(each["num_deaths"] for each in server.ps())
            health = server.ask("GET", "/health")
            server.process.terminate()
            code = server.process.wait(60)
    _judge(findings, before, after, deaths, health, code, "".join(words))
    return {
        "seconds": seconds,
        "seed": seed,
        "answers": dict(sorted(findings.counts.items())),
        "num_sent": findings.counts.total(),
        "slowest_s": round(findings.slowest_s, 2),
        "resident_bytes": {"before": before[0], "after": after[0]},
        "resident_bytes_over_time": findings.resident_bytes[::NUM_SAMPLES_EACH],
        "descriptors": {"before": before[1], "after": after[1]},
        "findings": findings.found,
    }


def _keep(server: ServerProcess, words: list[str]) -> None:
    assert server.process.stderr is not None
    words.extend(server.process.stderr)


def _judge(
    findings: Findings, before: tuple[int, int], after: tuple[int, int], num_deaths: int,
    health: tuple[int, Any], code: int, stderr: str,
) -> None:  # fmt: skip
    if after[0] - before[0] > MAX_GROWTH_BYTES:
        findings.add(f"memory grew by {after[0] - before[0]} bytes")
    if after[1] - before[1] > MAX_GROWTH_DESCRIPTORS:
        findings.add(f"{after[1] - before[1]} more descriptors are open")
    if num_deaths:
        findings.add(f"workers died {num_deaths} times")
    if health != (200, {"status": "ok"}):
        findings.add(f"/health says {health}")
    if code != 0:
        findings.add(f"the server ended with {code}")
    for sign in ("Traceback", "unexpected failure", "Exception in ASGI"):
        if sign in stderr:
            findings.add(f"'{sign}' on stderr", stderr[stderr.index(sign) :].encode())


def main() -> int:
    """Run, print a report, say whether anything was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--model", action="append", help="NAME=REF as for brim serve; small=toy and chat=demo"
    )
    options = parser.parse_args()
    report = fuzz(options.seconds, options.seed, options.model or ["small=toy", "chat=demo"])
    print(json.dumps(report, indent=1))
    return 1 if report["findings"] else 0


if __name__ == "__main__":
    sys.exit(main())
