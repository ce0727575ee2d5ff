"""brim on MLX against mlx-lm itself, in one run: eight sequences, a single stream, long prompts.

Two processes take turns on the same model, in another order each time (mlx_child.py): brim's
scheduler over its MLX engine, as a worker runs them, and mlx-lm's own `BatchGenerator` and
`stream_generate`.  Both have the environment of brim's plan, the same prompt tokens, and no end but
the number of tokens.  Rates are of decode, over the steps in which every sequence got a token; each
pair gives a ratio.

    python benches/mlx_throughput.py [MODEL_DIR] [--part batch,single,prefill,stall,http]
        [--sampling greedy,default] [--pairs 3] [--tokens 32] [--long 512]

MODEL_DIR is the stand-in of `make_standin.py --quant "MLX bf16"` unless given.  Aims: batch of
eight at 0.95 of `BatchGenerator` or more, single stream at 0.97 of `stream_generate` or more.
"""

import argparse
import asyncio
import itertools
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

from harness import Child, brim_serve, describe_machine, serving, show
from make_standin import mlx_path
from mlx_child import Order, Ran

from brim.bench.client import Connection, Endpoint
from brim.bench.serve import reach
from brim.bench.workload import RecordedRequest
from brim.core.plan import Plan
from brim.core.sampling import SamplingParams
from brim.errors import BrimError
from brim.machine.reading import read_machine
from brim.planner.plan import make_plan
from brim.registry.describe_safetensors import describe_directory
from brim.runtime.worker_start import worker_environment

SAMPLINGS = {"greedy": SamplingParams(temperature=0.0), "default": SamplingParams()}

NUM_SEQUENCES = 8

PROMPT_LENGTHS = range(6, 6 + 2 * NUM_SEQUENCES, 2)
"""Different, so that a batch is ragged; short, because MLX reads 30 tokens a second on two cores
with a stand-in of 113 M parameters."""

CONTEXT_TOKENS = 4096

PARTS = ("batch", "single", "prefill", "stall", "http")

ROWS_BESIDE = 48
"""Prompt rows that brim reads in a step beside a decoding client, at the least: an answer must be
long enough to last until the long prompt is read."""


def rate(ran: Ran) -> float:
    """Tokens a second over the steps in which every sequence got a token."""
    begin_s = max(times[0] for times in ran.times_s)
    end_s = min(times[-1] for times in ran.times_s)
    number = sum(begin_s < at_s <= end_s for times in ran.times_s for at_s in times)
    return number / (end_s - begin_s)


def whole_rate(ran: Ran) -> float:
    """Tokens a second from the order to the last token, prompts included."""
    return sum(map(len, ran.times_s)) / max(times[-1] for times in ran.times_s)


def longest_gap(ran: Ran) -> float:
    """Longest silence of the answer that was under way, in seconds, once the late prompt came."""
    times = [at_s for at_s in ran.times_s[0] if at_s >= ran.late_s]
    return max([times[0] - ran.late_s, *(b - a for a, b in itertools.pairwise(times))])


class Side(Child):
    """One side, mlx_child.py as a child process."""

    def __init__(self, name: str, plan: Plan) -> None:
        environment = worker_environment(plan, os.environ)
        super().__init__(f"the {name} side", ["mlx_child.py", name], plan, environment)

    def run(self, order: Order) -> Ran:
        """Have one order done."""
        return self._ask(order, Ran)


class Pairs:
    """Runs orders on both sides, turn by turn."""

    def __init__(self, ours: Side, theirs: Side, number: int) -> None:
        self._sides = (ours, theirs)
        self._number = number

    @property
    def number(self) -> int:
        """Pairs of each figure."""
        return self._number

    def alone(self, order: Order) -> Ran:
        """mlx-lm's answer."""
        return self._sides[1].run(order)

    def run(self, order: Order) -> tuple[list[Ran], list[Ran]]:
        """Both sides' answers, brim's first; the side that begins changes."""
        found: dict[str, list[Ran]] = {side.name: [] for side in self._sides}
        for turn in range(self._number):
            for side in self._sides[:: 1 if turn % 2 == 0 else -1]:
                found[side.name].append(side.run(order))
        ours, theirs = (found[side.name] for side in self._sides)
        return ours, theirs


def report(
    label: str,
    runs: tuple[list[Ran], list[Ran]],
    figure: Callable[[Ran], float],
    unit: str,
    peer: str,
) -> None:
    """Both sides' medians, and the ratio pair by pair."""
    ours, theirs = ([figure(ran) for ran in side] for side in runs)
    show(f"{label}, brim", ours, unit)
    show(f"{label}, {peer}", theirs, unit)
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    show(f"{label}, brim / {peer}", ratios, digits=3)


# --- what is measured --------------------------------------------------------------------------


def batch(pairs: Pairs, prompts: list[tuple[int, ...]], name: str, num_tokens: int) -> None:
    order = Order(prompts=tuple(prompts), num_tokens=num_tokens, sampling=SAMPLINGS[name])
    runs = pairs.run(order)
    label = f"{len(prompts)} sequences, {name}"
    report(label, runs, rate, "tok/s", "BatchGenerator")
    report(f"{label}, with prompts", runs, whole_rate, "tok/s", "BatchGenerator")
    per_step = [ran.python_s / num_tokens * 1e3 for ran in runs[0]]
    show(f"{label}, brim outside its engine", per_step, "ms/step")


def single(pairs: Pairs, prompts: list[tuple[int, ...]], name: str, num_tokens: int) -> None:
    order = Order(
        prompts=(prompts[-1],), num_tokens=num_tokens, sampling=SAMPLINGS[name], is_stream=True
    )
    report(f"single stream, {name}", pairs.run(order), rate, "tok/s", "stream_generate")


def prefill(pairs: Pairs, long_prompt: tuple[int, ...]) -> None:
    runs = pairs.run(Order(prompts=(long_prompt,), num_tokens=2, is_stream=True))
    number = len(long_prompt)
    report(f"prefill of {number}", runs, lambda ran: number / ran.times_s[0][0], "tok/s", "mlx-lm")


def stall(pairs: Pairs, prompts: list[tuple[int, ...]], long_prompt: tuple[int, ...]) -> None:
    order = Order(
        prompts=(prompts[0],),
        num_tokens=8 + len(long_prompt) // ROWS_BESIDE,
        late_prompt=long_prompt,
    )
    runs = pairs.run(order)
    label = f"reading {len(long_prompt)} beside a client"
    report(f"{label}: stall", runs, longest_gap, "s", "BatchGenerator")
    first = lambda ran: ran.times_s[-1][0] - ran.late_s  # noqa: E731
    report(f"{label}: first token", runs, first, "s", "BatchGenerator")


def over_http(
    pairs: Pairs, directory: Path, prompts: list[tuple[int, ...]], num_tokens: int
) -> None:
    """Eight clients of `brim serve` against BatchGenerator, prompts included on both sides."""
    order = Order(prompts=tuple(prompts), num_tokens=num_tokens)
    found: dict[str, list[float]] = {"brim": [], "theirs": []}
    with serving(brim_serve(str(directory), "--engine", "mlx")) as served:
        endpoint = Endpoint.parse(f"brim={served.url}")

        def run(side: str) -> float:
            if side == "brim":
                return asyncio.run(_clients(endpoint, prompts, num_tokens))
            return whole_rate(pairs.alone(order))

        for turn in range(pairs.number):
            for side in list(found)[:: 1 if turn % 2 == 0 else -1]:
                found[side].append(run(side))
    ours, theirs = found.values()
    label = f"{len(prompts)} clients over HTTP, greedy"
    show(f"{label}, brim", ours, "tok/s")
    show(f"{label}, BatchGenerator", theirs, "tok/s")
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    show(f"{label}, brim / BatchGenerator", ratios, digits=3)


async def _clients(endpoint: Endpoint, prompts: list[tuple[int, ...]], num_tokens: int) -> float:
    """Tokens a second of eight streams that are asked for at once."""
    target = await reach(endpoint)
    connections = [Connection(endpoint) for _ in prompts]
    requests = [
        target.ask(
            connection,
            RecordedRequest(id="", max_tokens=num_tokens, prompt=""),
            prompt=list(prompt),
        )
        for connection, prompt in zip(connections, prompts, strict=True)
    ]
    begin_s = time.perf_counter()
    answers = await asyncio.gather(*requests)
    wall_s = time.perf_counter() - begin_s
    for connection in connections:
        connection.close()
    for answer in answers:
        if answer.error:
            raise SystemExit(f"a client got no answer: {answer.error}")
    return sum(answer.num_completion_tokens for answer in answers) / wall_s


# --- the run -----------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", type=Path, default=mlx_path())
    parser.add_argument("--part", default=",".join(PARTS))
    parser.add_argument("--sampling", default=",".join(SAMPLINGS))
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32, help="of each answer; at least 2")
    parser.add_argument("--long", type=int, default=512, help="tokens of the long prompt")
    args = parser.parse_args()
    for given, known in ((args.part, PARTS), (args.sampling, SAMPLINGS)):
        if unknown := set(given.split(",")) - set(known):
            parser.error(f"nothing is called {min(unknown)}; choose of {', '.join(known)}")
    if args.pairs < 1 or args.tokens < 2 or args.long < 1:
        parser.error("give at least one pair, two tokens of an answer and one of a prompt")
    return args


def plan_of(model_dir: Path) -> Plan:
    """The plan that both sides have."""
    try:
        return make_plan(
            describe_directory(model_dir),
            read_machine(),
            engine="mlx",
            context_tokens=CONTEXT_TOKENS,
            max_sequences=NUM_SEQUENCES,
        )
    except BrimError as error:
        raise SystemExit(
            f'{error}; the stand-in is made by: make_standin.py --quant "MLX bf16"'
        ) from None


def main() -> None:
    """Read the options, start both sides, measure in turn."""
    args = parse()
    parts, samplings = args.part.split(","), args.sampling.split(",")
    plan = plan_of(args.model)
    rng = random.Random(1)
    prompts = [
        tuple(rng.randrange(plan.model.vocab_size - 2) for _ in range(length))
        for length in PROMPT_LENGTHS
    ]
    long_prompt = tuple(rng.randrange(plan.model.vocab_size - 2) for _ in range(args.long))
    parameters = plan.model.num_parameters / 1e6
    print(f"mlx throughput, {plan.model.name}, {parameters:.0f} M, {describe_machine()}")
    with Side("brim", plan) as ours, Side("mlx-lm", plan) as theirs:
        warm = Order(prompts=(prompts[0],), num_tokens=2)
        for side in (ours, theirs):
            side.run(warm)  # not counted: loads, and compiles what is compiled
        pairs = Pairs(ours, theirs, args.pairs)
        for name in samplings:
            if "batch" in parts:
                batch(pairs, prompts, name, args.tokens)
            if "single" in parts:
                single(pairs, prompts, name, args.tokens)
        if "prefill" in parts:
            prefill(pairs, long_prompt)
        if "stall" in parts:
            stall(pairs, prompts, long_prompt)
        if "http" in parts:
            over_http(pairs, args.model, prompts, args.tokens)


if __name__ == "__main__":
    main()
