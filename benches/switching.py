"""A crowd asks for four models of which two fit: is everyone answered, and how often is switched?

Real workers with variants of the demo model stand for models of 5 GB on a machine of 16 GB.  A
hundred requests come at once, and then spread over some time; each is greedy, its client stays and
does not come again, and its text is compared with the one that the same model gave alone.

    python benches/switching.py [--requests 100] [--within 0,10] [--patience 0] [--json FILE]

With --patience clients come again when they are refused for now, which shows what a server costs
that refuses instead of taking turns.  Aims: no error, no wrong text, at most one load a second.
"""

import argparse
import asyncio
import math
import sys
import time
from collections import Counter
from pathlib import Path

import msgspec
from harness import describe_machine

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from support.crowd import GB, PROMPTS, LoadWatch, Served, crowd, one_of_a_crowd, weighing
from support.long_models import demo_variant
from support.models import plan_for
from support.serving import serving

from brim.bench.stats import percentile
from brim.core.plan import Plan
from brim.runtime.gateway import Gateway

REAL_LAYERS = {"six": 6, "five": 5, "four": 4, "three": 3}
MAX_LOADS_PER_S = 1.0


class Crowd(msgspec.Struct, frozen=True, kw_only=True):
    """What one crowd got."""

    within_s: float
    """They came spread over so long."""
    num_requests: int
    num_answered: int
    num_wrong: int
    errors: dict[str, int]
    num_refusals: int
    """After which clients came again."""
    num_loads: int
    total_s: float
    p50_s: float
    p95_s: float
    ttft_p50_s: float
    ttft_p95_s: float

    @property
    def has_failed(self) -> bool:
        """Whether an aim was missed."""
        num_allowed = max(len(REAL_LAYERS), math.ceil(self.total_s * MAX_LOADS_PER_S))
        return bool(self.errors or self.num_wrong or self.num_loads > num_allowed)


def plans() -> list[Plan]:
    """Four models that say different things and claim 5 GB each."""
    found = []
    for name, real in REAL_LAYERS.items():
        path = demo_variant(name, real_layers=real)
        found.append(weighing(plan_for("llamacpp", path=path, kv_tokens=8192), name, 5 * GB))
    return found


async def measure(
    gateway: Gateway, *, num_requests: int, within_s: float, patience_s: float
) -> Crowd:
    """Have the reference answers, then let the crowd in."""
    models = list(REAL_LAYERS)
    references = {}
    for model in models:
        for prompt in PROMPTS:
            alone = await one_of_a_crowd(gateway, model, prompt)
            if alone.error:
                raise SystemExit(f"no reference answer: {alone.error}")
            references[model, prompt] = alone.text
    start_s = time.monotonic()
    async with LoadWatch(gateway) as watch:
        served = await crowd(
            gateway,
            models,
            num_requests=num_requests,
            patience_s=patience_s,
            within_s=within_s,
        )
    return summary(served, references, len(watch.loads), time.monotonic() - start_s, within_s)


def summary(
    served: list[Served],
    references: dict[tuple[str, str], str],
    num_loads: int,
    total_s: float,
    within_s: float,
) -> Crowd:
    """One crowd's figures."""
    answered = [each for each in served if not each.error]
    durations_s = [each.ended_s - each.asked_s for each in answered] or [math.inf]
    firsts_s = [
        each.first_text_s - each.asked_s for each in answered if each.first_text_s is not None
    ] or [math.inf]
    return Crowd(
        within_s=within_s,
        num_requests=len(served),
        num_answered=len(answered),
        num_wrong=sum(each.text != references[each.model, each.prompt] for each in answered),
        errors=dict(Counter(each.error[:120] for each in served if each.error)),
        num_refusals=sum(each.num_refusals for each in served),
        num_loads=num_loads,
        total_s=total_s,
        p50_s=percentile(durations_s, 50),
        p95_s=percentile(durations_s, 95),
        ttft_p50_s=percentile(firsts_s, 50),
        ttft_p95_s=percentile(firsts_s, 95),
    )


async def run(args: argparse.Namespace) -> list[Crowd]:
    """Every crowd, one gateway for each."""
    found = []
    for within_s in args.within:
        async with serving(*plans()) as gateway:
            found.append(
                await measure(
                    gateway,
                    num_requests=args.requests,
                    within_s=within_s,
                    patience_s=args.patience,
                )
            )
        show(found[-1])
    return found


def show(found: Crowd) -> None:
    """One crowd in a few lines."""
    print(
        f"{found.num_requests} requests within {found.within_s:g} s: "
        f"{found.num_answered} answered, {found.num_wrong} wrong, "
        f"{found.num_refusals} refused for now\n"
        f"  {found.num_loads} loads in {found.total_s:.1f} s, "
        f"{found.num_loads / found.total_s:.2f} a second\n"
        f"  answered after {found.p50_s:.2f} s (p50), {found.p95_s:.2f} s (p95); "
        f"first text after {found.ttft_p50_s:.2f} s, {found.ttft_p95_s:.2f} s",
        flush=True,
    )
    for error, number in found.errors.items():
        print(f"  {number} x {error}")


def main() -> int:
    """Measure and print; exit 1 where an aim was missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument(
        "--within", type=lambda text: [float(each) for each in text.split(",")], default=[0.0, 10.0]
    )
    parser.add_argument("--patience", type=float, default=0.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(describe_machine())
    found = asyncio.run(run(args))
    if args.json is not None:
        args.json.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n")
    return int(any(each.has_failed for each in found))


if __name__ == "__main__":
    sys.exit(main())
