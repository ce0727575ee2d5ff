"""What would abort a backend, or break a promise, is refused with numbers and changes nothing."""

import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
from support.driver import GREEDY, Run, assert_same, decode, feed, generate
from support.models import plan_for

from brim.core.plan import Plan
from brim.core.sampling import SamplingParams
from brim.core.step import Feed, StepPlan
from brim.engine import guards
from brim.engine.base import Engine
from brim.errors import Busy, DoesNotFit, EngineError, InvalidRequest, StoreError

MakeEngine = Callable[..., Engine]
Load = Callable[[Plan], Any]


def test_more_sequences_than_planned_are_busy(make_engine: MakeEngine) -> None:
    """The plan's number of sequences can be open, and one more is refused for now."""
    engine = make_engine(max_sequences=2)
    engine.open(GREEDY)
    second = engine.open(GREEDY)
    with pytest.raises(Busy, match="2 sequences"):
        engine.open(GREEDY)
    engine.close(second)
    assert engine.open(GREEDY) == second


def test_a_step_over_the_row_limit_is_refused(make_engine: MakeEngine) -> None:
    """More rows than the plan's batch are refused before the backend sees them."""
    engine = make_engine(max_batch_tokens=32)
    run = Run(engine.open(GREEDY))
    with pytest.raises(EngineError, match="33 rows"):
        feed(engine, run, [1] * 33)
    feed(engine, run, [1] * 32)
    assert engine.num_tokens(run.seq_id) == 32


def test_a_sequence_over_the_context_is_refused(make_engine: MakeEngine) -> None:
    """A sequence stops at the window, with both numbers in the message."""
    engine = make_engine(context_tokens=64)
    run = Run(engine.open(GREEDY))
    feed(engine, run, [1] * 64)
    with pytest.raises(EngineError, match="65 tokens; the context is 64"):
        feed(engine, run, [1])


def test_a_full_pool_is_busy_and_closing_frees_it(make_engine: MakeEngine) -> None:
    """When no cell is free a step changes nothing, and a closed sequence's cells serve again."""
    engine = make_engine(kv_tokens=256, context_tokens=256)
    first, second = Run(engine.open(GREEDY)), Run(engine.open(GREEDY))
    feed(engine, first, [5] * 200)
    reference = generate(engine, [7] * 20, 8)
    engine.close(reference.seq_id)
    with pytest.raises(Busy, match="pool"):
        feed(engine, second, [7] * 100)
    assert engine.num_tokens(second.seq_id) == 0
    engine.close(first.seq_id)
    feed(engine, second, [7] * 100)
    engine.truncate(second.seq_id, 20)
    engine.truncate(second.seq_id, 19)
    again = Run(second.seq_id)
    feed(engine, again, [7])
    decode(engine, again, 8)
    assert_same(reference, again)


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ([Feed(0, [1]), Feed(0, [2])], "twice"),
        ([Feed(0, [])], "nothing"),
        ([Feed(5, [1])], "not open"),
        ([Feed(0, [-1])], "outside"),
        ([Feed(0, [10**6])], "outside"),
        ([], "without rows"),
        ([Feed(0, [1], True, b"\1")], "mask"),
    ],
)
def test_a_malformed_step_is_refused(engine: Engine, feeds: list[Feed], message: str) -> None:
    """Steps that break the contract's rules raise an error and leave the sequence alone."""
    assert engine.open(GREEDY) == 0
    feed(engine, Run(0), [1, 2, 3])
    with pytest.raises(EngineError, match=message):
        engine.step(StepPlan(feeds))
    assert engine.num_tokens(0) == 3
    feed(engine, Run(0), [4])


def test_a_mask_that_allows_nothing_is_refused(engine: Engine) -> None:
    """A dead end of a grammar is an error, not a token and not an abort."""
    seq_id = engine.open(GREEDY)
    nothing = bytes((engine.tokenizer.vocab_size + 7) // 8)
    with pytest.raises(EngineError, match="no token"):
        engine.step(StepPlan([Feed(seq_id, [1], True, nothing)]))


def test_submit_and_collect_come_in_pairs(engine: Engine) -> None:
    """A second submit or a second collect is refused."""
    seq_id = engine.open(GREEDY)
    engine.submit(StepPlan([Feed(seq_id, [1])]))
    with pytest.raises(EngineError, match="before the last one"):
        engine.submit(StepPlan([Feed(seq_id, [2])]))
    assert len(engine.collect().sampled) == 1
    with pytest.raises(EngineError, match="without submit"):
        engine.collect()


def test_unknown_sequences_are_refused_everywhere(engine: Engine) -> None:
    """Every method that takes a sequence refuses one that is not open."""
    calls: list[Callable[[], object]] = [
        lambda: engine.close(3),
        lambda: engine.num_tokens(3),
        lambda: engine.fork(3, 4, 0),
        lambda: engine.truncate(3, 0),
        lambda: engine.export_kv(3),
        lambda: engine.import_kv(3, b""),
        lambda: engine.logits(3),
    ]
    for call in calls:
        with pytest.raises(EngineError, match="not open"):
            call()


def test_forks_and_cuts_out_of_range_are_refused(engine: Engine) -> None:
    """A fork needs an empty target and enough tokens; a cut cannot lengthen."""
    source, target = engine.open(GREEDY), engine.open(GREEDY)
    feed(engine, Run(source), [1] * 10)
    with pytest.raises(EngineError, match="share 11 tokens of a sequence of 10"):
        engine.fork(source, target, 11)
    with pytest.raises(EngineError, match="already holds"):
        engine.fork(target, source, 0)
    with pytest.raises(EngineError, match="cut a sequence of 10 tokens to 11"):
        engine.truncate(source, 11)


def test_a_pool_too_small_for_what_is_open_is_refused(make_engine: MakeEngine) -> None:
    """Shrinking under the tokens in use changes nothing."""
    engine = make_engine(kv_tokens=1024)
    reference = generate(engine, [9] * 50, 12)
    run = Run(engine.open(GREEDY))
    feed(engine, run, [9] * 50)
    for _ in range(2):
        filler = Run(engine.open(GREEDY))
        feed(engine, filler, [3] * 200)
        feed(engine, filler, [3] * 200)
    with pytest.raises(DoesNotFit, match="256"):
        engine.resize_kv(256)
    decode(engine, run, 12)
    assert_same(reference, run)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (SamplingParams(repeat_penalty=0.0), "repeat_penalty"),
        (SamplingParams(temperature=float("nan")), "temperature"),
        (SamplingParams(presence_penalty=float("inf")), "presence_penalty"),
        (SamplingParams(logit_bias=((10**7, 1.0),)), "logit_bias"),
        (SamplingParams(logit_bias=((1, float("nan")),)), "logit_bias"),
        (SamplingParams(top_p=-0.5), "top_p"),
        (SamplingParams(logit_bias=((1, 1e300),)), "logit_bias"),
        (SamplingParams(dry_allowed_length=2**33), "dry_allowed_length"),
        (SamplingParams(top_k=-1), "top_k"),
        (SamplingParams(xtc_threshold=float("nan")), "xtc_threshold"),
        (SamplingParams(seed=-1), "seed"),
    ],
)
def test_sampling_values_out_of_range_are_refused(
    engine: Engine, params: SamplingParams, message: str
) -> None:
    """Values that a sampler would choke on are the client's error, with the name."""
    with pytest.raises(InvalidRequest, match=message) as caught:
        engine.open(params)
    assert caught.value.param == message


def test_every_numeric_sampling_field_has_a_range() -> None:
    """A new field of SamplingParams cannot be forgotten by the guard."""
    others = {"logit_bias", "dry_sequence_breakers", "ignore_eos"}
    assert set(guards._RANGES) == set(SamplingParams.__struct_fields__) - others


def test_a_mask_and_a_bias_that_leave_nothing_are_refused(engine: Engine) -> None:
    """Where the mask allows one token and the bias forbids it, no other is drawn instead."""
    mask = bytearray((engine.tokenizer.vocab_size + 7) // 8)
    mask[0] = 1 << 7
    seq_id = engine.open(SamplingParams(logit_bias=((7, -math.inf),)))
    with pytest.raises(EngineError, match="allow no token"):
        engine.step(StepPlan([Feed(seq_id, [1], True, bytes(mask))]))


def test_a_temperature_near_zero_is_greedy(engine: Engine) -> None:
    """A temperature that would overflow the logits draws the likeliest token."""
    run = generate(engine, [5, 6, 7], 4, SamplingParams(temperature=1e-38))
    assert run.tokens == generate(engine, [5, 6, 7], 4).tokens


def test_more_rows_than_the_pool_are_busy(make_engine: MakeEngine) -> None:
    """A pool smaller than the batch bounds the step too: llama.cpp would abort."""
    engine = make_engine(kv_tokens=256, context_tokens=256, max_batch_tokens=512)
    seq_ids = [engine.open(GREEDY) for _ in range(2)]
    with pytest.raises(Busy):
        engine.step(StepPlan([Feed(seq_id, [1] * 200) for seq_id in seq_ids]))
    feed(engine, Run(seq_ids[0]), [1] * 200)


def test_a_damaged_block_is_refused_whole(engine: Engine) -> None:
    """A flipped bit anywhere, a cut anywhere: the import fails and the sequence stays empty."""
    run = generate(engine, [5, 6, 7] * 10, 1)
    blob = bytes(engine.export_kv(run.seq_id))
    target = engine.open(GREEDY)
    step = max(1, len(blob) // 60)
    for at in [*range(0, len(blob), step), len(blob) - 1]:
        flipped = bytearray(blob)
        flipped[at] ^= 0x10
        for bad in (bytes(flipped), blob[:at]):
            with pytest.raises(StoreError):
                engine.import_kv(target, bad)
            assert engine.num_tokens(target) == 0
    engine.import_kv(target, blob)
    assert engine.num_tokens(target) == 30


def test_a_block_of_another_kv_type_is_refused(make_engine: MakeEngine) -> None:
    """A block goes back only into a cache of the type that it came from."""
    if "q8_0" not in make_engine(kv_type="f16").capabilities.kv_types:
        pytest.skip("this engine has one KV type")
    source, other = make_engine(kv_type="q8_0"), make_engine(kv_type="f16")
    run = generate(source, [5] * 20, 1)
    target = other.open(GREEDY)
    with pytest.raises(StoreError, match="not of"):
        other.import_kv(target, source.export_kv(run.seq_id))
    assert other.num_tokens(target) == 0


def test_an_import_without_room_does_not_fit(make_engine: MakeEngine) -> None:
    """A block that needs more cells than are free is refused and leaves nothing behind."""
    engine = make_engine(kv_tokens=256, context_tokens=256)
    run = generate(engine, [5] * 150, 1)
    blob = bytes(engine.export_kv(run.seq_id))
    target = engine.open(GREEDY)
    with pytest.raises(DoesNotFit):
        engine.import_kv(target, blob)
    engine.close(run.seq_id)
    engine.import_kv(target, blob)
    assert engine.num_tokens(target) == 150


def test_shutdown_may_be_called_twice(make_engine: MakeEngine) -> None:
    """Freeing what is freed is harmless."""
    engine = make_engine()
    engine.open(GREEDY)
    engine.shutdown()
    engine.shutdown()


@pytest.mark.parametrize("name", ["llamacpp", "mlx"])
def test_an_abort_ends_the_running_step(load: Load, name: str) -> None:
    """Another thread's request ends a long step, and the engine works on as before it."""
    engine = load(plan_for(name, context_tokens=8192, kv_tokens=8192, max_batch_tokens=8192))
    reference = generate(engine, [5, 6, 7], 4)
    engine.close(reference.seq_id)
    run, stop = Run(engine.open(GREEDY)), threading.Event()

    def nag() -> None:
        # The step forgets earlier requests when it starts, so one could come too early.
        while not stop.wait(0.002):
            engine.request_abort()

    thread = threading.Thread(target=nag)
    thread.start()
    try:
        with pytest.raises(EngineError, match="aborted"):
            feed(engine, run, [7] * 8000)
    finally:
        stop.set()
        thread.join()
    assert engine.num_tokens(run.seq_id) == 0
    engine.close(run.seq_id)
    assert_same(reference, generate(engine, [5, 6, 7], 4))
