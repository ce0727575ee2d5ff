"""Five hundred loads and unloads through one gateway: what of its own does it lose with each?

Two models that do not fit together are asked for in turns, so that every request is a load and an
unload of a real worker process.  The gateway's own anonymous memory is read after each, and a line
laid through the second half of the readings; processes, descriptors, threads and files are counted
before and after.

    python benches/load_cycles.py [--cycles 500] [--engine toy] [--json FILE]

Aims: nothing left over, no error, and a slope of less than 1 KiB a cycle.
"""

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
from harness import describe_machine

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from support.crowd import GB, one_of_a_crowd, weighing
from support.leftovers import Holdings, holdings
from support.models import DEMO, plan_for
from support.serving import serving, toy_plan

from brim.core.event import Event
from brim.core.plan import Plan
from brim.telemetry.event_log import NUM_KEPT, EventLog

MAX_SLOPE_BYTES = 1024
"""A cycle: half a MiB in the 500 of a very busy day, and far above what some pages do."""

NUM_WARM_CYCLES = 10
"""Modules, pools and caches of the gateway come with the first loads."""


class Cycles(msgspec.Struct, frozen=True, kw_only=True):
    """What many cycles left."""

    engine: str
    num_cycles: int
    total_s: float
    errors: list[str]
    before: Holdings
    after: Holdings
    slope_bytes_per_cycle: float
    """Of the gateway's anonymous memory, over the second half."""
    private_bytes: list[int]
    """After each cycle."""

    @property
    def has_failed(self) -> bool:
        """Whether an aim was missed."""
        return bool(
            self.errors
            or self.after.things != self.before.things
            or self.slope_bytes_per_cycle > MAX_SLOPE_BYTES
        )


def plans(engine: str) -> list[Plan]:
    """Two models, one at a time."""
    plan = toy_plan() if engine == "toy" else plan_for("llamacpp", path=DEMO)
    return [weighing(plan, name, 7 * GB) for name in ("one", "other")]


def slope(values: Sequence[int]) -> float:
    """Of the line of least squares, for each step."""
    return statistics.linear_regression(range(len(values)), values).slope


def fill_log(log: EventLog) -> None:
    """Have it keep as many events as it ever does: it fills up once, over its first loads."""
    encoded = [msgspec.json.encode(event) for event in log.events()]
    for number in range(NUM_KEPT):
        log.record(msgspec.json.decode(encoded[number % len(encoded)], type=Event))


async def run(engine: str, num_cycles: int, directory: Path) -> Cycles:
    """Load and unload that often."""
    errors, readings = [], []
    async with serving(*plans(engine)) as gateway:
        names = [status.name for status in gateway.models()]
        for number in range(NUM_WARM_CYCLES):
            await one_of_a_crowd(gateway, names[number % 2], "a")
        fill_log(gateway.event_log)
        before, start_s = holdings(directories=(directory,)), time.monotonic()
        for number in range(num_cycles):
            served = await one_of_a_crowd(gateway, names[number % 2], "a")
            if served.error:
                errors.append(served.error)
            readings.append(holdings().private_bytes)
            if number % 50 == 49:
                print(f"{number + 1} cycles, {readings[-1] / 2**20:.2f} MiB", flush=True)
        total_s, after = time.monotonic() - start_s, holdings(directories=(directory,))
    return Cycles(
        engine=engine,
        num_cycles=num_cycles,
        total_s=total_s,
        errors=errors,
        before=before,
        after=after,
        slope_bytes_per_cycle=slope(readings[len(readings) // 2 :]),
        private_bytes=readings,
    )


def main() -> int:
    """Run and print; exit 1 where an aim was missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cycles", type=int, default=500)
    parser.add_argument("--engine", choices=("toy", "llamacpp"), default="toy")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(describe_machine())
    with tempfile.TemporaryDirectory() as directory:
        os.environ["TMPDIR"] = tempfile.tempdir = directory
        found = asyncio.run(run(args.engine, args.cycles, Path(directory)))
    print(f"{found.num_cycles} cycles in {found.total_s:.0f} s, {len(found.errors)} errors")
    print(f"before: {found.before}\nafter:  {found.after}")
    print(f"second half: {found.slope_bytes_per_cycle:+.0f} bytes of own memory a cycle")
    if args.json is not None:
        args.json.write_bytes(msgspec.json.encode(found) + b"\n")
    return int(found.has_failed)


if __name__ == "__main__":
    sys.exit(main())
