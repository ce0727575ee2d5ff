"""Clients as an application has them: chats, long prompts, some that leave, and patience.

Every request is greedy and has a reference answer, so that a reply that is late, doubled, cut,
mixed up or wrong is seen.  What a server refuses for now is asked again when it says.
"""

import asyncio
import inspect
import json
import math
import random
import textwrap
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import httpx2
import msgspec

MAX_RETRY_WAIT_S = 5.0
"""Clients here come again sooner than a server may ask for: two minutes should hold many turns."""

PATIENCE_S = 60.0
"""How long a client comes again before it gives up."""

REPLY_LIMIT_S = 120.0
"""A reply that stays away for longer than this is counted as lost."""

LONG_PROMPT_CHARACTERS = 2400
"""Some 800 tokens of code: a prompt that takes many steps beside chats of twenty tokens."""

NEAR_TIE = 0.02
"""In nats.  Where a pool has holes, a prompt's cells lie in another order than its tokens, and so
sums of attention round otherwise, also in the exact profile: answers parted at gaps of 0.0016 and
0.0043, and at no wider one, in 200 (3 variants of the demo, 2-core x86-64, November 2026)."""

MIN_CLEAR_TOKENS = 8

_SUBJECTS = (
    "Return the sum of a list of numbers.",
    "Read a file and return its lines.",
    "Return True if a string is a palindrome.",
    "Count the words of a text.",
    "Open a socket and send a message.",
    "Parse a date and return its parts.",
    "Return the largest of three numbers.",
    "Remove a file if it exists.",
    "Join two paths.",
    "Return the keys of a dictionary, sorted.",
    "Write a header to a stream.",
    "Return the first item, or None.",
    "Split a string into lines.",
    "Return the absolute value of a number.",
    "Add two matrices.",
    "Check that a name is valid.",
    "Send an email.",
    "Compare two versions.",
    "Return a copy of a list without duplicates.",
    "Convert a temperature.",
)


class Errand(msgspec.Struct, frozen=True, kw_only=True):
    """One request, and what its client does with the reply."""

    name: str
    """Errands of one name, for one model, have one answer."""
    model: str
    messages: tuple[dict[str, str], ...] = ()
    prompt: str = ""
    max_tokens: int = 48
    leaves_after: int | None = None
    """Pieces of text after which the client hangs up; None: it stays to the end."""
    priority: str | None = None

    def body(self) -> dict[str, Any]:
        """As it goes over the wire."""
        fields: dict[str, Any] = {
            "model": self.model,
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "stream": True,
        }
        if self.priority is not None:
            fields["brim"] = {"priority": self.priority}
        if self.messages:
            return fields | {"messages": self.messages}
        return fields | {"prompt": self.prompt}

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.messages else "/v1/completions"


class Reply(msgspec.Struct, kw_only=True):
    """What became of an errand; times in seconds by `time.monotonic()`."""

    errand: Errand
    asked_s: float
    ended_s: float = 0.0
    first_text_s: float | None = None
    num_refusals: int = 0
    """503 and 429 with a time to come again, before it was accepted or given up."""
    status: int = 0
    """Of the last attempt; 0 where no response came."""
    text: str = ""
    num_endings: int = 0
    """Finish reasons of its one choice."""
    is_done: bool = False
    """Whether the stream said that it was over."""
    error: str = ""
    """Of the stream or the connection, or the refusal that was not temporary."""
    has_left: bool = False

    @property
    def ttft_s(self) -> float | None:
        """From the first attempt to the first text, refusals included."""
        return None if self.first_text_s is None else self.first_text_s - self.asked_s

    @property
    def duration_s(self) -> float:
        return self.ended_s - self.asked_s

    def fault(self, references: Mapping[tuple[str, str], str]) -> str:
        """What is wrong with it; empty for an answer that came once, whole and right."""
        wanted = references[self.errand.model, self.errand.name]
        if self.error:
            return self.error
        if self.has_left:
            return "" if wanted.startswith(self.text) else f"wrong text: {self.text[:60]!r}"
        if self.num_endings != 1 or not self.is_done:
            return f"{self.num_endings} endings, {'' if self.is_done else 'not '}done"
        return "" if self.text == wanted else f"wrong text: {_difference(self.text, wanted)}"


def _difference(text: str, wanted: str) -> str:
    pairs = enumerate(zip(text, wanted, strict=False))
    place = next((i for i, (a, b) in pairs if a != b), min(len(text), len(wanted)))
    return f"{text[place : place + 30]!r} for {wanted[place : place + 30]!r} at {place}"


def errands_of(model: str) -> list[Errand]:
    """Every errand that traffic for a model is drawn from, each to its end."""
    chats = [
        Errand(
            name=f"chat-{number}",
            model=model,
            messages=({"role": "user", "content": subject},),
            max_tokens=64,
        )
        for number, subject in enumerate(_SUBJECTS)
    ]
    code = inspect.getsource(textwrap)
    longs = [
        Errand(
            name=f"long-{number}",
            model=model,
            prompt=f"# Part {number}\n" + code[start : start + LONG_PROMPT_CHARACTERS],
            max_tokens=32,
        )
        for number, start in enumerate(range(0, 6 * 1500, 1500))
    ]
    return chats + longs


def mixed(errands: Sequence[Errand], *, seed: int, long_part: float = 0.2) -> Iterator[Errand]:
    """Errands without end: mostly chats, some long prompts, and one client in ten that leaves."""
    draw = random.Random(seed)
    models = sorted({errand.model for errand in errands})
    while True:
        model, wants_long = draw.choice(models), draw.random() < long_part
        fitting = [
            each
            for each in errands
            if each.model == model and each.name.startswith("long") == wants_long
        ]
        if fitting:
            leaves_after = draw.randint(1, 6) if draw.random() < 0.1 else None
            yield msgspec.structs.replace(draw.choice(fitting), leaves_after=leaves_after)


async def send(
    client: httpx2.AsyncClient,
    errand: Errand,
    *,
    patience_s: float = PATIENCE_S,
    limit_s: float = REPLY_LIMIT_S,
) -> Reply:
    """Send an errand, again where it is refused for now, and read the reply to its end.

    Args:
        client: With the server's address as its base.
        errand: The request.
        patience_s: After that, a refusal stands.
        limit_s: After that and the patience, the reply counts as lost.
    """
    reply = Reply(errand=errand, asked_s=time.monotonic())
    try:
        async with asyncio.timeout(limit_s + patience_s):
            while (wait_s := await _attempt(client, reply)) is not None:
                if time.monotonic() + wait_s > reply.asked_s + patience_s:
                    break
                reply.num_refusals += 1
                await asyncio.sleep(wait_s)
    except TimeoutError:
        reply.error = "no end of the reply"
    except httpx2.HTTPError as exc:
        reply.error = f"the connection failed: {type(exc).__name__} {exc}"
    reply.ended_s = time.monotonic()
    return reply


async def _attempt(client: httpx2.AsyncClient, reply: Reply) -> float | None:
    """One attempt; seconds to wait before the next where it was refused for now."""
    errand = reply.errand
    async with client.stream("POST", errand.path, json=errand.body()) as response:
        reply.status = response.status_code
        if response.status_code != 200:
            await response.aread()
            reply.error = f"{response.status_code}: {response.text[:300]}"
            after = response.headers.get("retry-after")
            return None if after is None else min(float(after), MAX_RETRY_WAIT_S)
        reply.error, num_pieces = "", 0
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                num_pieces += _take(reply, line[6:])
            if errand.leaves_after is not None and num_pieces >= errand.leaves_after:
                reply.has_left = True
                return None
    return None


def _take(reply: Reply, data: str) -> int:
    """Enter one event; how many pieces of text it brought."""
    if data == "[DONE]":
        reply.is_done = True
        return 0
    event = json.loads(data)
    if "error" in event:
        reply.error = f"in the stream: {json.dumps(event['error'])[:300]}"
        return 0
    num_pieces = 0
    for choice in event["choices"]:
        piece = choice.get("text") or choice.get("delta", {}).get("content") or ""
        if piece:
            reply.first_text_s = reply.first_text_s or time.monotonic()
            num_pieces += 1
            reply.text += piece
        reply.num_endings += choice.get("finish_reason") is not None
    return num_pieces


def new_client(url: str, *, key: str = "") -> httpx2.AsyncClient:
    """For one server; a reply may pause as long as a model takes to load."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    limits = httpx2.Limits(max_connections=None)
    return httpx2.AsyncClient(base_url=url, timeout=REPLY_LIMIT_S, limits=limits, headers=headers)


async def reference_answers(
    url: str, errands: Iterable[Errand]
) -> tuple[list[Errand], dict[tuple[str, str], str]]:
    """Errands whose greedy answer is beyond doubt, and it: (model, name) -> text.

    Each is asked alone of a server without pressure.  An answer is cut before its first near tie,
    and one that is short then is left out.

    Raises:
        AssertionError: The server did not answer.
    """
    clear, found = [], {}
    async with new_client(url) as client:
        for errand in errands:
            num_clear = await _num_clear_tokens(client, errand)
            if num_clear < MIN_CLEAR_TOKENS:
                continue
            cut = msgspec.structs.replace(errand, max_tokens=num_clear)
            reply = await send(client, cut)
            assert not reply.error, reply.error
            assert reply.num_endings == 1, reply
            clear.append(cut)
            found[errand.model, errand.name] = reply.text
    return clear, found


async def _num_clear_tokens(client: httpx2.AsyncClient, errand: Errand) -> int:
    """How many tokens of an answer come before the first whose runner-up is close behind."""
    asked = {"logprobs": True, "top_logprobs": 2} if errand.messages else {"logprobs": 2}
    response = await client.post(errand.path, json=errand.body() | asked | {"stream": False})
    assert response.status_code == 200, response.text
    logprobs = response.json()["choices"][0]["logprobs"]
    if errand.messages:
        tops = [[each["logprob"] for each in t["top_logprobs"]] for t in logprobs["content"]]
    else:
        tops = [list(each.values()) for each in logprobs["top_logprobs"]]
    for number, top in enumerate(tops):
        first, second, *_ = *sorted(top, reverse=True), -math.inf
        if first - second < NEAR_TIE:
            return number
    return errand.max_tokens


async def keep_asking(
    url: str,
    errands: Sequence[Errand],
    *,
    num_clients: int,
    seconds: float,
    seed: int = 0,
    patience_s: float = PATIENCE_S,
    reply_limit_s: float = REPLY_LIMIT_S,
) -> list[Reply]:
    """Mixed traffic of several clients, each with one request at a time, for a while.

    What runs at the end is finished.
    """
    deadline_s = time.monotonic() + seconds

    async def one(number: int) -> list[Reply]:
        draw, replies = random.Random(seed + number), []
        async with new_client(url) as client:
            for errand in mixed(errands, seed=seed + number):
                if time.monotonic() > deadline_s:
                    break
                replies.append(
                    await send(client, errand, patience_s=patience_s, limit_s=reply_limit_s)
                )
                await asyncio.sleep(draw.uniform(0.0, 0.6))
        return replies

    found = await asyncio.gather(*(one(number) for number in range(num_clients)))
    return [reply for replies in found for reply in replies]
