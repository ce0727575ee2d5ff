"""`GET /metrics`: Prometheus' text format, with every model's own labels."""

import re

import msgspec
import pytest
from support.scripted import Client, ScriptedRuntime

from brim.core.cache import PrefixStats, StoreStats
from brim.ledger.history import ForecastError
from brim.runtime.request_counts import RequestCounts
from brim.server.wire.exposition import Exposition
from brim.worker.protocol import Stats

pytestmark = pytest.mark.anyio

SAMPLE = re.compile(r'^([a-z_]+)(?:\{((?:[a-z_]+="(?:[^"\\\n]|\\.)*",?)+)\})? (-?[0-9.e+-]+)$')

STATS = Stats(
    num_steps=7,
    num_tokens=5,
    num_prompt_tokens=11,
    num_sequences=2,
    num_prepared=0,
    num_frames=3,
    engine_cpu_s=0.5,
    engine_s=1.5,
    loop_cpu_s=0.6,
    reader_cpu_s=0.1,
    prefix=PrefixStats(
        num_memory_hits=4,
        num_idle_sequences=1,
        num_idle_tokens=64,
        store=StoreStats(num_entries=2, entry_bytes=4096, skipped={"daily budget": 3}),
    ),
)


def samples(page: str) -> dict[str, float]:
    """Every sample of a page by name and labels; fails where a line is none."""
    found: dict[str, float] = {}
    for line in page.splitlines():
        if line.startswith("# "):
            continue
        match = SAMPLE.match(line)
        assert match is not None, line
        key = f"{match[1]}{{{match[2]}}}" if match[2] else match[1]
        assert key not in found, "a sample came twice"
        found[key] = float(match[3])
    return found


async def test_counters_of_gateway_worker_and_store_are_on_the_page(
    client: Client, runtime: ScriptedRuntime
) -> None:
    """What requests, steps, prefixes and the store counted, and how far the forecast was off."""
    runtime.status_fields = {
        "requests": RequestCounts(
            outcomes={"stop": 3, "error": 1},
            refusals={"Busy": 2},
            num_busy=2,
            num_prompt_tokens=100,
            cached_tokens={"disk": 40},
            misses={"no entry": 1},
        ),
        "worker_stats": STATS,
        "num_waiting": 6,
        "forecast_errors": (ForecastError.of("kv_bytes", 103, 100),),
    }
    reply = await client.get("/metrics")
    assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    found = samples(reply.body.decode())
    expected = {
        'brim_requests_total{model="small",outcome="stop"}': 3,
        'brim_requests_total{model="small",outcome="error"}': 1,
        'brim_refusals_total{model="small",error="Busy"}': 2,
        'brim_busy_total{model="small"}': 2,
        'brim_prompt_tokens_total{model="small"}': 100,
        'brim_cached_tokens_total{model="small",source="disk"}': 40,
        'brim_cache_misses_total{model="small",reason="no entry"}': 1,
        'brim_requests_waiting{model="small"}': 6,
        'brim_model_ready{model="small"}': 1,
        'brim_engine_seconds_total{model="small"}': 1.5,
        'brim_steps_total{model="small"}': 7,
        'brim_prefix_hits_total{model="small",source="memory"}': 4,
        'brim_idle_sequences{model="small"}': 1,
        'brim_idle_tokens{model="small"}': 64,
        'brim_store_bytes{model="small"}': 4096,
        'brim_store_skipped_total{model="small",reason="daily budget"}': 3,
        'brim_forecast_planned_bytes{model="small",term="kv_bytes"}': 103,
        'brim_forecast_measured_bytes{model="small",term="kv_bytes"}': 100,
    }
    assert {key: found.get(key) for key in expected} == expected


async def test_every_family_is_described_once_before_its_samples(
    client: Client, runtime: ScriptedRuntime
) -> None:
    """Two models share a family's head, as the format asks for."""
    runtime.states = runtime.states * 2
    page = (await client.get("/metrics")).body.decode()
    heads = [line.split()[2] for line in page.splitlines() if line.startswith("# TYPE")]
    assert len(heads) == len(set(heads))
    assert 'brim_busy_total{model="small"}' in page
    assert 'brim_busy_total{model="small1"}' in page
    for name in {key.partition("{")[0] for key in samples(page)}:
        kind = "counter" if name.endswith("_total") else "gauge"
        assert page.index(f"# TYPE {name} {kind}\n") < page.index(f"\n{name}{{")


async def test_names_that_hold_quotes_stay_one_label() -> None:
    """Models are named by files, which may be called anything."""
    page = Exposition()
    page.add("brim_busy_total", "counter", "Busy.", 1, {"model": 'a"b\\c\nd'})
    assert list(samples(page.text()).values()) == [1]


async def test_a_server_before_its_first_load_has_a_page(
    client: Client, runtime: ScriptedRuntime
) -> None:
    """Without counters of a worker nothing is made up for them."""
    found = samples((await client.get("/metrics")).body.decode())
    assert not any(name.startswith(("brim_store", "brim_steps")) for name in found)
    assert msgspec.json.decode((await client.get("/openapi.json")).body)["paths"]["/metrics"]
