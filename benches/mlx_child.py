"""One side of mlx_throughput.py in a process of its own: brim's worker path, or mlx-lm as it comes.

    python benches/mlx_child.py brim|mlx-lm

Standard input carries one JSON value a line: first the plan, then an order for each run; standard
output answers each order with one line.  Between orders it sleeps.  The two sides never share a
process: brim sets memory limits and gives mlx-lm's model classes its own attention.
"""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from brim.core.plan import Plan
from brim.core.sampling import SamplingParams
from brim.engine import factory
from brim.scheduler.loop import Scheduler
from brim.scheduler.sequence import ScheduledRequest


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """Prompts that are sent at once, and one that may come later, beside those who decode."""

    prompts: tuple[tuple[int, ...], ...]
    num_tokens: int
    """Of each answer."""
    sampling: SamplingParams = SamplingParams(temperature=0.0)
    late_prompt: tuple[int, ...] = ()
    late_after: int = 4
    """Tokens that every other answer has when the late prompt is sent."""
    late_tokens: int = 2
    """Of the late answer."""
    is_stream: bool = False
    """mlx-lm: `stream_generate` instead of `BatchGenerator`; for a single prompt."""


class Ran(msgspec.Struct, frozen=True, kw_only=True):
    """When tokens came, in seconds from when the order began."""

    times_s: tuple[tuple[float, ...], ...]
    """Of each prompt's answer, the late one's last."""
    late_s: float = 0.0
    """When the late prompt was sent."""
    python_s: float = 0.0
    """brim: spent outside the engine, in the scheduler and in text, on all steps together."""


Side = Callable[[Order], Ran]


class Stamps:
    """Collects times by sequence, and says when the late prompt is due."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._start_s = time.perf_counter()
        self._times: dict[int, list[float]] = {}
        self.late_s = 0.0
        self._is_late_due = bool(order.late_prompt)

    def add(self, sequences: Sequence[int]) -> None:
        """A token came for each of these."""
        now_s = time.perf_counter() - self._start_s
        for sequence in sequences:
            self._times.setdefault(sequence, []).append(now_s)

    def take_late(self) -> bool:
        """Whether the late prompt is to be sent now; true once."""
        after, wanted = self._order.late_after, len(self._order.prompts)
        begun = sum(len(times) >= after for times in self._times.values())
        if not self._is_late_due or begun < wanted:
            return False
        self._is_late_due = False
        self.late_s = time.perf_counter() - self._start_s
        return True

    def ran(self, python_s: float = 0.0) -> Ran:
        """Everything, by the order in which sequences were numbered."""
        times = tuple(tuple(self._times[sequence]) for sequence in sorted(self._times))
        return Ran(times_s=times, late_s=self.late_s, python_s=python_s)


# --- brim --------------------------------------------------------------------------------------


def brim_side(plan: Plan) -> Side:
    """The worker's loop over the engine: schedule, step, absorb, take."""
    engine = factory.create("mlx")
    engine.load(plan)
    scheduler = Scheduler(engine, plan)

    def add(ticket: int, prompt: Sequence[int], num_tokens: int, sampling: SamplingParams) -> None:
        own = msgspec.structs.replace(sampling, ignore_eos=True, seed=ticket)
        scheduler.add(
            ScheduledRequest(
                ticket=ticket, prompt_tokens=prompt, max_tokens=num_tokens, sampling=own
            )
        )

    def run(order: Order) -> Ran:
        stamps, python_s = Stamps(order), 0.0
        for ticket, prompt in enumerate(order.prompts):
            add(ticket, prompt, order.num_tokens, order.sampling)
        while scheduler.has_work:
            if stamps.take_late():
                add(len(order.prompts), order.late_prompt, order.late_tokens, order.sampling)
            begin_s = time.perf_counter()
            step = scheduler.schedule()
            if step is None:
                raise SystemExit("the scheduler has work and no step; report this as a defect")
            engine_s = time.perf_counter()
            result = engine.step(step)
            stepped_s = time.perf_counter()
            # Sequences are opened in the order of their tickets, on the lowest free ids.
            stamps.add([sampled.seq_id for sampled in result.sampled])
            scheduler.absorb(result)
            scheduler.take()
            python_s += engine_s - begin_s + time.perf_counter() - stepped_s
        return stamps.ran(python_s)

    return run


# --- mlx-lm ------------------------------------------------------------------------------------


def mlx_lm_side(plan: Plan) -> Side:
    """`BatchGenerator` and `stream_generate` with mlx-lm's own defaults."""
    from mlx_lm import load, stream_generate
    from mlx_lm.generate import BatchGenerator
    from mlx_lm.sample_utils import make_sampler

    model, tokenizer = load(str(Path(plan.model.paths[0]).parent))[:2]
    tokenizer.eos_token_ids = set()  # brim's side forbids the end as well

    def sampler_of(order: Order) -> Any:
        wanted = order.sampling
        if wanted.is_greedy:
            return make_sampler(0.0)
        return make_sampler(wanted.temperature, wanted.top_p, wanted.min_p, top_k=wanted.top_k)

    def stream(order: Order) -> Ran:
        stamps, sampler = Stamps(order), sampler_of(order)
        (prompt,) = order.prompts
        for answer in stream_generate(
            model, tokenizer, list(prompt), max_tokens=order.num_tokens, sampler=sampler
        ):
            stamps.add([0] if answer.finish_reason is None else [])
        # The last token comes with the end, after text that was held back.
        stamps.add([0])
        return stamps.ran()

    def batch(order: Order) -> Ran:
        stamps = Stamps(order)
        generator = BatchGenerator(model, sampler=sampler_of(order))
        generator.insert([list(p) for p in order.prompts], [order.num_tokens] * len(order.prompts))
        while responses := generator.next_generated():
            stamps.add([response.uid for response in responses])
            if stamps.take_late():
                generator.insert([list(order.late_prompt)], [order.late_tokens])
        generator.close()
        return stamps.ran()

    return lambda order: stream(order) if order.is_stream else batch(order)


def main() -> None:
    """Load the plan of the first line, then serve orders until the end of input."""
    lines = iter(sys.stdin.buffer)
    plan = msgspec.json.decode(next(lines), type=Plan)
    side = {"brim": brim_side, "mlx-lm": mlx_lm_side}[sys.argv[1]](plan)
    for line in lines:
        ran = side(msgspec.json.decode(line, type=Order))
        print(msgspec.json.encode(ran).decode(), flush=True)


if __name__ == "__main__":
    main()
