"""From the start of `python -m brim run` to the first byte of its answer, files in the page cache.

Each run is a new process that answers with the demo model; its output is a pipe and the clock stops
when the first byte is there.  Beside the whole, its parts are timed in processes of their own, as
far as they can be had apart: the interpreter alone, the imports of the command, the worker from its
start to its greeting, and the load.

    python benches/first_token.py [--model demo] [--runs 9]

Aim: a median of at most 1.5 s.
"""

import argparse
import asyncio
import itertools
import subprocess
import sys
import time

from harness import describe_machine, served_plan, show

from brim.core.plan import Plan
from brim.core.request import Request
from brim.core.sampling import SamplingParams
from brim.runtime.worker_process import Deltas, WorkerProcess

PROMPT = "Return the sum of the items of a list."

IMPORTS = (
    "import brim.__main__, brim.cli.app, brim.cli.conversation, brim.cli.planning, "
    "brim.machine.reading"
)
"""What `brim run` has imported when it starts the worker."""


def first_byte_s(model: str) -> float:
    """One run of the command; it is killed once the answer has begun."""
    start_s = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "brim", "run", "-m", model, "--seed", "1", PROMPT],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    first = process.stdout.read(1)
    elapsed_s = time.perf_counter() - start_s
    process.kill()
    process.communicate()
    if not first:
        raise SystemExit("the command ended without an answer; run it by hand to see why")
    return elapsed_s


def python_s(code: str) -> float:
    """A Python process that runs `code`, from start to exit."""
    start_s = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start_s


async def worker_s(plan: Plan) -> dict[str, float]:
    """A worker's stations up to its first token, in seconds after the one before."""
    first = asyncio.get_running_loop().create_future()

    def on_deltas(deltas: Deltas) -> None:
        if not first.done():
            first.set_result(deltas)

    sampling = SamplingParams(seed=1)
    request = Request(
        request_id="first", model=plan.model.name, prompt=PROMPT, max_tokens=8, sampling=sampling
    )
    times = [time.perf_counter()]
    worker = await WorkerProcess.spawn(plan, on_deltas)
    try:
        times.append(time.perf_counter())
        await worker.load(plan)
        times.append(time.perf_counter())
        await worker.prepare(0, request)
        worker.start(0, 8)
        await first
        times.append(time.perf_counter())
    finally:
        await worker.kill()
    names = ("worker start to greeting", "load", "prepare, prefill, first text")
    return dict(zip(names, (b - a for a, b in itertools.pairwise(times)), strict=True))


def main() -> None:
    """Read the options, warm up once, measure in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--runs", type=int, default=9)
    args = parser.parse_args()
    plan = served_plan(args.model)
    print(f"first token of `brim run`, {plan.model.name}, {describe_machine()}")
    first_byte_s(args.model)
    samples: dict[str, list[float]] = {}
    for _ in range(args.runs):
        parts = {
            "process start to first byte of the answer": first_byte_s(args.model),
            "  an interpreter that does nothing": python_s("pass"),
            "  the command's imports, interpreter included": python_s(IMPORTS),
        } | {f"  {name}": value for name, value in asyncio.run(worker_s(plan)).items()}
        for name, value in parts.items():
            samples.setdefault(name, []).append(value * 1000)
    for name, values in samples.items():
        show(name, values, "ms", digits=0)


if __name__ == "__main__":
    main()
