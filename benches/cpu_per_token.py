"""CPU time per token of the worker outside its engine, and of the gateway.

The worker is started without a gateway around it, streams answers, and tells its own counters: CPU
time of the loop's thread and of the reader's thread, less the loop's CPU time inside the engine's
step.  The gateway is a real `brim serve` read by raw streaming clients, and its CPU time is the
system's account of that process, requests included.

Rates matter: at thousands of tokens a second everything is in the caches; beside a large model,
which sweeps them at every step, the same code takes several times as long.  So give it the model
that the figure is for.

    python benches/cpu_per_token.py MODEL [--tokens 256] [--streams 1,8] [--repetitions 5]

Aims, without logprobs and on the demo model: worker <= 60 us, gateway <= 300 us.
"""

import argparse
import asyncio
import statistics
import time

from harness import Served, brim_serve, cpu_s, describe_machine, served_plan, serving, show

from brim.bench.client import Connection, Endpoint
from brim.bench.serve import reach
from brim.bench.workload import RecordedRequest
from brim.core.plan import Plan
from brim.core.request import Request
from brim.core.sampling import SamplingParams
from brim.runtime.worker_process import Deltas, WorkerProcess
from brim.worker.protocol import Stats

PROMPT = "def read_lines(path):\n    "


class Streams:
    """Answers of one worker, by ticket."""

    def __init__(self) -> None:
        self._ended: dict[int, asyncio.Future[None]] = {}
        self._num_tickets = 0

    def on_deltas(self, deltas: Deltas) -> None:
        """Called by the worker's connection."""
        for ticket, delta in deltas:
            if delta.error is not None:
                raise SystemExit(f"the worker failed: {delta.error.message}")
            if delta.finish_reason is not None:
                self._ended[ticket].set_result(None)

    async def run(self, worker: WorkerProcess, request: Request, number: int) -> None:
        """Stream `number` answers at once and wait for all of them."""
        tickets = range(self._num_tickets, self._num_tickets + number)
        self._num_tickets += number
        loop = asyncio.get_running_loop()
        self._ended = {ticket: loop.create_future() for ticket in tickets}
        for ticket in tickets:
            await worker.prepare(ticket, request)
        for ticket in tickets:
            worker.start(ticket, request.max_tokens or 1)
        await asyncio.gather(*self._ended.values())


def outside_us(before: Stats, after: Stats) -> float:
    """Microseconds per token that were not the engine's."""
    spent_s = [
        stats.loop_cpu_s - stats.engine_cpu_s + stats.reader_cpu_s for stats in (before, after)
    ]
    return (spent_s[1] - spent_s[0]) / (after.num_tokens - before.num_tokens) * 1e6


async def measure_worker(plan: Plan, args: argparse.Namespace) -> None:
    """Print one row for each number of sequences and each kind of sampling."""
    streams = Streams()
    worker = await WorkerProcess.spawn(plan, streams.on_deltas)
    try:
        await worker.load(plan)
        for num_logprobs in (None, 0):
            for number in args.streams:
                sampling = SamplingParams(seed=1, ignore_eos=True, num_logprobs=num_logprobs)
                request = Request(
                    request_id="bench", model=plan.model.name, prompt=PROMPT,
                    max_tokens=args.tokens, sampling=sampling,
                )  # fmt: skip
                await streams.run(worker, request, number)
                samples, frames = [], []
                for _ in range(args.repetitions):
                    before = await worker.stats()
                    await streams.run(worker, request, number)
                    after = await worker.stats()
                    samples.append(outside_us(before, after))
                    num_steps = after.num_steps - before.num_steps
                    frames.append((after.num_frames - before.num_frames) / num_steps)
                label = (
                    f"worker, {number} streams, logprobs {'off' if num_logprobs is None else 'on'}"
                )
                show(label, samples, "us/token", digits=1)
                show("    frames per step", frames, digits=2)
    finally:
        await worker.terminate()


def wakes_us(per_second: float) -> list[float]:
    """CPU microseconds that a process pays for waking and nothing else, as often as tokens come.

    What a machine charges for leaving idle: part of the gateway's figure, and none of its doing.
    """
    samples = []
    for _ in range(5):
        before_s = time.process_time()
        num_wakes = max(5, int(per_second))
        for _ in range(num_wakes):
            time.sleep(1 / per_second)
        samples.append((time.process_time() - before_s) / num_wakes * 1e6)
    return samples


async def measure_gateway(served: Served, args: argparse.Namespace) -> None:
    """Print one row for each number of streams."""
    target = await reach(Endpoint.parse(f"brim={served.url}"))
    request = RecordedRequest(id="bench", max_tokens=args.tokens, prompt=PROMPT)
    for number in args.streams:
        connections = [Connection(target.endpoint) for _ in range(number)]
        samples, rates = [], []
        for repetition in range(args.repetitions + 1):
            before_s, start_s = cpu_s(served.pid), time.perf_counter()
            answers = await asyncio.gather(*(target.ask(c, request, seed=1) for c in connections))
            num_tokens = sum(answer.num_completion_tokens for answer in answers)
            if num_tokens != number * args.tokens:
                raise SystemExit(f"{num_tokens} tokens came: {answers[0].error}")
            if repetition:  # the first warms up
                samples.append((cpu_s(served.pid) - before_s) / num_tokens * 1e6)
                rates.append(num_tokens / (time.perf_counter() - start_s))
        for connection in connections:
            connection.close()
        show(f"gateway, {number} streams", samples, "us/token", digits=1)
        show("    rate", rates, "tok/s", digits=0)
        rate = statistics.median(rates) / number
        show(f"    a bare wake {rate:.0f} times a second", wakes_us(rate), "us/wake", digits=1)


def main() -> None:
    """Read the options and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="as `brim serve` takes it")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--streams", type=lambda s: list(map(int, s.split(","))), default=[1, 8])
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    plan = served_plan(args.model)
    print(f"CPU time per token, {plan.model.name}, {describe_machine()}")
    asyncio.run(measure_worker(plan, args))
    with serving(brim_serve(args.model)) as served:
        asyncio.run(measure_gateway(served, args))


if __name__ == "__main__":
    main()
