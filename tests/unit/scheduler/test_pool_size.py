"""A pool that shrinks and grows between steps: who goes, who stays, and who waits."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.prefixes import open_store

from brim.core.answer import FinishReason
from brim.core.sampling import SamplingParams
from brim.engine.toy import ToyEngine
from brim.errors import DoesNotFit, EngineError, InvalidRequest
from brim.prefix_cache.store import PrefixCache
from brim.scheduler.keeper import LAST_WAIT_S
from brim.scheduler.sequence import ScheduledRequest

ENDLESS = SamplingParams(temperature=0.0, ignore_eos=True)

Bench = Any
MakeBench = Callable[..., Any]


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[PrefixCache]:
    store = open_store(tmp_path / "store", min_tokens=32)
    yield store
    store.close()


def left_behind(bench: Bench, ticket: int, num_tokens: int) -> None:
    """A request that ran, whose sequence stays."""
    bench.add(ticket, num_prompt_tokens=num_tokens, max_tokens=1, boundaries=(num_tokens,))
    bench.run()


def test_the_least_valuable_idle_sequences_go(make_bench: MakeBench) -> None:
    """As many as have to, older ones first."""
    bench = make_bench(kv_tokens=2048)
    for ticket in (1, 2, 3):
        left_behind(bench, ticket, 200)
        bench.now_s += 100
    assert bench.scheduler.resize(512) == 512
    assert bench.scheduler.num_idle_tokens == 400
    assert bench.scheduler.stats().num_idle_sequences == 2
    assert bench.engine._num_cells == 512
    assert bench.scheduler.resize(0) == 256, "a pool has one block at least"
    assert bench.scheduler.num_idle_tokens == 200


def test_running_sequences_keep_what_they_were_promised(make_bench: MakeBench) -> None:
    """A pool is never smaller than what they hold and may come to need, in whole blocks."""
    bench = make_bench(kv_tokens=2048)
    bench.add(1, num_prompt_tokens=100, max_tokens=300)
    bench.step()
    assert bench.scheduler.num_needed_tokens == 399, "the last token is never fed"
    assert bench.scheduler.resize(0) == bench.scheduler.kv_tokens == 512
    bench.run()
    assert bench.last(1).finish_reason is FinishReason.LENGTH


def test_a_pool_grows_to_the_plan_and_no_further(make_bench: MakeBench) -> None:
    """What the ledger granted is the most."""
    bench = make_bench(kv_tokens=2000)
    bench.scheduler.resize(300)
    assert bench.scheduler.kv_tokens == 512
    bench.scheduler.resize(10_000)
    assert bench.scheduler.kv_tokens == bench.engine._num_cells == 2000


def test_what_waits_to_be_kept_is_kept_before_its_sequence_goes(
    make_bench: MakeBench, cache: PrefixCache
) -> None:
    """The next prompt that begins alike finds on disk what memory had to give."""
    bench = make_bench(cache=cache, kv_tokens=2048)
    prompt = bench.add(1, num_prompt_tokens=200, max_tokens=1, boundaries=(200,))
    bench.step()
    assert not bench.scheduler.num_sequences
    assert bench.scheduler._reuse.has_exports, "the answer was shorter than the export waits"
    bench.scheduler.resize(256)
    assert bench.scheduler.num_idle_tokens == 200
    assert not bench.scheduler._reuse.has_exports
    bench.add(2, num_prompt_tokens=250, max_tokens=1)
    cache.flush()
    assert cache.stored("", prompt) == 200


class Refusing(ToyEngine):
    """It has no memory for another pool."""

    def resize_kv(self, num_tokens: int) -> None:
        raise DoesNotFit("toy: no pool")


def test_what_the_disk_cannot_take_now_is_dropped(
    make_bench: MakeBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two prompts wait and the disk is busy: it is given its time once, for the first of them."""
    store = open_store(tmp_path / "store", min_tokens=32)
    bench = make_bench(cache=store, kv_tokens=2048)
    for ticket in (1, 2):
        bench.add(ticket, num_prompt_tokens=200, max_tokens=1, boundaries=(200,))
    waits: list[float | None] = []
    monkeypatch.setattr(store, "must_wait", lambda num_bytes: True)
    while bench.scheduler.num_waiting or bench.scheduler.num_sequences:
        bench.step()
    room = iter([False])
    real_flush = store.flush

    def flush(limit_s: float | None = None) -> None:
        waits.append(limit_s)

    monkeypatch.setattr(store, "flush", flush)
    monkeypatch.setattr(store, "must_wait", lambda num_bytes: next(room, True) if waits else True)
    bench.scheduler.resize(0)
    assert waits == [LAST_WAIT_S]
    real_flush()
    assert store.stats().num_written == 1
    assert not bench.scheduler.has_work
    store.close()


def test_a_pool_that_cannot_be_made_changes_nothing_that_runs(make_bench: MakeBench) -> None:
    """The scheduler goes on with the cells that it has."""
    bench = make_bench(Refusing(), kv_tokens=2048)
    prompt = bench.add(1, num_prompt_tokens=100, max_tokens=30)
    bench.step()
    with pytest.raises(DoesNotFit, match="no pool"):
        bench.scheduler.resize(512)
    assert bench.scheduler.kv_tokens == 2048
    bench.add(2, num_prompt_tokens=400, max_tokens=30)
    bench.run()
    assert bench.text(1) == bench.alone(prompt, 30, ENDLESS)
    assert bench.last(2).finish_reason is FinishReason.LENGTH


def test_a_request_that_no_longer_fits_holds_up_nobody(make_bench: MakeBench) -> None:
    """It waits for the pool to grow; smaller ones behind it run; then it is its turn."""
    bench = make_bench(kv_tokens=2048)
    bench.scheduler.resize(256)
    bench.add(1, num_prompt_tokens=300, max_tokens=20)
    bench.add(2, num_prompt_tokens=30, max_tokens=20)
    bench.run()
    assert (1, 0) not in bench.deltas
    assert bench.last(2).finish_reason is FinishReason.LENGTH
    assert bench.scheduler.num_waiting == 1
    assert not bench.scheduler.has_work, "a round would get nothing further"
    bench.scheduler.resize(2048)
    assert bench.scheduler.has_work
    bench.run()
    assert bench.last(1).finish_reason is FinishReason.LENGTH


def test_a_request_that_waits_for_room_gets_it_when_the_pool_grows(make_bench: MakeBench) -> None:
    """Although nobody has ended: growing is more room as well."""
    bench = make_bench(kv_tokens=2048)
    bench.scheduler.resize(512)
    bench.add(1, num_prompt_tokens=100, max_tokens=300)
    bench.add(2, num_prompt_tokens=200, max_tokens=100)
    bench.step()
    bench.step()
    assert (bench.scheduler.num_sequences, bench.scheduler.num_waiting) == (1, 1)
    bench.scheduler.resize(1024)
    bench.step()
    assert (bench.scheduler.num_sequences, bench.scheduler.num_waiting) == (2, 0)


def test_what_the_plan_never_has_room_for_is_still_refused(make_bench: MakeBench) -> None:
    """A small pool is for a while, and the plan's size for good."""
    bench = make_bench(kv_tokens=512, context_tokens=2048)
    bench.scheduler.resize(256)
    with pytest.raises(InvalidRequest, match="whole pool has 512"):
        bench.add(1, num_prompt_tokens=500, max_tokens=100)


def test_a_lost_engine_is_told(make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the engine cannot take back passes through, for the process to end."""
    bench = make_bench(kv_tokens=2048)

    def lose(_num_tokens: int) -> None:
        raise EngineError("toy: the sequences are gone")

    monkeypatch.setattr(bench.engine, "resize_kv", lose)
    with pytest.raises(EngineError, match="gone"):
        bench.scheduler.resize(512)


def test_a_request_may_keep_nothing_on_disk(make_bench: MakeBench, cache: PrefixCache) -> None:
    """It reads what others wrote and leaves a sequence in memory, and the disk is not written."""
    bench = make_bench(cache=cache, kv_tokens=2048)
    tokens = [(3 * i) % 251 for i in range(200)]

    def ask(ticket: int, prompt: list[int], *, keeps_on_disk: bool) -> Any:
        bench.scheduler.add(
            ScheduledRequest(
                ticket=ticket,
                prompt_tokens=prompt,
                max_tokens=2,
                sampling=ENDLESS,
                boundaries=(len(prompt),),
                keeps_on_disk=keeps_on_disk,
            )
        )
        bench.run()
        cache.flush()
        return bench.last(ticket).timings.cache

    ask(1, tokens, keeps_on_disk=False)
    assert cache.stats().num_written == 0
    assert ask(2, [*tokens, 5], keeps_on_disk=False).num_tokens == 200
    bench.scheduler.resize(0)
    ask(3, tokens, keeps_on_disk=True)
    assert cache.stats().num_written == 1
    bench.scheduler.resize(2048)
    left_behind(bench, 9, 100)
    bench.scheduler._pool.make_room(2048)
    report = ask(4, [*tokens, *range(60)], keeps_on_disk=False)
    assert (report.source, report.num_tokens) == ("disk", 200)
    assert cache.stats().num_written == 1 + 1, "the other request's own"
