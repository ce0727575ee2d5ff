"""An app that nobody waits for floods a model: how much later does another app's first word come?

A real server with two apps of their own: one in the background keeps many requests open, each with
a prompt that nobody has seen; the other asks as a person does, one request after the other.  Its
time to first text is measured alone and beside the flood, in turns, so that a machine that slows
down does so for both.

    python benches/priorities.py [MODEL] [--repetitions 10] [--flood 16] [--json FILE]

Aim: the median beside the flood within 1.5 times the one alone; the exit code is 1 where it is not.
"""

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
from harness import describe_machine

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from support.server_process import ServerProcess
from support.traffic import Errand, Reply, new_client, send

MAX_RATIO = 1.5
PERSON_WORDS = 120
FLOOD_WORDS = 400
FLOOD_TOKENS = 128
PERSON_TOKENS = 16
PAUSE_S = 0.3
"""Between two requests of the person: the flood's steps are met at any moment of theirs."""

WORDS = "the of and to in that is was for it with as his on be at by had not are but from".split()


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """Times to first text, in seconds."""

    model: str
    alone_s: list[float]
    beside_s: list[float]
    num_flood_answers: int

    @property
    def ratio(self) -> float:
        return statistics.median(self.beside_s) / statistics.median(self.alone_s)


def add_app(server: ServerProcess, directory: Path, name: str, priority: str) -> str:
    """The key of a new app."""
    manifest = directory / f"{name}.toml"
    manifest.write_text(f'name = "{name}"\npriority = "{priority}"\n')
    done = server.brim("apps", "add", str(manifest), "--json")
    if done.returncode:
        raise SystemExit(done.stderr)
    return str(json.loads(done.stdout)["key"])


def errand(model: str, draw: random.Random, num_words: int, max_tokens: int) -> Errand:
    """A prompt that nobody has seen: nothing of it is in any cache."""
    words = " ".join(draw.choice(WORDS) for _ in range(num_words))
    return Errand(name="", model=model, prompt=f"{draw.random()} {words}", max_tokens=max_tokens)


@contextlib.asynccontextmanager
async def flood(
    url: str, key: str, model: str, num_open: int, draw: random.Random
) -> AsyncIterator[list[Reply]]:
    """Keep that many background requests open; their replies are gathered in the list."""
    replies: list[Reply] = []

    async def one(client_draw: random.Random) -> None:
        async with new_client(url, key=key) as client:
            while True:
                wanted = errand(model, client_draw, FLOOD_WORDS, FLOOD_TOKENS)
                replies.append(await send(client, wanted))

    tasks = [asyncio.create_task(one(random.Random(draw.random()))) for _ in range(num_open)]
    try:
        while len(replies) < 2:  # until the flood has answers and a queue  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        yield replies
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def first_texts(
    url: str, key: str, model: str, number: int, draw: random.Random
) -> list[float]:
    """Times to first text of one request after the other."""
    found = []
    async with new_client(url, key=key) as client:
        for _ in range(number):
            reply = await send(client, errand(model, draw, PERSON_WORDS, PERSON_TOKENS))
            if reply.error or reply.ttft_s is None:
                raise SystemExit(f"a request of the person failed: {reply.error}")
            found.append(reply.ttft_s)
            await asyncio.sleep(PAUSE_S * draw.random())
    return found


async def measure(
    url: str, keys: tuple[str, str], model: str, *, repetitions: int, num_open: int
) -> Figures:
    """Alone, beside the flood, alone again."""
    person, background = keys
    draw = random.Random(0)
    half = (repetitions + 1) // 2
    await first_texts(url, person, model, 2, draw)  # pages, threads and caches come with these
    alone_s = await first_texts(url, person, model, half, draw)
    async with flood(url, background, model, num_open, draw) as replies:
        beside_s = await first_texts(url, person, model, repetitions, draw)
    alone_s += await first_texts(url, person, model, repetitions - half, draw)
    if failed := [reply.error for reply in replies if reply.error]:
        raise SystemExit(f"the flood was not served: {failed[0]}")
    return Figures(model=model, alone_s=alone_s, beside_s=beside_s, num_flood_answers=len(replies))


def show(figures: Figures) -> None:
    """In three lines."""
    for label, times_s in (("alone", figures.alone_s), ("beside", figures.beside_s)):
        print(
            f"{label:8} {statistics.median(times_s) * 1000:8.0f} ms to the first text "
            f"({min(times_s) * 1000:.0f} to {max(times_s) * 1000:.0f}, n={len(times_s)})"
        )
    print(f"ratio    {figures.ratio:8.2f}, {figures.num_flood_answers} answers of the flood")


def main() -> int:
    """Measure and print; exit 1 where the aim was missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--repetitions", type=int, default=10)
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
            figures = asyncio.run(
                measure(
                    server.url,
                    keys,
                    "model",
                    repetitions=args.repetitions,
                    num_open=args.flood,
                )
            )
    show(figures)
    if args.json is not None:
        args.json.write_bytes(msgspec.json.format(msgspec.json.encode(figures), indent=2) + b"\n")
    return int(figures.ratio > MAX_RATIO)


if __name__ == "__main__":
    sys.exit(main())
