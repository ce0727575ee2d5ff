"""What budgets cost: the event loop's time for each request, and how long until it is written down.

python benches/meter_cost.py
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from brim.apps.meter import Meter
from brim.apps.registry import Registry
from brim.apps.usage import UsageStore
from brim.core.app import App, Budgets, Limits

APP = App(
    name="app",
    budgets=Budgets(tokens=10**12, energy_j=10**9, ssd_write_bytes=10**15),
    limits=Limits(requests_per_minute=100_000, max_concurrent=100, memory_share=0.5),
)


def run_one(meter: Meter, number: int) -> None:
    """All that the gateway does for one request."""
    name, request_id = APP.name, f"r{number}"
    meter.enter(name)
    bound = meter.answer_bound(name, num_prompt_tokens=500, num_choices=1, max_tokens=200)
    meter.check_share(name, model="m", kv_tokens=700, pool_tokens=8192)
    meter.begin(
        name,
        request_id,
        model="m",
        num_prompt_tokens=500,
        max_completion_tokens=bound,
        kv_tokens=700,
    )
    meter.end(name, request_id, num_completion_tokens=120)
    meter.leave(name)


def loop_us(meter: Meter, num_requests: int, period_s: float) -> list[float]:
    """Microseconds of the calling thread for each of some requests, one every `period_s`."""
    found = []
    for number in range(num_requests):
        begun = time.perf_counter()
        run_one(meter, number)
        found.append(1e6 * (time.perf_counter() - begun))
        if period_s:
            time.sleep(period_s)
    return found


def lag_ms(store: UsageStore, meter: Meter, num_requests: int) -> list[float]:
    """Milliseconds from `begin` until the reservation is in the file."""
    found = []
    for number in range(num_requests):
        begun = time.perf_counter()
        meter.begin(
            APP.name,
            f"lag{number}",
            model="m",
            num_prompt_tokens=1,
            max_completion_tokens=1,
            kv_tokens=2,
        )
        store.flush()
        found.append(1e3 * (time.perf_counter() - begun))
        meter.end(APP.name, f"lag{number}", num_completion_tokens=1)
        store.flush()
    return found


def spread(figures: list[float]) -> str:
    """Median, 99th percentile and worst."""
    ordered = sorted(figures)
    p99 = ordered[int(0.99 * (len(ordered) - 1))]
    return f"median {statistics.median(ordered):.3g}, p99 {p99:.3g}, worst {ordered[-1]:.3g}"


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", help="Where the files lie: the disk to measure.")
    parser.add_argument("--requests", type=int, default=1000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        registry = Registry(Path(directory) / "apps.sqlite")
        key = registry.add(APP, "")
        path = Path(directory) / "usage.sqlite"
        store = UsageStore(path)
        meter = Meter(registry, store)
        run_one(meter, -1)
        num = arguments.requests
        print(f"loop thread, one after the other: {spread(loop_us(meter, num, 0))} us a request")
        print(f"loop thread, 100 a second: {spread(loop_us(meter, num // 4, 0.01))} us a request")
        print(f"until it is in the file: {spread(lag_ms(store, meter, num // 10))} ms")
        begun = time.perf_counter()
        for _ in range(10 * num):
            registry.authenticate(key)
        print(f"a key: {1e5 * (time.perf_counter() - begun) / num:.2f} us")
        store.flush()
        wal = path.with_name(path.name + "-wal").stat().st_size
        print(f"files: {path.stat().st_size} and {wal} bytes of journal")
        meter.close()


if __name__ == "__main__":
    main()
