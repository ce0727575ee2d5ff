"""A crowd of clients that ask a server for long answers and cost next to nothing themselves.

    BRIM_FLOOD_KEY=... python benches/flood.py URL MODEL --open 16 --words 400 --tokens 128

A process of its own, for what it floods is timed by another: the same event loop would stamp late
what it measures.  Answers are streamed and counted by their last bytes, and nothing is parsed, so
that the cores are left to the server.  It says `ready` after the first answers, and at the end of
its input leaves and prints what it had as one JSON object.
"""

import argparse
import asyncio
import functools
import json
import os
import random
import sys
from urllib.parse import urlsplit

WORDS = "the of and to in that is was for it with as his on be at by had not are but from".split()

END = b"data: [DONE]"
"""What a streamed answer that came to its end has as its last event."""


def prompt(draw: random.Random, num_words: int) -> str:
    """A text that nobody has seen: nothing of it is in any cache."""
    return f"{draw.random()} " + " ".join(draw.choice(WORDS) for _ in range(num_words))


class Client(asyncio.Protocol):
    """One request on a connection of its own, to its end."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._tail = b""
        self.ended: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        """Whether the answer came whole."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask."""
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Keep the last bytes, where the end stands."""
        self._tail = (self._tail + data)[-64:]

    def connection_lost(self, exc: Exception | None) -> None:
        """The server closes when the answer is over."""
        if not self.ended.done():
            self.ended.set_result(END in self._tail)


class Flood:
    """Requests that are kept open, a new one for each that ends.

    Args:
        options: The command line.
        key: Of the app.
    """

    def __init__(self, options: argparse.Namespace, key: str) -> None:
        self._options = options
        self._address = urlsplit(options.url)
        self._key = key
        self.num_answers = 0
        self.num_failures = 0

    async def run(self) -> None:
        """Until cancelled."""
        draw = random.Random(self._options.seed)
        async with asyncio.TaskGroup() as group:
            for _ in range(self._options.open):
                group.create_task(self._one(random.Random(draw.random())))

    async def _one(self, draw: random.Random) -> None:
        loop = asyncio.get_running_loop()
        while True:
            request = self._request(prompt(draw, self._options.words))
            transport, client = await loop.create_connection(
                functools.partial(Client, request), self._address.hostname, self._address.port
            )
            try:
                is_whole = await client.ended
            finally:
                transport.abort()
            self.num_answers += is_whole
            self.num_failures += not is_whole
            if not is_whole:
                return  # a flood that is refused is none: its bench says so
            if self.num_answers == self._options.first:
                print("ready", flush=True)

    def _request(self, text: str) -> bytes:
        body = json.dumps(
            {
                "model": self._options.model,
                "prompt": text,
                "max_tokens": self._options.tokens,
                "temperature": 0,
                "stream": True,
            }
        ).encode()
        return (
            f"POST /v1/completions HTTP/1.1\r\nHost: {self._address.netloc}\r\n"
            f"Authorization: Bearer {self._key}\r\nContent-Type: application/json\r\n"
            f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        ).encode() + body


async def until_told(flood: Flood) -> None:
    """Flood until the input ends."""
    loop = asyncio.get_running_loop()
    flooding = asyncio.create_task(flood.run())
    told = loop.run_in_executor(None, sys.stdin.read)
    await asyncio.wait((flooding, told), return_when=asyncio.FIRST_COMPLETED)
    flooding.cancel()
    await asyncio.wait((flooding,))


def main() -> int:
    """Flood, then say how it was served."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("url")
    parser.add_argument("model")
    parser.add_argument("--open", type=int, default=16)
    parser.add_argument("--words", type=int, default=400)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--first", type=int, default=2, help="answers before it is ready")
    parser.add_argument("--seed", type=int, default=0)
    flood = Flood(parser.parse_args(), os.environ["BRIM_FLOOD_KEY"])
    asyncio.run(until_told(flood))
    print(json.dumps({"num_answers": flood.num_answers, "num_failures": flood.num_failures}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
