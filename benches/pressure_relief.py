"""From the system's word to memory given back: how long the governor takes, in measured bytes.

The gateway, the governor, the workers and their footprints are real; the word is ours, so that the
moment is known.  A model with a pool of 1.56 GB holds chats that are over and long answers that
run, of several sizes; then the level rises.  Its process's anonymous memory is read until nine
tenths of what it will give back are back.

    python benches/pressure_relief.py [--repetitions 5] [--case warning-small ...] [--json FILE]

Aims: warning within 1 s plus 1.5 s for each GB of KV that is kept; critical within 2 s of the end
of the last answer, and for an idle model within 2 s.
"""

import argparse
import asyncio
import contextlib
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
from harness import describe_machine, private_bytes

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from support.long_models import demo_variant
from support.pressure import CONTEXT_TOKENS, NUM_LAYERS, REAL_LAYERS
from support.serving import MACHINE, collect, request, serving, until
from support.traffic import errands_of

from brim.config.tree import CacheSettings, GovernorSettings, Settings
from brim.core.answer import FinishReason
from brim.core.event import Event
from brim.core.machine import Conditions, Pressure
from brim.core.plan import Plan
from brim.governor.loop import Governor
from brim.planner.plan import make_plan
from brim.registry.describe import describe_gguf
from brim.runtime.answer import StreamedAnswer
from brim.runtime.gateway import Gateway

GB = 10**9
POLL_S = 0.01
GIVEN_BACK = 0.9
"""Of what a step gives back in the end: the rest is pages that the system takes apart later."""

FALLEN = 0.9
"""Of a footprint: nothing but the governor gives back a tenth of it."""

REST_S = 1.5
"""Without a change of more than 1 % for so long, a footprint that fell has come to rest."""

WATCH_LIMIT_S = 30.0
"""Longer than any answer here; what has not come back by then does not."""

PROMPT_TOKENS = 800
NUM_IDLE = 8


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """What the models do when the level rises."""

    name: str
    level: Pressure
    num_running: int = 0
    answer_tokens: int = 0
    """Of each that runs."""
    is_woken: bool = True
    """Whether the system notifies, or the next look finds it."""


CASES = (
    Case(name="warning-idle", level=Pressure.WARNING),
    Case(name="warning-polled", level=Pressure.WARNING, is_woken=False),
    Case(name="warning-small", level=Pressure.WARNING, num_running=3, answer_tokens=2_000),
    Case(name="warning-large", level=Pressure.WARNING, num_running=12, answer_tokens=4_000),
    Case(name="critical-idle", level=Pressure.CRITICAL),
    Case(name="critical-busy", level=Pressure.CRITICAL, num_running=3, answer_tokens=150),
)


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One rise of the level."""

    case: str
    before_bytes: int
    after_bytes: int
    pool_tokens_after: int
    """0 where the model left."""
    kv_kept_bytes: int
    kv_used_bytes: int
    """What running sequences held of it when the level rose."""
    seconds: float
    """From the rise to nine tenths of the memory given back."""
    gone_s: float | None = None
    """From the rise, or the end of the last answer, to the end of the process, at critical."""
    num_cut: int = 0
    """Running answers that had not come to their bound when the process was gone."""

    @property
    def decisive_s(self) -> float:
        """What the aim is about."""
        return self.seconds if self.gone_s is None else self.gone_s

    @property
    def limit_s(self) -> float:
        """What the case allows."""
        return 1.0 + 1.5 * self.kv_kept_bytes / GB if self.gone_s is None else 2.0


def plan(name: str) -> Plan:
    """One of the models of the pressure bench, in the exact profile."""
    real = REAL_LAYERS[name]
    path = demo_variant(
        name, real_layers=real, silent_layers=NUM_LAYERS - real, context_tokens=CONTEXT_TOKENS
    )
    return make_plan(
        describe_gguf(path),
        MACHINE,
        engine="llamacpp",
        context_tokens=CONTEXT_TOKENS,
        max_sequences=16,
        exact_profile=True,
    )


class Machine:
    """Feels what it is told to."""

    def __init__(self) -> None:
        self.pressure = Pressure.NORMAL

    def __call__(self) -> Conditions:
        return Conditions(pressure=self.pressure)


@contextlib.asynccontextmanager
async def governed(plans: list[Plan]) -> AsyncIterator[tuple[Gateway, Governor, Machine]]:
    """A gateway whose governor reads a machine of ours."""
    machine = Machine()
    settings = Settings(cache=CacheSettings(enabled=False))
    async with serving(*plans, settings=settings) as gateway:
        governor = Governor(machine, gateway.actuator, gateway.event_log, GovernorSettings())
        running = asyncio.create_task(governor.run())
        try:
            yield gateway, governor, machine
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


def anonymous_bytes(pid: int | None) -> int:
    """Of one process; 0 where it is gone."""
    if pid is None:
        return 0
    try:
        return private_bytes(pid)["Pss_Anon"]
    except (FileNotFoundError, ProcessLookupError, KeyError):
        return 0


async def start_work(gateway: Gateway, case: Case, model: str) -> list[StreamedAnswer]:
    """Chats that are over by now, and answers that run, each past its first token."""
    errands = errands_of(model)
    for errand in errands[:NUM_IDLE]:
        content = errand.messages[0]["content"]
        await collect(await gateway.submit(request(content, model=model, max_tokens=20)))
    code = "".join(errand.prompt for errand in errands)
    answers = []
    for number in range(case.num_running):
        prompt = f"# {number}\n{code[: 3 * PROMPT_TOKENS]}"
        asked = request(prompt=prompt, model=model, max_tokens=case.answer_tokens)
        answers.append(await gateway.submit(asked))
    return answers


class Reader:
    """Reads answers to their ends, and knows when the last one came."""

    def __init__(self, answers: list[StreamedAnswer]) -> None:
        self.num_begun = self.num_answered = 0
        self.last_end_s = 0.0
        self._tasks = [asyncio.create_task(self._read(answer)) for answer in answers]

    async def _read(self, answer: StreamedAnswer) -> None:
        has_begun = False
        async for deltas in answer:
            self.num_begun += not has_begun
            has_begun = True
            if deltas[-1].finish_reason is FinishReason.LENGTH:
                self.num_answered += 1
        self.last_end_s = time.monotonic()

    def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()


async def measure(case: Case) -> Sample:
    """One rise, from a fresh gateway."""
    async with governed([plan("six")]) as (gateway, governor, machine):
        answers = await start_work(gateway, case, "six")
        reader = Reader(answers)
        await until(lambda: reader.num_begun == case.num_running, limit_s=60.0)
        stats = await gateway.worker_stats("six")
        pid = gateway.models()[0].pid
        before = anonymous_bytes(pid)
        if not case.is_woken:
            await asyncio.sleep(random.uniform(0.0, 1.0))
        rise_s, machine.pressure = time.monotonic(), case.level
        if case.is_woken:
            governor.wake()
        is_critical = case.level is Pressure.CRITICAL
        trace = await footprints(pid, has_to_end=is_critical)
        gone_s = trace[-1][0] - max(rise_s, reader.last_end_s) if is_critical else None
        num_cut = case.num_running - reader.num_answered if is_critical else 0
        reader.cancel()
        for answer in answers:
            answer.cancel()
        event = shrinking(gateway.event_log.events())
    after = trace[-1][1]
    threshold = before - GIVEN_BACK * (before - after)
    kept_tokens = 0 if event is None else int(event.detail["pool_tokens_after"])
    token_bytes = stats.kv_bytes // max(1, stats.kv_tokens)
    return Sample(
        case=case.name,
        before_bytes=before,
        after_bytes=after,
        pool_tokens_after=kept_tokens,
        kv_kept_bytes=kept_tokens * token_bytes,
        kv_used_bytes=stats.num_needed_tokens * token_bytes,
        seconds=next(at_s for at_s, num_bytes in trace if num_bytes <= threshold) - rise_s,
        gone_s=gone_s,
        num_cut=num_cut,
    )


async def footprints(pid: int | None, *, has_to_end: bool) -> list[tuple[float, int]]:
    """(when, bytes) of a process until it is gone or, where it stays, has fallen and rests."""
    start_s = rest_s = time.monotonic()
    first = rest = anonymous_bytes(pid)
    trace = [(start_s, first)]
    while trace[-1][1] and trace[-1][0] - start_s < WATCH_LIMIT_S:
        await asyncio.sleep(POLL_S)
        now_s, now = time.monotonic(), anonymous_bytes(pid)
        trace.append((now_s, now))
        if abs(now - rest) > first // 100:
            rest, rest_s = now, now_s
        if not has_to_end and now < FALLEN * first and now_s - rest_s > REST_S:
            break
    return trace


def shrinking(events: list[Event]) -> Event | None:
    """The first event of a smaller pool."""
    return next((event for event in events if "pool_tokens_after" in event.detail), None)


def show(case: Case, samples: list[Sample]) -> bool:
    """One case in a line; whether the aim was met by the median."""
    times_s = [each.decisive_s for each in samples]
    limit_s = statistics.median(each.limit_s for each in samples)
    first = samples[0]
    print(
        f"{case.name:16} {statistics.median(times_s):6.2f} s of {limit_s:.2f} "
        f"({min(times_s):.2f} to {max(times_s):.2f}, n={len(samples)}); "
        f"nine tenths back after {statistics.median(each.seconds for each in samples):.2f} s; "
        f"{first.before_bytes / GB:.2f} to {first.after_bytes / GB:.2f} GB, "
        f"{first.kv_kept_bytes / GB:.2f} GB of KV kept, "
        f"{first.kv_used_bytes / GB:.2f} needed",
        flush=True,
    )
    num_cut = sum(each.num_cut for each in samples)
    if num_cut:
        print(f"  {num_cut} running answers were cut")
    return statistics.median(times_s) <= limit_s and not num_cut


def main() -> int:
    """Measure and print; exit 1 where an aim was missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--case", nargs="*", choices=[case.name for case in CASES])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(describe_machine())
    found: list[Sample] = []
    is_met = True
    for case in CASES:
        if args.case and case.name not in args.case:
            continue
        samples = [asyncio.run(measure(case)) for _ in range(args.repetitions)]
        found += samples
        is_met = show(case, samples) and is_met
    if args.json is not None:
        args.json.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n")
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())
