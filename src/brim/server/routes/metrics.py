"""`GET /metrics`: what models did and what they hold, for Prometheus.

Counters of a worker start again at 0 with its model's next load, which Prometheus expects of
counters; those of requests are the gateway's and last as long as it does.
"""

from starlette.requests import Request
from starlette.responses import Response

from brim.core.cache import PrefixStats, StoreStats
from brim.ledger.entry import Statement
from brim.runtime.api import ModelState, ModelStatus, Runtime
from brim.server.wire.exposition import CONTENT_TYPE, Exposition

Labels = dict[str, str]


class MetricsRoute:
    """Tells counters and gauges of every model, and the account of memory."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    async def get(self, _: Request) -> Response:
        """The page."""
        page = Exposition()
        for status in self._runtime.models():
            labels = {"model": status.name}
            _add_requests(page, status, labels)
            _add_worker(page, status, labels)
            _add_memory(page, status, labels)
        statement = self._runtime.statement()
        if statement is not None:
            _add_ledger(page, statement)
        return Response(page.text(), headers={"content-type": CONTENT_TYPE})


def _add_requests(page: Exposition, status: ModelStatus, labels: Labels) -> None:
    counts = status.requests
    page.add_all(
        "brim_requests_total", "counter", "Requests that were started, by how they ended.",
        counts.outcomes, labels, "outcome",
    )  # fmt: skip
    page.add_all(
        "brim_refusals_total", "counter", "Requests that were refused before, by the error's kind.",
        counts.refusals, labels, "error",
    )  # fmt: skip
    page.add(
        "brim_busy_total", "counter", "Requests that were told to come again (503).",
        counts.num_busy, labels,
    )  # fmt: skip
    page.add(
        "brim_prompt_tokens_total", "counter", "Prompt tokens of answered requests.",
        counts.num_prompt_tokens, labels,
    )  # fmt: skip
    page.add(
        "brim_completion_tokens_total", "counter", "Tokens of answers.",
        counts.num_completion_tokens, labels,
    )  # fmt: skip
    page.add_all(
        "brim_cached_tokens_total", "counter", "Prompt tokens that were not computed, by source.",
        counts.cached_tokens, labels, "source",
    )  # fmt: skip
    page.add_all(
        "brim_cache_misses_total", "counter", "Requests of which no more was reused, by reason.",
        counts.misses, labels, "reason",
    )  # fmt: skip
    page.add(
        "brim_removed_tokens_total", "counter",
        "Prompt tokens left out of conversations that outgrew the window.",
        counts.num_removed_tokens, labels,
    )  # fmt: skip
    page.add("brim_requests_running", "gauge", "Requests in work.", status.num_running, labels)
    page.add(
        "brim_requests_waiting", "gauge", "Requests that wait for their turn.",
        status.num_waiting, labels,
    )  # fmt: skip


def _add_worker(page: Exposition, status: ModelStatus, labels: Labels) -> None:
    page.add(
        "brim_model_ready", "gauge", "1 where the model is in memory and takes requests.",
        int(status.state is ModelState.READY), labels,
    )  # fmt: skip
    page.add(
        "brim_worker_deaths_total", "counter", "Deaths of its worker.", status.num_deaths, labels
    )
    stats = status.worker_stats
    if stats is None:
        return
    page.add("brim_steps_total", "counter", "Engine steps.", stats.num_steps, labels)
    page.add(
        "brim_engine_seconds_total", "counter", "Seconds inside engine steps.",
        stats.engine_s, labels,
    )  # fmt: skip
    page.add(
        "brim_sequences", "gauge", "Open sequences, idle ones included.",
        stats.num_sequences, labels,
    )  # fmt: skip
    _add_prefixes(page, stats.prefix, labels)
    if stats.prefix.store is not None:
        _add_store(page, stats.prefix.store, labels)


def _add_prefixes(page: Exposition, prefix: PrefixStats, labels: Labels) -> None:
    hits = {"memory": prefix.num_memory_hits, "disk": prefix.num_disk_hits}
    page.add_all(
        "brim_prefix_hits_total", "counter", "Prompts that found a part, by source.",
        hits, labels, "source",
    )  # fmt: skip
    page.add(
        "brim_idle_sequences", "gauge", "Finished sequences whose KV is kept in memory.",
        prefix.num_idle_sequences, labels,
    )  # fmt: skip
    page.add(
        "brim_idle_tokens", "gauge", "KV cells that they alone hold.",
        prefix.num_idle_tokens, labels,
    )  # fmt: skip
    page.add(
        "brim_idle_evicted_total", "counter", "Of them, those that gave way.",
        prefix.num_idle_evicted, labels,
    )  # fmt: skip


def _add_store(page: Exposition, store: StoreStats, labels: Labels) -> None:
    gauges = {
        "entries": ("Entries on disk.", store.num_entries),
        "bytes": ("Bytes of entries on disk.", store.entry_bytes),
        "inflight_bytes": ("Bytes on their way to the disk.", store.inflight_bytes),
        "written_today_bytes": (
            "Bytes written since midnight UTC by all workers.", store.written_bytes_today,
        ),
    }  # fmt: skip
    counters = {
        "written_bytes_total": ("Bytes written.", store.written_bytes),
        "writes_total": ("Entries written.", store.num_written),
        "reads_total": ("Entries read.", store.num_read),
        "read_bytes_total": ("Bytes read.", store.read_bytes),
        "damaged_total": ("Entries found damaged.", store.num_damaged),
        "evicted_total": ("Entries removed for room.", store.num_evicted),
    }
    for name, (meaning, value) in gauges.items():
        page.add(f"brim_store_{name}", "gauge", meaning, value, labels)
    for name, (meaning, value) in counters.items():
        page.add(f"brim_store_{name}", "counter", meaning, value, labels)
    page.add_all(
        "brim_store_skipped_total", "counter", "Prefixes that were not kept, by reason.",
        store.skipped, labels, "reason",
    )  # fmt: skip


def _add_memory(page: Exposition, status: ModelStatus, labels: Labels) -> None:
    page.add(
        "brim_resident_bytes", "gauge", "What the worker holds, as the system says.",
        status.resident_bytes, labels,
    )  # fmt: skip
    if status.entry is not None:
        page.add(
            "brim_charged_bytes", "gauge", "What the model costs the account.",
            status.entry.charged_bytes, labels,
        )  # fmt: skip
    for error in status.forecast_errors:
        of_term = {**labels, "term": error.term}
        page.add(
            "brim_forecast_planned_bytes", "gauge", "Planned bytes of a term.",
            error.planned_bytes, of_term,
        )  # fmt: skip
        page.add(
            "brim_forecast_measured_bytes", "gauge", "Measured bytes of a term.",
            error.measured_bytes, of_term,
        )  # fmt: skip


def _add_ledger(page: Exposition, account: Statement) -> None:
    terms = {
        "comfortable": account.comfortable_bytes,
        "tight": account.tight_bytes,
        "charged": account.charged_bytes,
        "others": account.others_bytes,
        "kv_reserved": account.kv_reserved_bytes,
        "prefix_cache": account.prefix_cache_bytes,
    }
    page.add_all(
        "brim_ledger_bytes", "gauge", "The account of the machine's memory, by term.",
        terms, {}, "term",
    )  # fmt: skip
