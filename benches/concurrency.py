"""Many streaming clients at once against one server: does every answer end once, and as itself?

Two kinds of request go out together from every client.  *Forced* ones push one token so far up with
`logit_bias` that the answer is that token again and again, another token for each client: a piece
in the wrong answer is plain to see whatever the arithmetic does.  *Greedy* ones have a prompt of
their own and are compared with the answer that the same server gave to it alone; with ordinary load
options a batch may round differently and a near tie fall the other way, so those that differ are
counted with the place, and only a lost, doubled, failed or mixed answer is a fault.

    python benches/concurrency.py [--model demo] [--clients 64] [--rounds 3]

The worker's memory is read before and after the measured rounds.  Aims: no fault, and no more than
16 MiB of growth.  The exit code is 1 if there was a fault.
"""

import argparse
import asyncio
import contextlib
import sys
import time

import msgspec
from harness import Served, brim_serve, describe_machine, private_bytes, serving, show

from brim.bench.answers import Answered
from brim.bench.client import Connection, Endpoint
from brim.bench.serve import Target, reach
from brim.bench.workload import RecordedRequest

FORCED_TOKENS = 48
GREEDY_TOKENS = 48

FIRST_FORCED_TOKEN = 300
"""Above the control tokens and the single bytes of a byte-level vocabulary."""

BIAS = 100.0
"""OpenAI's largest; more than any gap between two logits of a trained model."""

MIB = 2**20


class Client:
    """One connection with its two requests."""

    def __init__(self, target: Target, number: int) -> None:
        self._target = target
        self._connection = Connection(target.endpoint)
        self._token = FIRST_FORCED_TOKEN + number
        self._forced = RecordedRequest(
            id=f"forced-{number}", max_tokens=FORCED_TOKENS, prompt=f"# {number}\n"
        )
        self._greedy = RecordedRequest(
            id=f"greedy-{number}",
            max_tokens=GREEDY_TOKENS,
            prompt=f"def function_{number}(value):\n    " + f"x_{number} = {number}\n    " * 8,
        )
        self.alone = ""
        self.piece = ""

    async def ask_alone(self) -> None:
        """Take the reference answers while nobody else asks."""
        self.alone = (await self.greedy()).text
        one = await self._ask(self._forced, max_tokens=1, logit_bias=self._bias)
        self.piece = one.text
        if not self.alone or not self.piece:
            raise SystemExit(f"no reference answer for {self._greedy.id}: {one.error}")

    async def greedy(self) -> Answered:
        """The likeliest continuation of this client's prompt."""
        return await self._ask(self._greedy)

    async def forced(self) -> Answered:
        """This client's token, again and again."""
        return await self._ask(self._forced, logit_bias=self._bias)

    def close(self) -> None:
        """Drop the connection."""
        self._connection.close()

    @property
    def _bias(self) -> dict[str, float]:
        return {str(self._token): BIAS}

    async def _ask(self, request: RecordedRequest, **extra: object) -> Answered:
        return await self._target.ask(self._connection, request, **extra)


class Tally(msgspec.Struct):
    """What the answers were."""

    num_answers: int = 0
    faults: list[str] = []
    parted: list[tuple[str, int]] = []
    """Greedy answers that part from the one given alone, and after how many characters."""

    def count(self, client: Client, forced: Answered, greedy: Answered) -> None:
        """Judge one client's two answers."""
        self.num_answers += 2
        for answer, wanted in ((forced, FORCED_TOKENS), (greedy, GREEDY_TOKENS)):
            if answer.error:
                self.faults.append(f"{answer.request_id}: {answer.error}")
            elif answer.num_completion_tokens != wanted:
                got = answer.num_completion_tokens
                self.faults.append(f"{answer.request_id}: {got} tokens instead of {wanted}")
        if not forced.error and forced.text != client.piece * FORCED_TOKENS:
            self.faults.append(f"{forced.request_id}: foreign text in {forced.text!r}")
        if not greedy.error and greedy.text != client.alone:
            self.parted.append((greedy.request_id, common_length(greedy.text, client.alone)))


def common_length(one: str, other: str) -> int:
    """Characters that two texts share from the beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


async def run_round(clients: list[Client], tally: Tally) -> None:
    """All clients at once, each with its two requests one after the other, in either order."""

    async def both(number: int, client: Client) -> None:
        if number % 2:
            greedy, forced = await client.greedy(), await client.forced()
        else:
            forced, greedy = await client.forced(), await client.greedy()
        tally.count(client, forced, greedy)

    await asyncio.gather(*(both(number, client) for number, client in enumerate(clients)))


async def measure(served: Served, args: argparse.Namespace) -> Tally:
    """Reference answers, one round to warm up, and the counted rounds."""
    target = await reach(Endpoint.parse(f"server={served.url}"))
    (worker,) = served.workers() or [served.pid]
    clients = [Client(target, number) for number in range(args.clients)]
    tally = Tally(faults=[], parted=[])
    with contextlib.ExitStack() as stack:
        for client in clients:
            stack.callback(client.close)
            await client.ask_alone()
        await run_round(clients, Tally(faults=[], parted=[]))
        before = private_bytes(worker)
        walls = []
        for _ in range(args.rounds):
            start_s = time.perf_counter()
            await run_round(clients, tally)
            walls.append(time.perf_counter() - start_s)
        after = private_bytes(worker)
    num_tokens = args.clients * (FORCED_TOKENS + GREEDY_TOKENS)
    show("round", walls, "s")
    show("all answers", [num_tokens / wall for wall in walls], "tok/s", digits=0)
    for name in before:
        growth = (after[name] - before[name]) / MIB
        print(f"worker {name:14} {before[name] / MIB:8.1f} MiB, {growth:+.1f} MiB")
    return tally


def main() -> int:
    """Read the options, start the server, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(f"{args.clients} clients at once, {args.model}, {describe_machine()}")
    with serving(brim_serve(args.model)) as served:
        tally = asyncio.run(measure(served, args))
    print(f"{tally.num_answers} answers, {len(tally.faults)} faults")
    print(f"{len(tally.parted)} greedy answers part from the one given alone")
    for name, place in sorted(set(tally.parted)):
        print(f"  {name} after {place} characters")
    for fault in tally.faults[:10]:
        print(f"  {fault}", file=sys.stderr)
    return 1 if tally.faults else 0


if __name__ == "__main__":
    sys.exit(main())
