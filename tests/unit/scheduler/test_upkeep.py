"""Idle sequences go once they have cost others what it would cost to have them again."""

from collections.abc import Callable
from typing import Any

import pytest
from support.toy_variants import PassingToy

from brim.core.cache import CacheSource
from brim.core.sampling import SamplingParams
from brim.engine.toy import ToyEngine
from brim.prefix_cache.store import PrefixCache
from brim.scheduler.sequence import ScheduledRequest

ENDLESS = SamplingParams(temperature=0.0, ignore_eos=True)

LONG = 600
"""Tokens of the prompt whose sequence goes idle; more than are kept whatever they cost.  A prompt
token takes 5.5 ms on the bench, so after 55 rows of others its cells have cost as much."""

ROOM: dict[str, Any] = {"context_tokens": 1024, "kv_tokens": 8192}

FLUSH_LIMIT_S = 60.0
"""For a disk that others use too."""

Bench = Any
MakeBench = Callable[..., Any]


def prompt(seed: int, length: int) -> list[int]:
    return [(seed * 31 + 7 * i + i * i) % 251 for i in range(length)]


def ask(bench: Bench, ticket: int, tokens: list[int], **fields: Any) -> Any:
    """Run one request to its end; what it found of its prompt."""
    fields = {"max_tokens": 2, "sampling": ENDLESS, "arrived_s": bench.now_s, **fields}
    bench.scheduler.add(ScheduledRequest(ticket=ticket, prompt_tokens=tokens, **fields))
    bench.run()
    return bench.last(ticket).timings.cache


def num_gone(bench: Bench) -> int:
    return int(bench.scheduler.stats().num_idle_evicted)


def test_what_has_cost_as_much_as_it_would_again_goes(make_bench: MakeBench) -> None:
    """After 40 rows of another's answer it is still there, after 130 it is not."""
    bench = make_bench(PassingToy(), **ROOM)
    ask(bench, 1, prompt(1, LONG))
    ask(bench, 2, prompt(2, 20), max_tokens=20)
    assert num_gone(bench) == 0
    ask(bench, 3, prompt(3, 20), max_tokens=110)
    assert num_gone(bench) == 1
    assert ask(bench, 4, prompt(1, LONG)).num_tokens == 0


def test_where_idle_cells_cost_nothing_they_stay(make_bench: MakeBench) -> None:
    """An engine whose sequences have their cells to themselves keeps all that there is room for."""
    bench = make_bench(ToyEngine(), **ROOM)
    ask(bench, 1, prompt(1, LONG))
    ask(bench, 2, prompt(2, 20), max_tokens=200)
    assert num_gone(bench) == 0


def test_a_few_idle_cells_stay_whatever_they_cost(make_bench: MakeBench) -> None:
    """Two sequences of 200 tokens are no burden."""
    bench = make_bench(PassingToy(), **ROOM)
    ask(bench, 1, prompt(1, 200))
    ask(bench, 2, prompt(2, 200))
    ask(bench, 3, prompt(3, 20), max_tokens=400)
    assert num_gone(bench) == 0


def test_no_more_go_than_are_a_burden(make_bench: MakeBench) -> None:
    """Of three that are due the one that waited longest goes, and with it the burden."""
    bench = make_bench(PassingToy(), **ROOM)
    for ticket in (1, 2, 3):
        ask(bench, ticket, prompt(ticket, 220))
    ask(bench, 4, prompt(4, 20), max_tokens=300)
    assert num_gone(bench) == 1
    assert ask(bench, 5, prompt(2, 220)).source is CacheSource.MEMORY
    assert ask(bench, 6, prompt(1, 220)).source is CacheSource.NONE


def test_what_was_of_use_before_stays_longer(make_bench: MakeBench) -> None:
    """A prompt that came three times is worth three times the rent."""
    bench = make_bench(PassingToy(), **ROOM)
    for ticket in (1, 2, 3):
        ask(bench, ticket, prompt(1, LONG))
    ask(bench, 4, prompt(4, 20), max_tokens=110)
    assert ask(bench, 5, prompt(1, LONG)).source is CacheSource.MEMORY


def test_what_is_on_disk_goes_sooner_and_comes_back_from_there(
    make_bench: MakeBench, make_cache: Callable[[ToyEngine], PrefixCache]
) -> None:
    """A copy on disk makes it cheap to have again: 20 rows are too dear for that."""
    engine = PassingToy()
    cache = make_cache(engine)
    bench = make_bench(engine, cache=cache, **ROOM)
    ask(bench, 1, prompt(1, LONG), boundaries=(LONG - 1,), keeps_on_disk=True)
    cache.flush(FLUSH_LIMIT_S)
    ask(bench, 2, prompt(2, 20), max_tokens=60)
    assert num_gone(bench) == 1
    report = ask(bench, 3, prompt(1, LONG))
    assert (report.source, report.num_tokens) == (CacheSource.DISK, LONG - 1)


def test_what_waits_to_be_kept_stays_until_it_is(
    make_bench: MakeBench,
    make_cache: Callable[[ToyEngine], PrefixCache],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A disk that takes nothing now holds the sequence in memory."""
    engine = PassingToy()
    is_busy = True
    monkeypatch.setattr(PrefixCache, "must_wait", lambda _self, _num_bytes: is_busy)
    bench = make_bench(engine, cache=make_cache(engine), **ROOM)
    fields: dict[str, Any] = {
        "max_tokens": 2,
        "sampling": ENDLESS,
        "arrived_s": 0.0,
        "keeps_on_disk": True,
    }
    bench.scheduler.add(
        ScheduledRequest(ticket=1, prompt_tokens=prompt(1, LONG), boundaries=(LONG - 1,), **fields)
    )
    bench.scheduler.add(
        ScheduledRequest(ticket=2, prompt_tokens=prompt(2, 20), **{**fields, "max_tokens": 400})
    )
    for _ in range(300):
        bench.step()
    assert bench.scheduler.stats().num_idle_sequences == 1
    is_busy = False
    bench.run()
    assert num_gone(bench) == 1


def test_cells_that_a_running_sequence_needs_too_are_no_burden(make_bench: MakeBench) -> None:
    """What was forked stays: without it the cells would be there as well."""
    bench = make_bench(PassingToy(), **ROOM)
    shared = prompt(1, LONG)
    ask(bench, 1, [*shared, 1, 2, 3])
    ask(bench, 2, [*shared, 4, 5, 6], max_tokens=200)
    assert num_gone(bench) == 0
