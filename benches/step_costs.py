"""What a step costs by what is in it, on one thread, so that other programs disturb it little.

Two facts about llama.cpp's shared pool on a CPU that the scheduler's rules are made of:

- `idle`: every row passes over the cells of all sequences.  A step of 1 and of 8 rows beside more
  and more idle cells (`scheduler/upkeep.py`, `CELL_CHECK_S` of the engine); then a long
  answer beside old conversations, with the rule that lets them go and without.
- `tiles`: all rows of a kernel tile compute attention over every cell that one of them looks at.
  CPU time of a prompt's row in steps of 48 and of 64 rows, at several depths, beside 0 to 7
  decoding sequences (`scheduler/pace.py`, FOREIGN_CELLS).

    python benches/step_costs.py [MODEL.gguf] [--what idle|tiles|both]

About three minutes on one core with the default model.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import msgspec
from harness import served_plan
from make_standin import default_path

from brim.core.cache import CacheOptions
from brim.core.plan import Plan
from brim.core.sampling import SamplingParams
from brim.core.step import Feed, StepPlan
from brim.engine import factory
from brim.engine.base import Engine
from brim.prefix_cache.store import Model, PrefixCache
from brim.scheduler import upkeep
from brim.scheduler.loop import Scheduler
from brim.scheduler.sequence import ScheduledRequest

GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)

IDLE_CELLS = (0, 1024, 4096, 7168, 10240)

DEPTHS = (0, 256, 768, 1280)
DECODING = ((1, 600), (3, 150), (7, 150), (3, 600), (7, 600))
"""Sequences that decode, and the tokens in each."""

ANSWER_TOKENS = 768
NUM_OLD, OLD_TOKENS = 10, 600
"""Conversations that lie idle."""

SAMPLES = 4

GIB = 1024**3


def main() -> None:
    """Print the tables that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default=str(default_path()))
    parser.add_argument("--what", choices=("idle", "tiles", "both"), default="both")
    args = parser.parse_args()
    plan = msgspec.structs.replace(
        served_plan(args.model), num_threads=1, num_batch_threads=1, max_sequences=24
    )
    again(plan.environment)
    for what, measure in (("idle", idle_steps), ("idle", conversation), ("tiles", tiles)):
        if args.what in (what, "both"):
            engine = factory.create("llamacpp")
            engine.load(plan)
            measure(engine, plan)
            engine.shutdown()


def again(environment: dict[str, str]) -> None:
    """Start anew with what the plan sets before a worker starts; libraries read it only then."""
    if any(os.environ.get(name) != value for name, value in environment.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **environment})


def tokens(number: int, seed: int = 0) -> list[int]:
    """Of no meaning; more than any vocabulary's special ones."""
    draw = random.Random(seed)
    return [draw.randrange(10, 400) for _ in range(number)]


def read(engine: Engine, plan: Plan, number: int) -> int:
    """A new sequence with so many tokens."""
    sequence = engine.open(GREEDY)
    prompt = tokens(number, seed=sequence)
    for start in range(0, number, plan.max_batch_tokens):
        end = start + plan.max_batch_tokens
        engine.step(StepPlan([Feed(sequence, prompt[start:end], False)]))
    return sequence


def step_ms(engine: Engine, feeds: Sequence[Feed]) -> float:
    """CPU time of one step."""
    start_s = time.thread_time()
    engine.step(StepPlan(list(feeds)))
    return (time.thread_time() - start_s) * 1e3


def decode_ms(engine: Engine, sequences: Sequence[int]) -> float:
    """The least of some steps in which these decode."""
    return min(
        step_ms(engine, [Feed(sequence, tokens(1), True) for sequence in sequences])
        for _ in range(SAMPLES)
    )


def idle_steps(engine: Engine, plan: Plan) -> None:
    """Steps of one and eight rows beside idle cells."""
    decoding = [read(engine, plan, 32) for _ in range(8)]
    source = read(engine, plan, 1024)
    block = bytes(engine.export_kv(source))
    engine.close(source)
    num_idle = 0
    print("idle cells   1 row, ms   8 rows, ms")
    for wanted in IDLE_CELLS:
        while num_idle < wanted:
            engine.import_kv(engine.open(GREEDY), block)
            num_idle += 1024
        one, eight = decode_ms(engine, decoding[:1]), decode_ms(engine, decoding)
        print(f"{num_idle:10} {one:11.1f} {eight:12.1f}")


def conversation(engine: Engine, plan: Plan) -> None:
    """An answer beside old conversations that are kept on disk; they go for their cost, or stay."""
    print(f"{ANSWER_TOKENS} tokens beside {NUM_OLD} idle sequences of {OLD_TOKENS}")
    for name, least in (("they stay", sys.maxsize), ("they go", upkeep.LEAST_CELLS)):
        with tempfile.TemporaryDirectory() as directory, patch.object(upkeep, "LEAST_CELLS", least):
            cache = store(engine, plan, Path(directory))
            scheduler = Scheduler(engine, plan, cache=cache)
            for number in range(NUM_OLD):
                ask(scheduler, number, OLD_TOKENS, 16)
            start_s = time.thread_time()
            ask(scheduler, NUM_OLD, 32, ANSWER_TOKENS)
            spent_s = time.thread_time() - start_s
            cache.close()
        print(
            f"{name}: {ANSWER_TOKENS / spent_s:.2f} tokens a second of CPU time, "
            f"{scheduler.num_idle_tokens} idle cells at the end"
        )
        scheduler.resize(1)  # lets every idle sequence go
        scheduler.resize(plan.kv_tokens)


def store(engine: Engine, plan: Plan, directory: Path) -> PrefixCache:
    """A prefix cache as a worker has it."""
    return PrefixCache(
        CacheOptions(
            directory=str(directory),
            budget_bytes=GIB,
            daily_write_bytes=GIB,
            free_disk_floor_bytes=0,
            max_inflight_bytes=GIB,
            min_tokens=128,
        ),
        Model(name=plan.model.name, paths=(), identity=engine.kv_identity),
        can_cut=engine.capabilities.can_truncate,
        can_export_range=engine.capabilities.can_export_range,
    )


def ask(scheduler: Scheduler, ticket: int, num_prompt_tokens: int, max_tokens: int) -> None:
    """Run one request to its end."""
    scheduler.add(
        ScheduledRequest(
            ticket=ticket,
            prompt_tokens=tokens(num_prompt_tokens, seed=ticket),
            max_tokens=max_tokens,
            sampling=GREEDY,
            arrived_s=time.monotonic(),
            boundaries=(num_prompt_tokens - 1,),
        )
    )
    while scheduler.has_work:
        scheduler.step()


def tiles(engine: Engine, plan: Plan) -> None:
    """A prompt's row beside decoding sequences, in and out of whole tiles."""
    print("decoding  depth   ms a row at 48 rows   at 64")
    for number, length in DECODING:
        decoding = [read(engine, plan, length) for _ in range(number)]
        alone_ms = decode_ms(engine, decoding)
        for depth in DEPTHS:
            prompt = read(engine, plan, depth) if depth else engine.open(GREEDY)
            below, whole = (
                row_ms(engine, decoding, prompt, depth, num_rows - number, alone_ms)
                for num_rows in (48, 64)
            )
            print(f"{number} x {length:<5} {depth:5} {below:21.2f} {whole:7.2f}")
            engine.close(prompt)
        for sequence in decoding:
            engine.close(sequence)


def row_ms(
    engine: Engine,
    decoding: Sequence[int],
    prompt: int,
    depth: int,
    num_rows: int,
    alone_ms: float,
) -> float:
    """What each of a prompt's rows adds to a step in which others decode."""
    found = []
    for _ in range(SAMPLES):
        sequence = engine.open(GREEDY)
        if depth:
            engine.fork(prompt, sequence, depth)
        feeds = [Feed(other, tokens(1), True) for other in decoding]
        found.append(step_ms(engine, [*feeds, Feed(sequence, tokens(num_rows), False)]))
        engine.close(sequence)
    return (min(found) - alone_ms) / num_rows


if __name__ == "__main__":
    main()
