"""A scheduler over the teaching engine, and what its deltas add up to."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.models import plan_for
from support.toy_caches import options

from brim.core.answer import Delta
from brim.core.sampling import SamplingParams
from brim.core.step import StepPlan
from brim.engine.base import Engine
from brim.engine.toy import ToyEngine
from brim.errors import BrimError
from brim.prefix_cache.store import Model, PrefixCache
from brim.scheduler.loop import Scheduler
from brim.scheduler.sequence import ScheduledRequest

ENDLESS = SamplingParams(temperature=0.0, ignore_eos=True)


class Bench:
    """One engine, its scheduler, and everything that came out, by (ticket, choice)."""

    def __init__(self, engine: Engine, *, cache: Any = None, **overrides: Any) -> None:
        self.engine = engine
        self.plan = plan_for("toy", **overrides)
        engine.load(self.plan)
        self.now_s = 0.0
        self.decode_s, self.row_s = 0.02, 0.0055
        self.scheduler = Scheduler(
            engine,
            self.plan,
            cache=cache,
            min_kept_tokens=32,
            clock=lambda: self.now_s,
            draw_seed=lambda: 1234,
        )
        self.deltas: dict[tuple[int, int], list[Delta]] = {}

    def add(self, ticket: int, num_prompt_tokens: int = 20, **fields: Any) -> list[int]:
        """Add a request whose prompt differs from every other ticket's; returns the prompt."""
        prompt = [(7 * ticket + 3 * i) % 256 for i in range(num_prompt_tokens)]
        fields.setdefault("max_tokens", 5)
        fields.setdefault("sampling", ENDLESS)
        fields.setdefault("arrived_s", self.now_s)
        self.scheduler.add(ScheduledRequest(ticket=ticket, prompt_tokens=prompt, **fields))
        return prompt

    def step(self) -> None:
        """One round, which takes as long as its rows do."""
        plan = self.scheduler.schedule()
        if plan is not None:
            self.run_step(plan)
        self.keep(self.scheduler.take())

    def run_step(self, plan: StepPlan) -> None:
        try:
            result = self.engine.step(plan)
        except BrimError as error:
            self.scheduler.fail(error)
            return
        num_rows = plan.num_scheduled_tokens
        self.now_s += self.decode_s + self.row_s * (num_rows if num_rows > 16 else 0)
        self.scheduler.absorb(result)

    def keep(self, deltas: Iterable[tuple[int, Delta]]) -> None:
        for ticket, delta in deltas:
            self.deltas.setdefault((ticket, delta.index), []).append(delta)

    def run(self) -> None:
        """Step until nothing is left."""
        for _ in range(10_000):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError("the scheduler does not come to an end")

    def text(self, ticket: int, index: int = 0) -> str:
        return "".join(delta.text for delta in self.deltas[ticket, index])

    def last(self, ticket: int, index: int = 0) -> Delta:
        return self.deltas[ticket, index][-1]

    def rows(self) -> list[int]:
        """Rows of each feed of the next step, which then runs."""
        plan = self.scheduler.schedule()
        assert plan is not None
        self.run_step(plan)
        self.keep(self.scheduler.take())
        return [len(feed.tokens) for feed in plan.feeds]

    def alone(self, prompt: list[int], max_tokens: int, sampling: SamplingParams) -> str:
        """The text that a fresh engine makes of one prompt, without a scheduler."""
        from support.driver import generate

        engine = ToyEngine()
        engine.load(self.plan)
        chunk = self.plan.max_batch_tokens
        run = generate(engine, prompt, max_tokens, sampling, chunk=chunk)
        tokens = run.tokens
        for position, token in enumerate(tokens):
            if token in engine.tokenizer.eog_tokens:
                tokens = tokens[:position]
                break
        return engine.tokenizer.decode(tokens)


@pytest.fixture
def make_bench() -> Callable[..., Bench]:
    def make(engine: Engine | None = None, **overrides: Any) -> Bench:
        return Bench(engine or ToyEngine(), **overrides)

    return make


@pytest.fixture
def bench(make_bench: Callable[..., Bench]) -> Bench:
    return make_bench()


@pytest.fixture
def make_cache(tmp_path: Path) -> Iterator[Callable[[ToyEngine], PrefixCache]]:
    """A store as a worker with this engine opens it; the same directory each time."""
    opened: list[PrefixCache] = []

    def make(engine: ToyEngine) -> PrefixCache:
        cache = PrefixCache(
            options(tmp_path / "store"),
            Model(name="toy", paths=(), identity=engine.kv_identity),
            can_cut=engine.capabilities.can_truncate,
            can_export_range=engine.capabilities.can_export_range,
        )
        opened.append(cache)
        return cache

    yield make
    for cache in opened:
        cache.close()
