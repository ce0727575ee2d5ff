"""What brim costs on top of llama.cpp: one stream through HTTP against a bare loop, in one run.

Three things decode the same prompt in turn, in another order each time: a bare llama.cpp loop in a
process of its own with the plan that the server has (bare_loop.py), `brim serve` read by a raw
client, and `brim serve` read by the official `openai` client.  Rates are over the tokens after the
first, and compared within each turn; a sample during which other programs worked is taken again.
The gateway's CPU time per token is read from the system.

    python benches/overhead.py [MODEL] [--tokens 128] [--turns 10]

MODEL is the stand-in of make_standin.py unless given.  Aims: raw client >= 0.97 of the bare loop,
openai client >= 0.95, gateway <= 300 us of CPU per token.
"""

import argparse
import asyncio
import functools
import time
from collections.abc import Callable

import openai
from bare_loop import Order
from harness import (
    BareLoop,
    Served,
    brim_serve,
    cpu_s,
    describe_machine,
    quietly,
    served_plan,
    serving,
    show,
)
from make_standin import default_path

from brim.bench.client import Connection, Endpoint
from brim.bench.serve import Target, reach
from brim.bench.workload import RecordedRequest
from brim.core.sampling import SamplingParams

PROMPT = "def read_lines(path):\n    "

SAMPLINGS = {"greedy": SamplingParams(temperature=0.0), "sampled": SamplingParams(seed=1)}


class RawClient:
    """Streams with brim's own measuring client; reports the rate and the gateway's CPU time."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._endpoint = Endpoint.parse(f"brim={served.url}")
        self._target: Target = asyncio.run(reach(self._endpoint))
        self.gateway_us: list[float] = []

    @property
    def model(self) -> str:
        """The served model's name."""
        return self._target.model

    def rate(self, num_tokens: int, sampling: SamplingParams) -> float:
        """Decode rate in tokens a second."""
        before_s = cpu_s(self._served.pid)
        rate = asyncio.run(self._stream(num_tokens, sampling))
        self.gateway_us.append((cpu_s(self._served.pid) - before_s) / num_tokens * 1e6)
        return rate

    async def _stream(self, num_tokens: int, sampling: SamplingParams) -> float:
        request = RecordedRequest(id="overhead", max_tokens=num_tokens, prompt=PROMPT)
        connection = Connection(self._endpoint)
        answer = await self._target.ask(
            connection, request, temperature=sampling.temperature, seed=sampling.seed or 0
        )
        connection.close()
        if answer.error or answer.num_completion_tokens != num_tokens:
            raise SystemExit(f"not {num_tokens} tokens: {answer.error}, {answer.finish_reason}")
        assert answer.time_per_token_s is not None
        return 1 / answer.time_per_token_s


class OpenAiClient:
    """Streams with the official client."""

    def __init__(self, served: Served, model: str) -> None:
        self._client = openai.OpenAI(base_url=served.url + "/v1", api_key="none")
        self._model = model

    def rate(self, num_tokens: int, sampling: SamplingParams) -> float:
        """Decode rate in tokens a second."""
        stream = self._client.completions.create(
            model=self._model,
            prompt=PROMPT,
            max_tokens=num_tokens,
            temperature=sampling.temperature,
            seed=sampling.seed or 0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        times = [time.perf_counter() for chunk in stream if chunk.choices and chunk.choices[0].text]
        return (num_tokens - 1) / (times[-1] - times[0])


def bare_rate(loop: BareLoop, order: Order) -> float:
    """Decode rate of the loop itself."""
    return loop.run(order).decode_tok_s


def main() -> None:
    """Read the options, start loop and server, measure in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(default_path()))
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--turns", type=int, default=10)
    args = parser.parse_args()
    plan = served_plan(args.model)
    print(f"overhead, {plan.model.name}, {args.tokens} tokens, {describe_machine()}")
    with BareLoop(plan, plan.environment) as loop, serving(brim_serve(args.model)) as served:
        raw = RawClient(served)
        official = OpenAiClient(served, raw.model)
        for name, sampling in SAMPLINGS.items():
            order = Order(prompt=PROMPT, num_tokens=args.tokens, sampling=sampling)
            measured: dict[str, Callable[[], float]] = {
                "bare loop": functools.partial(bare_rate, loop, order),
                "raw client": functools.partial(raw.rate, args.tokens, sampling),
                "openai client": functools.partial(official.rate, args.tokens, sampling),
            }
            report(name, measured, args.turns)
        show("gateway CPU, raw client", raw.gateway_us, "us/token", digits=0)


def report(name: str, measured: dict[str, Callable[[], float]], turns: int) -> None:
    """Measure in turn, beginning with another one each time, and print rates and ratios."""
    rates: dict[str, list[float]] = {what: [] for what in measured}
    for measure in measured.values():
        measure()  # not counted: pages in the weights and warms both clients
    order = list(measured)
    for turn in range(turns):
        shift = turn % len(order)
        for what in order[shift:] + order[:shift]:
            rates[what].append(quietly(measured[what]))
    for what in order:
        show(f"{name}, {what}", rates[what], "tok/s")
    for what in order[1:]:
        ratios = [a / b for a, b in zip(rates[what], rates["bare loop"], strict=True)]
        show(f"{name}, {what} / bare loop", ratios, digits=3)
        # Disturbances only ever slow a sample down, so the best ones are the least disturbed.
        best = max(rates[what]) / max(rates["bare loop"])
        print(f"{f'{name}, {what}, best / best':44} {best:10.3f}", flush=True)


if __name__ == "__main__":
    main()
