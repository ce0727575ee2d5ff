"""Sends a real server ten minutes of requests that are damaged in every way, in parallel.

    python benches/fuzz_server.py                       # ten minutes
    python benches/fuzz_server.py --seconds 20 --seed 7

`brim serve` runs with two models, two apps, a budget and a limit.  Against every route go bodies
made from its own OpenAPI description and then damaged, and against its port broken HTTP, slow
senders, readers that do not read, and clients that leave at any moment.  A finding is a 500, an
error of the engine, a complete request without a complete answer in time, a death of a worker or
of the server, a traceback, or growth of the gateway's memory or descriptors.  Exit code 1 with
findings.

Growth is what the gateway holds more at the end than in the middle, both times with nobody
connected, after a warm-up that has sent every kind of request: see `growth_of`.
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec

import psutil

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).parent))

from fuzz_requests import Generator
from support.server_process import ServerProcess

from brim.apps.registry import FILE_NAME, Registry
from brim.core.app import App, Budgets, Limits

P = ParamSpec("P")

NUM_ATTACKERS = 6
"""More than the cores of the machine that this was written on, so that requests meet."""

HANG_S = 60.0
"""For the answer to a complete request: the longest that is asked for takes seconds, beside five
others on two cores."""

WARM_UP_PART = 0.25
"""Of the time, beside one request of every kind: by then every module is imported, and memory is
once as large as what comes later makes it."""

MAX_WARM_UP_S = 60.0

NUM_PARTS = 8
"""Of the time after the warm-up, with a pause after each: half of them before the middle."""

SETTLE_S = 8.0
"""Longest that a pause waits for connections to be gone."""

MAX_GROWTH_BYTES = 2 << 20
"""From the middle to the end: 110 bytes for each of the 19,000 requests of five minutes.  Pauses
differ by one of the interpreter's pools of 1 MiB, or by 1 MiB of the heap's end, one way or the
other."""

MIN_JUDGED_S = 120.0
"""Of a second half, for its growth to be judged: 2 MiB are nothing against the noise of less."""

MAX_SHORT_GROWTH_BYTES = 12 << 20
"""From the warm-up to the end of a run that is shorter, whose warm-up is short as well: the objects
of one body, once in each state that the interpreter's pools can be in."""

MAX_GROWTH_DESCRIPTORS = 2
"""A database that was opened in between."""

FINE_STATUSES = frozenset({503, 507})
"""Above 499, and no failure of ours: full, or too large for the machine."""


class Findings:
    """What went wrong, and counts of what was answered; shared by the attackers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.found: list[str] = []
        self.slowest_s = 0.0
        self.most_resident_bytes = 0
        """Of the gateway, looked at every two seconds of the attack."""

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
    """Sends one thing after the other until it is told to stop.

    Args:
        port: Of the server.
        generator: Makes what is sent.
        findings: Where it is noted what came back.
        sends_every_kind: First of all, whether or not it is told to stop.
    """

    def __init__(
        self, port: int, generator: Generator, findings: Findings, *, sends_every_kind: bool
    ) -> None:
        super().__init__(daemon=True)
        self._port = port
        self._make = generator
        self._findings = findings
        self._sends_every_kind = sends_every_kind
        self._is_over = threading.Event()

    def stop(self) -> None:
        """End after the exchange that is under way."""
        self._is_over.set()

    def run(self) -> None:
        """Attack."""
        ways = (
            [self._complete] * 12 + [self._broken] * 4 + [self._leave, self._dawdle, self._listen]
        )
        if self._sends_every_kind:
            for path, sent in self._make.every_kind():
                self._try(self._exchange, path, sent)
            for sent in self._make.every_break():
                self._try(self._break, sent)
            for way in ways[-3:]:
                self._try(way)
        while not self._is_over.is_set():
            self._try(self._make.rng.choice(ways))

    def _try(self, way: Callable[P, None], *arguments: P.args, **named: P.kwargs) -> None:
        try:
            way(*arguments, **named)
        except TimeoutError:
            self._findings.add(f"nothing happened for {HANG_S:g} s in {way.__name__}")
        except OSError:
            self._findings.note("connection closed")

    def _connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self._port), timeout=HANG_S)

    def _complete(self) -> None:
        """A whole request, drawn."""
        self._exchange(*self._make.request())

    def _exchange(self, path: str, sent: bytes) -> None:
        """A whole request: it must get a whole answer."""
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
        """Broken HTTP, drawn."""
        self._break(self._make.broken())

    def _break(self, sent: bytes) -> None:
        """Bytes that may end anywhere: any answer or none will do, as long as it is no 500."""
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


class Held(NamedTuple):
    """By the gateway, while nobody is connected."""

    resident_bytes: int
    num_descriptors: int


class Growth(NamedTuple):
    """How much more is held at the end, and how much that may be."""

    num_bytes: int
    max_bytes: int
    since: str


def growth_of(resident_bytes: Sequence[int], part_s: float) -> Growth:
    """Growth over the second half; over all of it in a run that is too short for that.

    Args:
        resident_bytes: After the warm-up and after each part of the attack.
        part_s: How long a part took.
    """
    *_, last = resident_bytes
    middle = len(resident_bytes) // 2
    if (len(resident_bytes) - 1 - middle) * part_s >= MIN_JUDGED_S:
        return Growth(last - resident_bytes[middle], MAX_GROWTH_BYTES, "the middle")
    return Growth(last - resident_bytes[0], MAX_SHORT_GROWTH_BYTES, "the warm-up")


class Watched:
    """The gateway as its system sees it."""

    def __init__(self, server: ServerProcess) -> None:
        self._server = server
        self._process = psutil.Process(server.process.pid)

    def settled(self) -> Held:
        """What it holds once connections are closed."""
        deadline_s = time.monotonic() + SETTLE_S
        while self._is_connected() and time.monotonic() < deadline_s:
            time.sleep(0.2)
        time.sleep(1.0)  # for what follows the end of a connection
        return Held(self.resident_bytes(), self._process.num_fds())

    def resident_bytes(self) -> int:
        """As it is now, requests in work included."""
        return int(self._process.memory_info().rss)

    def _is_connected(self) -> bool:
        found = self._process.net_connections("tcp")
        return any(each.status != psutil.CONN_LISTEN for each in found)


def attack(
    server: ServerProcess, document: dict[str, Any], keys: list[str], seed: str, seconds: float,
    findings: Findings, watched: "Watched", *, is_first: bool,
) -> None:  # fmt: skip
    """Run the attackers for a while; the first time, one of them sends every kind of request."""
    models = [each["name"] for each in server.ps()]
    attackers = [
        Attacker(
            server.port,
            Generator(random.Random(f"{seed}-{number}"), document, models, keys),
            findings,
            sends_every_kind=is_first and number == 0,
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
        most_bytes = max(findings.most_resident_bytes, watched.resident_bytes())
        findings.most_resident_bytes = most_bytes
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
            part_s = (seconds - warm_up_s) / NUM_PARTS
            pauses = []
            for number in range(1 + NUM_PARTS):
                attack(
                    server, document, keys, f"{seed}-{number}", part_s if number else warm_up_s,
                    findings, watched, is_first=number == 0,
                )  # fmt: skip
                pauses.append(watched.settled())
            deaths = sum(each["num_deaths"] for each in server.ps())
            health = server.ask("GET", "/health")
            server.process.terminate()
            code = server.process.wait(60)
    growth = growth_of([held.resident_bytes for held in pauses], part_s)
    _judge(findings, growth, pauses, deaths, health, code, "".join(words))
    return {
        "seconds": seconds,
        "seed": seed,
        "answers": dict(sorted(findings.counts.items())),
        "num_sent": findings.counts.total(),
        "slowest_s": round(findings.slowest_s, 2),
        "most_resident_bytes": findings.most_resident_bytes,
        "resident_bytes_at_pauses": [held.resident_bytes for held in pauses],
        "descriptors_at_pauses": [held.num_descriptors for held in pauses],
        "growth_bytes": growth.num_bytes,
        "max_growth_bytes": growth.max_bytes,
        "growth_since": growth.since,
        "findings": findings.found,
    }


def _keep(server: ServerProcess, words: list[str]) -> None:
    assert server.process.stderr is not None
    words.extend(server.process.stderr)


def _judge(
    findings: Findings, growth: Growth, pauses: list[Held], num_deaths: int,
    health: tuple[int, Any], code: int, stderr: str,
) -> None:  # fmt: skip
    if growth.num_bytes > growth.max_bytes:
        findings.add(f"memory grew by {growth.num_bytes} bytes since {growth.since}")
    num_more = pauses[-1].num_descriptors - pauses[0].num_descriptors
    if num_more > MAX_GROWTH_DESCRIPTORS:
        findings.add(f"{num_more} more descriptors are open")
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
