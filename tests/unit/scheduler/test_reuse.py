"""What of a prompt is not computed again: idle and live sequences, prompts being read, the disk."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from support.toy_caches import options
from support.toy_variants import VARIANTS, CopyingToy, WholeToy

from brim.core.cache import CacheSource, MissReason
from brim.core.sampling import SamplingParams
from brim.engine.toy import ToyEngine
from brim.errors import EngineError
from brim.prefix_cache.store import Model, PrefixCache
from brim.scheduler.sequence import ScheduledRequest

ENDLESS = SamplingParams(temperature=0.0, ignore_eos=True)

Bench = Any
MakeBench = Callable[..., Any]
MakeCache = Callable[..., PrefixCache]


def prompt(*parts: tuple[int, int]) -> list[int]:
    """Tokens from (seed, length) pairs; parts of one seed and length are equal."""
    return [(seed * 31 + 7 * i + i * i) % 251 for seed, length in parts for i in range(length)]


def ask(bench: Bench, ticket: int, tokens: list[int], **fields: Any) -> Any:
    """Run one request to its end; its report."""
    add(bench, ticket, tokens, **fields)
    bench.run()
    return bench.last(ticket).timings.cache


def add(bench: Bench, ticket: int, tokens: list[int], **fields: Any) -> None:
    fields = {"max_tokens": 8, "sampling": ENDLESS, "arrived_s": bench.now_s, **fields}
    bench.scheduler.add(ScheduledRequest(ticket=ticket, prompt_tokens=tokens, **fields))


def text_of(bench: Bench, tokens: list[int], max_tokens: int = 8) -> str:
    return str(bench.alone(tokens, max_tokens, ENDLESS))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_conversation_goes_on_where_it_was(make_bench: MakeBench, variant: str) -> None:
    """The second turn computes only what was not in the first and its answer."""
    bench = make_bench(VARIANTS[variant]())
    first = prompt((1, 100))
    ask(bench, 1, first)
    answer = list(bench.text(1).encode())[:-1]
    second = first + answer + prompt((2, 30))
    report = ask(bench, 2, second)
    assert (report.source, report.num_tokens) == (CacheSource.MEMORY, len(first) + len(answer))
    assert report.miss is None
    assert bench.text(2) == text_of(bench, second)


@pytest.mark.parametrize("engine_type", [ToyEngine, CopyingToy])
def test_a_branch_shares_what_it_can_and_says_where_it_parts(
    make_bench: MakeBench, engine_type: type[ToyEngine]
) -> None:
    """Another question after the same system prompt: its KV is taken, and the turn is named."""
    bench = make_bench(engine_type())
    ask(bench, 1, prompt((1, 100), (2, 40)))
    branch = prompt((1, 100), (3, 40))
    report = ask(bench, 2, branch, turn_starts=(0, 100))
    assert report.num_tokens == 100
    assert report.reason == "diverges at token 1 of turn 2"
    assert bench.text(2) == text_of(bench, branch)


def test_a_state_that_cannot_be_cut_serves_no_branch(make_bench: MakeBench) -> None:
    """The prompts part before the sequence's end: nothing can be taken, and it is said why."""
    bench = make_bench(WholeToy())
    ask(bench, 1, prompt((1, 100), (2, 40)))
    branch = prompt((1, 100), (3, 40))
    report = ask(bench, 2, branch, turn_starts=(0, 100))
    assert (report.num_tokens, report.reason) == (0, "diverges at token 1 of turn 2")
    assert bench.text(2) == text_of(bench, branch)


def test_a_boundary_serves_branches_of_a_state_that_cannot_be_cut(make_bench: MakeBench) -> None:
    """Without a disk, a copy stays at the end of the system prompt."""
    bench = make_bench(WholeToy())
    ask(bench, 1, prompt((1, 100), (2, 40)), boundaries=(100,))
    branch = prompt((1, 100), (3, 40))
    report = ask(bench, 2, branch, boundaries=(100,))
    assert report.num_tokens == 100
    assert bench.text(2) == text_of(bench, branch)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_prefix_that_is_being_read_is_waited_for(make_bench: MakeBench, variant: str) -> None:
    """Four requests with one system prompt at once: it is read once, whoever comes first."""
    bench = make_bench(VARIANTS[variant](), kv_tokens=4096, max_sequences=8)
    prompts = {ticket: prompt((1, 200), (1 + ticket, 30)) for ticket in range(1, 5)}
    for ticket, tokens in prompts.items():
        add(bench, ticket, tokens, boundaries=(200,))
    bench.run()
    cached = [bench.last(ticket).timings.num_cached_tokens for ticket in prompts]
    assert cached == [0, 200, 200, 200]
    for ticket, tokens in prompts.items():
        assert bench.text(ticket) == text_of(bench, tokens)


def test_shared_prefixes_take_their_cells_once(make_bench: MakeBench) -> None:
    """Three prompts of 230 tokens run at once in a pool of 400, for 200 of them are the same."""
    bench = make_bench(kv_tokens=400, context_tokens=300)
    for ticket in (1, 2, 3):
        add(bench, ticket, prompt((1, 200), (1 + ticket, 30)), max_tokens=20)
    for _ in range(4):
        bench.step()
    assert bench.scheduler.num_sequences == 3
    bench.run()
    for ticket in (1, 2, 3):
        assert bench.text(ticket) == text_of(bench, prompt((1, 200), (1 + ticket, 30)), 20)


def test_a_cancelled_reader_leaves_what_it_read(make_bench: MakeBench) -> None:
    """Those who waited for its prefix go on from there."""
    bench = make_bench(max_batch_tokens=64, context_tokens=512, kv_tokens=2048)
    add(bench, 1, prompt((1, 300), (2, 20)))
    add(bench, 2, prompt((1, 300), (3, 20)))
    for _ in range(3):
        bench.step()
    bench.scheduler.cancel(1)
    bench.run()
    assert bench.last(2).timings.num_cached_tokens == 192
    assert bench.text(2) == text_of(bench, prompt((1, 300), (3, 20)))


@pytest.mark.parametrize("variant", ["sharing", "copying"])
def test_namespaces_do_not_see_each_other(make_bench: MakeBench, variant: str) -> None:
    """The same prompt from another app is computed anew."""
    bench = make_bench(VARIANTS[variant]())
    tokens = prompt((1, 100))
    ask(bench, 1, tokens, namespace="one")
    report = ask(bench, 2, tokens, namespace="two")
    assert (report.num_tokens, report.miss) == (0, MissReason.NO_ENTRY)
    assert ask(bench, 3, [*tokens, 1], namespace="one").num_tokens == 100


def test_a_request_may_want_none_of_it(make_bench: MakeBench) -> None:
    """It reuses nothing, and leaves nothing behind."""
    bench = make_bench()
    tokens = prompt((1, 100))
    report = ask(bench, 1, tokens, use_cache=False)
    assert report.miss is MissReason.TURNED_OFF
    assert ask(bench, 2, tokens).num_tokens == 0
    assert ask(bench, 3, tokens, use_cache=False).num_tokens == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_idle_sequences_go_when_their_cells_are_needed(make_bench: MakeBench, variant: str) -> None:
    """Whatever lies idle, a request that fits the pool alone is served at once."""
    bench = make_bench(VARIANTS[variant](), kv_tokens=400, context_tokens=400)
    for ticket in range(1, 4):
        ask(bench, ticket, prompt((ticket, 100)))
    assert bench.scheduler.stats().num_idle_sequences == 3
    tokens = prompt((9, 350))
    ask(bench, 9, tokens)
    assert bench.text(9) == text_of(bench, tokens)
    assert bench.scheduler.stats().num_idle_evicted == 3


def test_the_idle_sequence_that_was_used_goes_last(make_bench: MakeBench) -> None:
    """Of two of equal age the one that a later prompt went on from stays."""
    bench = make_bench(kv_tokens=400, context_tokens=400)
    ask(bench, 1, prompt((1, 100)))
    ask(bench, 2, prompt((2, 100)))
    ask(bench, 3, prompt((1, 100), (3, 10)))
    ask(bench, 4, prompt((4, 150)))
    assert ask(bench, 5, prompt((1, 100), (5, 10))).num_tokens == 100
    assert ask(bench, 6, prompt((2, 100), (6, 10))).num_tokens == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_sequence_is_enough_to_go_on(make_bench: MakeBench, variant: str) -> None:
    """A plan with a single sequence serves conversations, if need be from the beginning."""
    bench = make_bench(VARIANTS[variant](), max_sequences=1)
    tokens = prompt((1, 100))
    for ticket in range(1, 4):
        ask(bench, ticket, tokens)
        assert bench.text(ticket) == text_of(bench, tokens)
        tokens = tokens + prompt((ticket, 20))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_restart_finds_the_prompt_on_disk(
    make_bench: MakeBench, make_cache: MakeCache, variant: str
) -> None:
    """A new engine restores what another process read, up to the last boundary."""
    engine = VARIANTS[variant]()
    cache = make_cache(engine)
    bench = make_bench(engine, cache=cache)
    first = prompt((1, 100), (2, 60))
    ask(bench, 1, first, boundaries=(100, 150))
    cache.flush()
    again = VARIANTS[variant]()
    bench = make_bench(again, cache=make_cache(again))
    report = ask(bench, 1, first, boundaries=(100, 150))
    assert (report.source, report.num_tokens) == (CacheSource.DISK, 150)
    assert bench.text(1) == text_of(bench, first)
    assert bench.scheduler.stats().num_disk_tokens == 150


def test_a_conversation_writes_only_what_is_new(
    make_bench: MakeBench, make_cache: MakeCache
) -> None:
    """Two branches of one system prompt: it lies on the disk once."""
    engine = ToyEngine()
    cache = make_cache(engine)
    bench = make_bench(engine, cache=cache)
    ask(bench, 1, prompt((1, 100), (2, 60)), boundaries=(100, 160))
    ask(bench, 2, prompt((1, 100), (3, 60)), boundaries=(100, 160))
    cache.flush()
    assert bench.scheduler.stats().store.num_entries == 3
    again = ToyEngine()
    bench = make_bench(again, cache=make_cache(again))
    for ticket, seed in ((1, 2), (2, 3)):
        tokens = prompt((1, 100), (seed, 60), (9, 5))
        ask(bench, ticket, tokens)
        assert bench.text(ticket) == text_of(bench, tokens)
    assert bench.last(2).timings.num_cached_tokens == 160


def test_a_damaged_entry_is_a_counted_miss(
    make_bench: MakeBench, make_cache: MakeCache, tmp_path: Path
) -> None:
    """The engine's checksum finds it, the prompt is computed, and the report says so."""
    engine = ToyEngine()
    cache = make_cache(engine)
    tokens = prompt((1, 200))
    ask(make_bench(engine, cache=cache), 1, tokens)
    cache.flush()
    (entry,) = (tmp_path / "store").rglob("*.kv")
    data = bytearray(entry.read_bytes())
    data[-5] ^= 0xFF
    entry.write_bytes(data)
    again = ToyEngine()
    bench = make_bench(again, cache=make_cache(again))
    report = ask(bench, 1, tokens)
    assert (report.num_tokens, report.miss) == (0, MissReason.DAMAGED)
    assert bench.text(1) == text_of(bench, tokens)
    assert bench.scheduler.stats().store.num_damaged == 1


def test_a_full_window_shifts_where_the_request_allows_it(make_bench: MakeBench) -> None:
    """The answer outgrows the window, the first tokens stay, and the count is told."""
    bench = make_bench(context_tokens=100, kv_tokens=400)
    add(bench, 1, prompt((1, 60)), max_tokens=200, shift_keep_tokens=10)
    bench.run()
    timings = bench.last(1).timings
    assert timings.num_completion_tokens == 200
    assert timings.num_shifted_tokens >= 160 - 1
    assert ask(bench, 2, prompt((1, 60))).num_tokens == 0, "a shifted sequence is nobody's prefix"


def test_what_a_sequence_lends_before_it_shifts_is_there_when_it_does(
    make_bench: MakeBench,
) -> None:
    """Others share its prompt and fill the pool: it still finds cells for a copy of its own."""
    bench = make_bench(context_tokens=200, kv_tokens=400, max_sequences=4)
    tokens = prompt((1, 150))
    add(bench, 1, tokens, max_tokens=120, shift_keep_tokens=8)
    for _ in range(3):
        bench.step()
    for ticket in (2, 3, 4):
        add(bench, ticket, tokens, max_tokens=50)
    pool = bench.scheduler._pool
    while bench.scheduler.has_work:
        bench.step()
        assert pool._cells.num_used + pool._num_promised <= 400
    assert bench.last(1).timings.num_shifted_tokens > 0
    for ticket in (2, 3, 4):
        assert bench.text(ticket) == text_of(bench, tokens, 50)


def test_an_idle_twin_gives_way_to_a_shift(make_bench: MakeBench) -> None:
    """One of two choices has ended and lies idle; the other needs its cells when it shifts."""
    bench = make_bench(context_tokens=200, kv_tokens=400)
    add(bench, 1, prompt((1, 180)), max_tokens=100, num_choices=2, shift_keep_tokens=8)
    for _ in range(3):
        bench.step()
    pool = bench.scheduler._pool
    job = bench.scheduler._jobs[1]
    bench.scheduler._leave(job.choices[1])
    add(bench, 2, prompt((2, 150)), max_tokens=30)
    while bench.scheduler.has_work:
        bench.step()
        assert pool._cells.num_used + pool._num_promised <= 400
    assert bench.last(1).error is None
    assert bench.last(1).timings.num_shifted_tokens > 0


def test_a_conversation_that_may_shift_goes_on_where_it_was(make_bench: MakeBench) -> None:
    """Its history is more than half of the pool; an idle sequence needs no second set of cells."""
    bench = make_bench(context_tokens=400, kv_tokens=400)
    first = prompt((1, 250))
    ask(bench, 1, first, shift_keep_tokens=8)
    second = first + prompt((2, 30))
    report = ask(bench, 2, second, shift_keep_tokens=8)
    assert report.num_tokens == 250
    assert bench.text(2) == text_of(bench, second)


def test_prompts_that_begin_alike_are_kept_to_their_ends(
    make_bench: MakeBench, make_cache: MakeCache
) -> None:
    """Both line up the same beginning; that it is there does not cost the second its end."""
    engine = ToyEngine()
    cache = make_cache(engine)
    bench = make_bench(engine, cache=cache)
    prompts = [prompt((1, 100), (seed, 80)) for seed in (2, 3)]
    keeper = bench.scheduler._reuse._keeper
    run_one, keeper.run_one = keeper.run_one, lambda: None
    for ticket, tokens in enumerate(prompts):
        add(bench, ticket, tokens, boundaries=(100, 180))
    for _ in range(20):
        bench.step()
    keeper.run_one = run_one
    bench.run()
    assert [cache.stored("", np.array(tokens, np.int32)) for tokens in prompts] == [180, 180]


def test_a_text_is_kept_whole_where_states_cannot_be_cut(
    make_bench: MakeBench, make_cache: MakeCache
) -> None:
    """A prompt without turns ends at its only boundary; when it is sent again it is restored."""
    engine = WholeToy()
    cache = make_cache(engine)
    tokens = prompt((1, 100))
    ask(make_bench(engine, cache=cache), 1, tokens, boundaries=(100,))
    cache.flush()
    again = WholeToy()
    bench = make_bench(again, cache=make_cache(again))
    report = ask(bench, 1, tokens, boundaries=(100,))
    assert (report.source, report.num_tokens) == (CacheSource.DISK, 99)
    assert bench.text(1) == text_of(bench, tokens)


def test_a_copy_that_fails_leaves_no_sequence_behind(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A boundary's checkpoint cannot be made: its request ends, and nothing stays open."""
    bench = make_bench(WholeToy())

    def fail(source: int, target: int, num_tokens: int) -> None:
        raise EngineError("toy: no")

    monkeypatch.setattr(bench.engine, "fork", fail)
    add(bench, 1, prompt((1, 100), (2, 40)), boundaries=(100,))
    bench.run()
    assert bench.last(1).error.message == "toy: no"
    assert bench.scheduler.num_sequences == 0


def test_one_prompt_is_restored_in_a_step_that_others_wait_for(
    make_bench: MakeBench, make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a slow disk, two prompts at once do not hold up who decodes for both their segments."""
    engine = ToyEngine()
    cache = make_cache(engine)
    bench = make_bench(engine, cache=cache)
    for ticket in (1, 2):
        ask(bench, ticket, prompt((ticket, 200)))
    cache.flush()
    again = ToyEngine()
    cache = make_cache(again)
    bench = make_bench(again, cache=cache)
    reads: list[float] = []
    read = cache.read

    def read_slowly(segment: Any) -> memoryview | None:
        bench.now_s += 0.2
        reads.append(bench.now_s)
        return read(segment)

    monkeypatch.setattr(cache, "read", read_slowly)
    add(bench, 3, prompt((3, 20)), max_tokens=50)
    bench.step()
    for ticket in (1, 2):
        add(bench, ticket, prompt((ticket, 200)))
    bench.step()
    assert len(reads) == 1
    bench.step()
    assert len(reads) == 2
    bench.run()
    assert bench.text(2) == text_of(bench, prompt((2, 200)))


def test_a_long_prompt_is_kept_whole_however_little_may_be_in_flight(
    make_bench: MakeBench, tmp_path: Path
) -> None:
    """Its parts wait for each other's way to the disk instead of being dropped."""
    engine = ToyEngine()
    limited = msgspec.structs.replace(options(tmp_path / "store"), max_inflight_bytes=60_000)
    cache = PrefixCache(
        limited,
        Model(name="toy", paths=(), identity=engine.kv_identity),
        can_cut=True,
        can_export_range=True,
    )
    bench = make_bench(engine, cache=cache, context_tokens=512, kv_tokens=1024)
    bench.scheduler._reuse._keeper._segment_tokens = 100
    tokens = prompt((1, 400))
    add(bench, 1, tokens)
    while bench.scheduler.has_work:
        bench.step()
    cache.flush()
    stats = cache.stats()
    assert (stats.num_entries, stats.skipped) == (4, {})
    cache.close()
