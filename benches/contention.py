"""Decode rate beside busy processes, against the rate without them, in one run.

A laptop always runs something else.  Threads that spin while they wait for each other do well on an
idle machine and collapse beside a competitor of equal priority; this shows both, for brim, which
takes fewer threads there, for llama-server if it is named, and for a bare llama.cpp loop under
several OpenMP wait policies, whose number of threads is fixed.

    python benches/contention.py MODEL [--llama-server PROGRAM] [--competitors 1] [--repetitions 3]

Each repetition measures all of them idle and then all of them beside spinning processes (one per
core unless told otherwise), which the script starts and stops by process id.
"""

import argparse
import asyncio
import contextlib
import functools
import os
from collections.abc import Callable

import msgspec
from bare_loop import Order
from harness import (
    BareLoop,
    Served,
    brim_serve,
    competitors,
    describe_machine,
    llama_server,
    quietly,
    served_plan,
    serving,
    show,
)
from make_standin import default_path

from brim.bench.client import Connection, Endpoint
from brim.bench.serve import reach
from brim.bench.workload import RecordedRequest

PROMPT = "def read_lines(path):\n    "

POLICIES: dict[str, dict[str, str]] = {
    "bare loop, OpenMP's default": {},
    "bare loop, GOMP_SPINCOUNT=3000": {"GOMP_SPINCOUNT": "3000"},
    "bare loop, GOMP_SPINCOUNT=300": {"GOMP_SPINCOUNT": "300"},
    "bare loop, OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
}
"""Environments; without any, GNU OpenMP spins for milliseconds before it sleeps."""

Measure = Callable[[int], float]
"""Number of tokens -> decode rate in tokens a second."""


def over_http(served: Served) -> Measure:
    """The rate as a streaming client sees it."""

    async def once(num_tokens: int) -> float:
        endpoint = Endpoint.parse(f"server={served.url}")
        target = await reach(endpoint)
        connection = Connection(endpoint)
        request = RecordedRequest(id="contention", max_tokens=num_tokens, prompt=PROMPT)
        answer = await target.ask(connection, request)
        connection.close()
        if answer.error or not answer.time_per_token_s:
            raise SystemExit(f"no answer: {answer.error}")
        return 1 / answer.time_per_token_s

    return lambda num_tokens: asyncio.run(once(num_tokens))


def bare(loop: BareLoop) -> Measure:
    """The rate of the loop itself."""
    return lambda num_tokens: loop.run(Order(prompt=PROMPT, num_tokens=num_tokens)).decode_tok_s


def main() -> None:
    """Read the options, start everything, measure in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(default_path()), help="as `brim serve`")
    parser.add_argument("--llama-server", help="its program file; measured with its own defaults")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--competitors", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--idle-tokens", type=int, default=48)
    parser.add_argument("--busy-tokens", type=int, default=48, help="brim tries threads for 12")
    args = parser.parse_args()
    plan = served_plan(args.model)
    num_competitors = args.competitors
    print(
        f"decode beside {num_competitors} busy processes, {plan.model.name}, {describe_machine()}"
    )
    with contextlib.ExitStack() as stack:
        measured: dict[str, Measure] = {
            "brim serve": over_http(stack.enter_context(serving(brim_serve(args.model))))
        }
        if args.llama_server:
            command = llama_server(args.llama_server, plan)
            measured["llama-server"] = over_http(stack.enter_context(serving(command)))
        # On every core, as llama.cpp's own programs run: what the policies are about.
        wide = msgspec.structs.replace(plan, num_threads=plan.num_batch_threads)
        for name, policy in POLICIES.items():
            environment = {"OMP_NUM_THREADS": str(wide.num_threads)} | policy
            measured[name] = bare(stack.enter_context(BareLoop(wide, environment)))
        report(measured, args, num_competitors)


def report(measured: dict[str, Measure], args: argparse.Namespace, num_competitors: int) -> None:
    """Measure in turn and print a row for each rate and ratio."""
    idle: dict[str, list[float]] = {name: [] for name in measured}
    busy: dict[str, list[float]] = {name: [] for name in measured}
    for measure in measured.values():
        measure(8)  # pages in the weights
    for _ in range(args.repetitions):
        for name, measure in measured.items():
            idle[name].append(quietly(functools.partial(measure, args.idle_tokens)))
        with competitors(num_competitors):
            for name, measure in measured.items():
                busy[name].append(measure(args.busy_tokens))
    for name in measured:
        show(f"{name}, idle", idle[name], "tok/s", digits=1)
        show(f"{name}, beside", busy[name], "tok/s", digits=1)
        ratios = [b / i for b, i in zip(busy[name], idle[name], strict=True)]
        show(f"{name}, beside / idle", ratios)


if __name__ == "__main__":
    main()
