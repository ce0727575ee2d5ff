"""Models of which not all fit at once, and many who ask for them: real workers, a made-up machine.

What the models are said to need is made up too, so that any small model can stand for a large one.
"""

import asyncio
import random
import time
from collections.abc import Mapping, Sequence

import msgspec

from brim.core.answer import FinishReason
from brim.core.memory import MemoryTerms
from brim.core.plan import Plan
from brim.errors import BrimError, CapacityError
from brim.runtime.gateway import Gateway
from support.serving import request, text_of

GB = 10**9

PROMPTS = (
    "for line in text:",
    "    def __init__(self",
    "return [x for x in",
    "assert len(",
    "    def __repr__(self):",
    "x = 1\ny = 2\n",
)
"""Prompts whose first tokens no variant of the demo is in doubt about: near ties fall either way
where a pool has holes (traffic.NEAR_TIE)."""

MAX_TOKENS = 24
"""So far the runner-up is at least 0.03 nats behind, in variants of three to six layers."""

WATCH_PERIOD_S = 0.02
"""Between two looks at which workers live: starting one takes at least ten times as long."""


def weighing(plan: Plan, name: str, num_bytes: int) -> Plan:
    """The plan under another name, said to need so many bytes.

    Of 16 GB with 3 GB in use, two of 5 GB fit, and one of 7 GB.
    """
    memory = MemoryTerms(weights_bytes=num_bytes, kv_bytes=0, compute_bytes=0, overhead_bytes=0)
    model = msgspec.structs.replace(plan.model, name=name)
    return msgspec.structs.replace(plan, model=model, memory=memory)


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """One request of a crowd."""

    model: str
    prompt: str
    text: str = ""
    error: str = ""
    num_refusals: int = 0
    asked_s: float
    first_text_s: float | None = None
    ended_s: float


async def one_of_a_crowd(
    gateway: Gateway,
    model: str,
    prompt: str,
    *,
    max_tokens: int = MAX_TOKENS,
    patience_s: float = 0.0,
) -> Served:
    """Ask once; again as long as patience lasts where it is refused for now."""
    asked_s, num_refusals, first_text_s = time.monotonic(), 0, None
    while True:
        text, error = "", ""
        try:
            answer = await gateway.submit(
                request(prompt=prompt, model=model, max_tokens=max_tokens)
            )
            async for deltas in answer:
                text += text_of(deltas)
                first_text_s = first_text_s or time.monotonic()
                last = deltas[-1]
            if last.finish_reason not in (FinishReason.STOP, FinishReason.LENGTH):
                error = f"ended with {last.finish_reason}: {last.error}"
        except CapacityError as exc:
            wait_s = exc.retry_after_s
            if wait_s is not None and time.monotonic() + wait_s < asked_s + patience_s:
                num_refusals += 1
                await asyncio.sleep(wait_s)
                continue
            error = f"{type(exc).__name__}: {exc}"
        except BrimError as exc:
            error = f"{type(exc).__name__}: {exc}"
        return Served(
            model=model,
            prompt=prompt,
            text=text,
            error=error,
            num_refusals=num_refusals,
            asked_s=asked_s,
            first_text_s=first_text_s,
            ended_s=time.monotonic(),
        )


async def crowd(
    gateway: Gateway,
    models: Sequence[str],
    *,
    num_requests: int,
    max_tokens: int = MAX_TOKENS,
    patience_s: float = 0.0,
    within_s: float = 0.0,
    seed: int = 0,
) -> list[Served]:
    """That many requests, for the models in a random order.

    Args:
        gateway: Who is asked.
        models: For which, in equal parts.
        num_requests: How many.
        max_tokens: Of each answer.
        patience_s: How long each comes again where it is refused for now.
        within_s: They come spread over so long; 0: all at once.
        seed: Of order and times.
    """
    wishes = [
        (models[number % len(models)], PROMPTS[number % len(PROMPTS)])
        for number in range(num_requests)
    ]
    draw = random.Random(seed)
    draw.shuffle(wishes)

    async def one(model: str, prompt: str, after_s: float) -> Served:
        await asyncio.sleep(after_s)
        return await one_of_a_crowd(
            gateway, model, prompt, max_tokens=max_tokens, patience_s=patience_s
        )

    return await asyncio.gather(
        *(one(model, prompt, draw.uniform(0.0, within_s)) for model, prompt in wishes)
    )


class LoadWatch:
    """Counts the loads of a gateway's models while it is open: each has a process of its own."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._pids = self._now()
        self.loads: list[tuple[float, str]] = []
        """(when, model), by the monotonic clock."""

    async def __aenter__(self) -> "LoadWatch":
        self._watching = asyncio.create_task(self._watch(), name="watching loads")
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._watching.cancel()
        await asyncio.gather(self._watching, return_exceptions=True)

    def _now(self) -> Mapping[str, int | None]:
        return {status.name: status.pid for status in self._gateway.models()}

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_PERIOD_S)
            now = self._now()
            self.loads += [
                (time.monotonic(), name)
                for name, pid in now.items()
                if pid is not None and pid != self._pids[name]
            ]
            # One that is out of memory keeps its last process, so that a look in between is none.
            self._pids = {name: pid or self._pids[name] for name, pid in now.items()}
