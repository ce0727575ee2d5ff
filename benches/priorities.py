"""An app that nobody waits for floods a model: how much later does another app's first word come?

A real server with two apps of their own: one in the background keeps many requests open, each with
a prompt that nobody has seen; the other asks as a person does, one request after the other.  Its
time to first text is measured alone and beside the flood, in turns, so that a machine that slows
down does so for both.

The flood's clients are one process that parses nothing, the person another: one event loop of both
would stamp the person's answers late.  And the flood fills the pool of KV before anything is
measured, as that of a server is that has been in use: cells that are kept for reuse make steps
longer, alone as well (21 ms to the first text on the demo model with an empty pool, 43 with a full
one).

    python benches/priorities.py [MODEL] [--repetitions 24] [--flood 16] [--json FILE]

Aim: the median beside the flood within 1.5 times the one alone; the exit code is 1 where it is not.
"""

import argparse
import contextlib
import http.client
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
from flood import prompt
from harness import describe_machine

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from support.server_process import ServerProcess

MAX_RATIO = 1.5
PERSON_WORDS = 120
FLOOD_WORDS = 400
FLOOD_TOKENS = 128
PERSON_TOKENS = 16
NUM_TURNS = 2
"""Of measuring alone and then beside: a machine that slows down does so for both."""

PAUSE_S = 0.3
"""Between two requests of the person: the flood's steps are met at any moment of theirs."""

REPLY_LIMIT_S = 60.0
"""For one reply of the person; hundreds of times what the slowest took."""


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """When a person's answer began, and where the time until then went by the server's account."""

    ttft_s: float
    queue_s: float
    """From the prompt's arrival in the worker to its sequence."""
    prefill_s: float
    """From there to the first token."""

    @property
    def rest_s(self) -> float:
        """Of the time to first text: client, HTTP, gateway, and the ways to and from the worker."""
        return self.ttft_s - self.queue_s - self.prefill_s


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """The person's replies."""

    model: str
    alone: list[Reply]
    beside: list[Reply]
    num_flood_answers: int

    @property
    def ratio(self) -> float:
        """Of the medians of the times to first text."""
        return _median_s(self.beside, "ttft_s") / _median_s(self.alone, "ttft_s")


def _median_s(replies: list[Reply], name: str) -> float:
    return float(statistics.median(getattr(reply, name) for reply in replies))


def add_app(server: ServerProcess, directory: Path, name: str, priority: str) -> str:
    """The key of a new app."""
    manifest = directory / f"{name}.toml"
    manifest.write_text(f'name = "{name}"\npriority = "{priority}"\n')
    done = server.brim("apps", "add", str(manifest), "--json")
    if done.returncode:
        raise SystemExit(done.stderr)
    return str(json.loads(done.stdout)["key"])


@contextlib.contextmanager
def flood(
    url: str, key: str, model: str, num_open: int, *, seed: int, num_first: int = 2
) -> Iterator[dict[str, int]]:
    """Keep that many background requests open; how they were answered is there at the end.

    Args:
        url: Of the server.
        key: Of the background app.
        model: Which.
        num_open: Requests at once.
        seed: Of the prompts, another one each time.
        num_first: Answers that are waited for first.
    """
    arguments = ["--open", num_open, "--words", FLOOD_WORDS, "--tokens", FLOOD_TOKENS]
    arguments += ["--seed", seed, "--first", num_first]
    process = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("flood.py"), url, model, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "BRIM_FLOOD_KEY": key},
    )
    assert process.stdout is not None
    served: dict[str, int] = {}
    try:
        if process.stdout.readline().strip() != "ready":
            raise SystemExit("the flood was not served")
        yield served
        output, _ = process.communicate("", timeout=REPLY_LIMIT_S)
        served.update(json.loads(output))
    finally:
        process.kill()
        process.wait()


class Person:
    """A client that asks one thing after the other, on one connection.

    Args:
        server: Which.
        key: Of the person's app.
        model: Which.
    """

    def __init__(self, server: ServerProcess, key: str, model: str) -> None:
        self._connection = http.client.HTTPConnection(
            "127.0.0.1", server.port, timeout=REPLY_LIMIT_S
        )
        self._headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        self._model = model
        self._draw = random.Random(0)

    def close(self) -> None:
        """Hang up."""
        self._connection.close()

    def ask_often(self, number: int) -> list[Reply]:
        """Replies to that many requests."""
        found = []
        for _ in range(number):
            found.append(self._ask())
            time.sleep(PAUSE_S * self._draw.random())
        return found

    def _ask(self) -> Reply:
        body = {
            "model": self._model,
            "prompt": prompt(self._draw, PERSON_WORDS),
            "max_tokens": PERSON_TOKENS,
            "temperature": 0,
            "stream": True,
        }
        asked_s = time.monotonic()
        self._connection.request("POST", "/v1/completions", json.dumps(body), self._headers)
        response = self._connection.getresponse()
        if response.status != 200:
            raise SystemExit(f"a request of the person failed: {response.read()!r}")
        first_text_s, last = None, b""
        for line in response:
            if line.startswith(b"data: {"):
                first_text_s, last = first_text_s or time.monotonic(), line
        info = json.loads(last[6:]).get("brim")
        if first_text_s is None or info is None:
            raise SystemExit(f"an answer to the person has no end: {last!r}")
        return Reply(
            ttft_s=first_text_s - asked_s, queue_s=info["queue_s"], prefill_s=info["prefill_s"]
        )


def measure(
    server: ServerProcess, keys: tuple[str, str], model: str, *, repetitions: int, num_open: int
) -> Figures:
    """Alone and beside the flood, in turns, after the flood has filled the pool."""
    person_key, background_key = keys
    alone: list[Reply] = []
    beside: list[Reply] = []
    num_answers = 0
    # A word is a token or more, so this is more than the pool holds.
    num_first = server.ps()[0]["kv_pool_tokens"] // (FLOOD_WORDS + FLOOD_TOKENS) + 1
    person = Person(server, person_key, model)
    with contextlib.closing(person):
        with flood(server.url, background_key, model, num_open, seed=0, num_first=num_first):
            pass
        for turn in range(NUM_TURNS):
            person.ask_often(2)  # the flood's last step, pages and caches come with these
            alone += person.ask_often(repetitions // NUM_TURNS)
            with flood(server.url, background_key, model, num_open, seed=1 + turn) as served:
                beside += person.ask_often(repetitions // NUM_TURNS)
            if served["num_failures"]:
                raise SystemExit(f"{served['num_failures']} requests of the flood were not served")
            num_answers += served["num_answers"]
    return Figures(model=model, alone=alone, beside=beside, num_flood_answers=num_answers)


def show(figures: Figures) -> None:
    """In three lines."""
    for label, replies in (("alone", figures.alone), ("beside", figures.beside)):
        times_s = [reply.ttft_s for reply in replies]
        parts = ", ".join(
            f"{name} {_median_s(replies, f'{name}_s') * 1000:.1f}"
            for name in ("queue", "prefill", "rest")
        )
        print(
            f"{label:8} {statistics.median(times_s) * 1000:8.1f} ms to the first text "
            f"({min(times_s) * 1000:.1f} to {max(times_s) * 1000:.1f}, n={len(times_s)}): {parts}"
        )
    print(f"ratio    {figures.ratio:8.2f}, {figures.num_flood_answers} answers of the flood")


def main() -> int:
    """Measure and print; exit 1 where the aim was missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--repetitions", type=int, default=24)
    parser.add_argument("--flood", type=int, default=16)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(describe_machine())
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        settings = {"cache.enabled": False}
        with ServerProcess(directory, "-m", f"model={args.model}", settings=settings) as server:
            keys = (
                add_app(server, directory, "person", "interactive"),
                add_app(server, directory, "flood", "background"),
            )
            figures = measure(
                server, keys, "model", repetitions=args.repetitions, num_open=args.flood
            )
    show(figures)
    if args.json is not None:
        args.json.write_bytes(msgspec.json.format(msgspec.json.encode(figures), indent=2) + b"\n")
    return int(figures.ratio > MAX_RATIO)


if __name__ == "__main__":
    sys.exit(main())
