"""A gateway with real worker processes, and what its answers add up to."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from brim.config.tree import CacheSettings, Settings, WorkerSettings
from brim.core.answer import Delta, FinishReason
from brim.core.machine import MachineSpec
from brim.core.plan import Plan
from brim.core.request import Message, Request
from brim.core.sampling import SamplingParams
from brim.ledger.account import Account
from brim.runtime.api import Answer
from brim.runtime.gateway import Gateway
from support.meters import RecordingMeter
from support.models import plan_for

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)

MACHINE = MachineSpec(
    name="test", system="linux", ram_bytes=16_000_000_000, others_bytes=3_000_000_000
)

ENDLESS = 50_000
"""Tokens of an answer that goes on until it is cancelled, whatever else is done meanwhile and
however slowly: the toy takes 0.1 ms for each of the first thousands, and 14 s for all of them."""

_numbers = itertools.count(1)


def toy_plan(name: str = "toy", **overrides: Any) -> Plan:
    """A plan for the teaching engine, with a chat template."""
    plan = plan_for("toy", **overrides)
    model = msgspec.structs.replace(plan.model, name=name, chat_template=CHATML)
    return msgspec.structs.replace(plan, model=model, environment={})


def endless_plan(name: str = "toy", **overrides: Any) -> Plan:
    """A plan for the teaching engine whose window and pool hold one endless answer and a half."""
    room = {"context_tokens": 3 * ENDLESS // 2, "kv_tokens": 3 * ENDLESS // 2}
    return toy_plan(name, **room | overrides)


def settings_with(**worker: Any) -> Settings:
    """The defaults, with other values for the workers, and nothing kept on disk."""
    return Settings(worker=WorkerSettings(**worker), cache=CacheSettings(enabled=False))


@asynccontextmanager
async def serving(
    *plans: Plan,
    settings: Settings | None = None,
    account: Account | None = None,
    meter: RecordingMeter | None = None,
) -> AsyncIterator[Gateway]:
    """A started gateway; stopped at the end, whatever happened.

    Without settings nothing is kept on disk: what one test leaves there another would find.
    """
    gateway = Gateway(
        plans or (toy_plan(),),
        settings=settings or Settings(cache=CacheSettings(enabled=False)),
        account=account or Account(),
        read_machine=lambda: MACHINE,
        meter=meter,
    )
    async with gateway:
        yield gateway


def request(
    content: str = "hello",
    *,
    model: str = "toy",
    sampling: SamplingParams | None = None,
    **fields: Any,
) -> Request:
    """A chat request that runs to its bound: greedy, and never ending by itself."""
    fields.setdefault("max_tokens", 20)
    if not {"prompt", "prompt_tokens"} & fields.keys():
        fields["messages"] = (Message(role="user", content=content),)
    return Request(
        request_id=f"test-{next(_numbers)}",
        model=model,
        sampling=sampling or SamplingParams(temperature=0.0, ignore_eos=True),
        **fields,
    )


async def collect(answer: Answer) -> dict[int, list[Delta]]:
    """Every delta of an answer, by choice; fails where one goes on after its end."""
    found: dict[int, list[Delta]] = {}
    async for deltas in answer:
        for delta in deltas:
            choice = found.setdefault(delta.index, [])
            assert not choice or choice[-1].finish_reason is None, "a choice ended twice"
            choice.append(delta)
    assert all(choice[-1].finish_reason is not None for choice in found.values())
    return found


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


async def ask(gateway: Gateway, request: Request) -> str:
    """The text of one request with one choice that must end well."""
    choices = await collect(await gateway.submit(request))
    assert choices[0][-1].finish_reason in (FinishReason.STOP, FinishReason.LENGTH), choices
    return text_of(choices[0])


async def until(fact: Callable[[], bool], limit_s: float = 60.0) -> None:
    """Wait for a fact that nothing announces."""
    async with asyncio.timeout(limit_s):
        while not fact():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
