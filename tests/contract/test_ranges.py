"""Parts of sequences leave memory and come back, and whole sequences change hands."""

import ctypes
from collections.abc import Callable

import pytest
from support.driver import (
    GREEDY,
    Run,
    assert_close,
    assert_same,
    decode,
    feed,
    follow,
    generate,
    prefill,
)
from support.models import plan_for

from brim.core.plan import Plan
from brim.core.sampling import SamplingParams
from brim.core.step import Feed, StepPlan
from brim.engine import kv_block
from brim.engine.base import Engine
from brim.errors import DoesNotFit, EngineError, StoreError

MakeEngine = Callable[..., Engine]
Load = Callable[[Plan], Engine]

NUM_TOKENS = 16


@pytest.mark.parametrize("ends", [(60,), (1, 60), (23, 24, 59), (16, 32, 48), (59, 60)], ids=str)
def test_parts_that_come_back_equal_recomputed(
    engine: Engine, prompt: list[int], ends: tuple[int, ...]
) -> None:
    """However a prefix is parted, a sequence put together again goes on as if it had read it."""
    reference = generate(engine, [*prompt, 5], NUM_TOKENS)
    source = generate(engine, prompt, 1)
    target = Run(engine.open(GREEDY))
    start = 0
    for end in ends:
        block = engine.export_kv(source.seq_id, start, end)
        engine.import_kv(target.seq_id, block)
        assert engine.num_tokens(target.seq_id) == end
        start = end
    prefill(engine, target, [*prompt[start:], 5])
    decode(engine, target, NUM_TOKENS)
    assert_same(reference, target)


def test_an_export_changes_nothing(engine: Engine, prompt: list[int]) -> None:
    """A sequence whose parts are exported, and a fork of it, go on as if nothing had been."""
    reference = generate(engine, prompt, NUM_TOKENS)
    other_reference = generate(engine, [*prompt[:50], 9], NUM_TOKENS)
    source = generate(engine, prompt, 3)
    fork = Run(engine.open(GREEDY))
    engine.fork(source.seq_id, fork.seq_id, 50)
    for start, end in ((0, 20), (20, 60), (49, 51), (60, None)):
        engine.export_kv(source.seq_id, start, end)
    assert engine.num_tokens(source.seq_id) == len(prompt) + 2
    decode(engine, source, NUM_TOKENS)
    feed(engine, fork, [9])
    decode(engine, fork, NUM_TOKENS)
    assert_same(reference, source)
    assert_same(other_reference, fork)


def test_a_part_continues_a_fork(engine: Engine, prompt: list[int]) -> None:
    """A forked prefix takes what followed it from a block, and its source does not notice."""
    reference = generate(engine, prompt, NUM_TOKENS)
    other = [*prompt[:40], *reversed(prompt[:30])]
    other_reference = generate(engine, other, NUM_TOKENS)
    first, second = generate(engine, prompt, 1), generate(engine, other, 1)
    block = bytes(engine.export_kv(first.seq_id, 40, len(prompt) - 1))
    engine.close(first.seq_id)
    target = Run(engine.open(GREEDY))
    engine.fork(second.seq_id, target.seq_id, 40)
    engine.import_kv(target.seq_id, block)
    feed(engine, target, prompt[-1:])
    decode(engine, target, NUM_TOKENS)
    decode(engine, second, NUM_TOKENS)
    assert_same(reference, target)
    assert_same(other_reference, second)


def test_a_part_can_be_cut_after_it_came_back(engine: Engine, prompt: list[int]) -> None:
    """Of an imported block any prefix can be kept, and another block continues it."""
    reference = generate(engine, prompt, NUM_TOKENS)
    source = generate(engine, prompt, 1)
    target = Run(engine.open(GREEDY))
    engine.import_kv(target.seq_id, engine.export_kv(source.seq_id, 0, 60))
    engine.truncate(target.seq_id, 45)
    engine.import_kv(target.seq_id, engine.export_kv(source.seq_id, 45, 55))
    prefill(engine, target, prompt[55:])
    decode(engine, target, NUM_TOKENS)
    assert_same(reference, target)


def test_parts_move_while_every_sequence_is_open(make_engine: MakeEngine) -> None:
    """No sequence needs to be free for a part to be exported or appended."""
    engine = make_engine(max_sequences=2)
    tokens = list(range(5, 45))
    source = generate(engine, tokens, 1)
    target = Run(engine.open(GREEDY))
    engine.step(StepPlan([Feed(target.seq_id, tokens[:10], False)]))
    engine.import_kv(target.seq_id, engine.export_kv(source.seq_id, 10, 39))
    feed(engine, target, tokens[39:])
    decode(engine, target, NUM_TOKENS)
    decode(engine, source, NUM_TOKENS)
    assert_same(source, target)


def test_a_block_goes_where_it_is_told(engine: Engine, prompt: list[int]) -> None:
    """An export fills the memory that the caller makes for it, once and to the byte."""
    source = generate(engine, prompt, 1)
    made: list[bytearray] = []

    def allocate(num_bytes: int) -> memoryview:
        made.append(bytearray(num_bytes))
        return memoryview(made[-1])

    view = engine.export_kv(source.seq_id, 20, 60, allocate=allocate)
    assert len(made) == 1
    assert view.obj is made[0]
    assert bytes(made[0]) == bytes(engine.export_kv(source.seq_id, 20, 60))


@pytest.mark.parametrize(
    ("start", "end"), [(10, 10), (20, 10), (0, 51), (50, None), (-1, 10), (0, 0)]
)
def test_parts_that_are_none_are_refused(engine: Engine, start: int, end: int | None) -> None:
    """An empty part, or one that the sequence does not have, is an error that says both ends."""
    run = Run(engine.open(GREEDY))
    engine.step(StepPlan([Feed(run.seq_id, list(range(5, 55)), False)]))
    with pytest.raises(EngineError, match="of a sequence that has 50"):
        engine.export_kv(run.seq_id, start, end)


@pytest.mark.parametrize("num_held", [0, 19, 21])
def test_a_part_fits_in_its_place_alone(engine: Engine, num_held: int) -> None:
    """A block is appended only where the tokens before it are held; nothing changes otherwise."""
    tokens = list(range(5, 55))
    reference = generate(engine, [*tokens[:num_held], 7], NUM_TOKENS)
    block = engine.export_kv(generate(engine, tokens, 1).seq_id, 20, 40)
    target = Run(engine.open(GREEDY))
    if num_held:
        engine.step(StepPlan([Feed(target.seq_id, tokens[:num_held], False)]))
    with pytest.raises(StoreError, match=f"continues 20 tokens; the sequence has {num_held}"):
        engine.import_kv(target.seq_id, block)
    assert engine.num_tokens(target.seq_id) == num_held
    feed(engine, target, [7])
    decode(engine, target, NUM_TOKENS)
    assert_same(reference, target)


def test_a_damaged_part_leaves_the_sequence_alone(engine: Engine) -> None:
    """A flipped byte anywhere in a part is found before the sequence is touched."""
    tokens = list(range(5, 55))
    reference = generate(engine, [*tokens[:20], 7], NUM_TOKENS)
    block = bytes(engine.export_kv(generate(engine, tokens, 1).seq_id, 20, 40))
    target = Run(engine.open(GREEDY))
    engine.step(StepPlan([Feed(target.seq_id, tokens[:20], False)]))
    for at in (0, 17, 40, 60, len(block) // 2, len(block) - 1):
        damaged = bytearray(block)
        damaged[at] ^= 0x10
        with pytest.raises(StoreError):
            engine.import_kv(target.seq_id, bytes(damaged))
    feed(engine, target, [7])
    decode(engine, target, NUM_TOKENS)
    assert_same(reference, target)


def test_a_state_of_another_place_is_refused(load: Load) -> None:
    """A block whose state has other positions than its header says is found out."""
    engine = load(plan_for("llamacpp"))
    tokens = list(range(5, 55))
    block = engine.export_kv(generate(engine, tokens, 1).seq_id, 20, 40)
    state = kv_block.read(engine.kv_identity, block).state

    def fill(address: int, size: int) -> int:
        ctypes.memmove(address, bytes(state), size)
        return size

    target = Run(engine.open(GREEDY))
    engine.step(StepPlan([Feed(target.seq_id, tokens[:21], False)]))
    for start, end in ((21, 41), (21, 40)):
        lie = kv_block.write(engine.kv_identity, tokens[start:end], len(state), fill, start=start)
        with pytest.raises(StoreError, match="other positions"):
            engine.import_kv(target.seq_id, lie)
        assert engine.num_tokens(target.seq_id) == 21
    reference = generate(engine, [*tokens[:21], 7], NUM_TOKENS)
    feed(engine, target, [7])
    decode(engine, target, NUM_TOKENS)
    assert_same(reference, target)


def test_a_part_without_room_does_not_fit(make_engine: MakeEngine) -> None:
    """A part that finds too few free cells is refused, and appended once there are some."""
    engine = make_engine(kv_tokens=256, context_tokens=256)
    tokens = [5 + place % 90 for place in range(120)]
    source = generate(engine, tokens, 1)
    block = bytes(engine.export_kv(source.seq_id, 40, 119))
    target, filler = Run(engine.open(GREEDY)), Run(engine.open(GREEDY))
    engine.step(StepPlan([Feed(target.seq_id, tokens[:40], False)]))
    engine.step(StepPlan([Feed(filler.seq_id, tokens[:60], False)]))
    with pytest.raises(DoesNotFit, match="room"):
        engine.import_kv(target.seq_id, block)
    assert engine.num_tokens(target.seq_id) == 40
    engine.close(filler.seq_id)
    engine.import_kv(target.seq_id, block)
    feed(engine, target, tokens[-1:])
    assert_same(source, target)


def test_a_part_over_the_window_does_not_fit(make_engine: MakeEngine) -> None:
    """A part that would end behind the context is refused with both numbers."""
    wide, narrow = make_engine(), make_engine(context_tokens=64)
    tokens = list(range(5, 75))
    block = wide.export_kv(generate(wide, tokens, 1).seq_id, 30, 70)
    target = Run(narrow.open(GREEDY))
    narrow.step(StepPlan([Feed(target.seq_id, tokens[:30], False)]))
    with pytest.raises(DoesNotFit, match="token 70; the context is 64"):
        narrow.import_kv(target.seq_id, block)


def test_penalties_see_the_tokens_of_a_part(engine: Engine, prompt: list[int]) -> None:
    """What was appended from a block counts as repeated, as if it had been read."""
    params = SamplingParams(temperature=0.0, repeat_penalty=1.5, repeat_last_n=64)
    reference = generate(engine, prompt, NUM_TOKENS, params)
    source = generate(engine, prompt, 1)
    target = Run(engine.open(params))
    feed(engine, target, prompt[:50])
    # The token that was drawn here is dropped, and must not count.
    target = Run(target.seq_id)
    engine.import_kv(target.seq_id, engine.export_kv(source.seq_id, 50, len(prompt) - 1))
    feed(engine, target, prompt[-1:])
    decode(engine, target, NUM_TOKENS)
    assert_same(reference, target)


def test_a_draw_that_was_dropped_is_not_taken_for_what_is_fed(engine: Engine) -> None:
    """A token that was drawn before an import, and is fed after it, counts in its new place."""
    last = 60
    # Whatever was not the last token, `last` comes next.
    params = SamplingParams(
        temperature=0.0, presence_penalty=1e5, repeat_last_n=1, logit_bias=((last, 1e4),)
    )
    run = Run(engine.open(params))
    drawn = feed(engine, run, [50, 51, last])
    assert drawn != last
    source = generate(engine, [50, 51, last, 52, last, 53], 1)
    engine.import_kv(run.seq_id, engine.export_kv(source.seq_id, 3, 5))
    assert feed(engine, run, [drawn]) == last


@pytest.mark.parametrize("max_tokens", [None, 10, 300])
def test_a_moved_sequence_is_the_same_under_other_sampling(
    engine: Engine, prompt: list[int], max_tokens: int | None
) -> None:
    """What takes a sequence over draws as one that had read it all itself, by its own rules."""
    params = SamplingParams(temperature=0.0, repeat_penalty=1.3)
    source = generate(engine, prompt, 4)
    everything = [*prompt, *source.tokens]
    reference = generate(engine, everything, NUM_TOKENS, params)
    target = Run(engine.open(params, max_tokens))
    engine.move(source.seq_id, target.seq_id)
    assert engine.num_tokens(target.seq_id) == len(everything) - 1
    assert engine.open(GREEDY) == source.seq_id
    feed(engine, target, everything[-1:])
    decode(engine, target, NUM_TOKENS)
    assert_same(reference, target)


def test_a_move_onto_tokens_is_refused(engine: Engine) -> None:
    """Only an empty sequence takes another over; both stay as they are otherwise."""
    source, target = Run(engine.open(GREEDY)), Run(engine.open(GREEDY))
    for run in (source, target):
        engine.step(StepPlan([Feed(run.seq_id, [5, 6, 7], False)]))
    with pytest.raises(EngineError, match="already holds 3 tokens"):
        engine.move(source.seq_id, target.seq_id)
    assert engine.num_tokens(source.seq_id) == engine.num_tokens(target.seq_id) == 3


@pytest.mark.parametrize("flash_attention", [True, False], ids=["flash", "transposed"])
@pytest.mark.parametrize("kv_type", ["f16", "f32"])
def test_both_layouts_of_values_part(load: Load, kv_type: str, flash_attention: bool) -> None:
    """Without flash attention llama.cpp keeps values by columns, and parts of them come back."""
    plan = plan_for(
        "llamacpp", exact=False, flash_attention=flash_attention, kv_type=kv_type, max_sequences=3
    )
    engine = load(plan)
    tokens = [5 + place * place % 90 for place in range(60)]
    source = generate(engine, tokens, 1)
    target = Run(engine.open(GREEDY))
    for start, end in ((0, 13), (13, 14), (14, 59)):
        engine.import_kv(target.seq_id, engine.export_kv(source.seq_id, start, end))
    feed(engine, target, tokens[-1:])
    reader = generate(engine, tokens, 1)
    for run in (source, target, reader):
        follow(engine, run, [9, 8, 7, 6])
    # Cells in another order, and a prompt read at once, are summed in another order.
    assert_close(reader, source, rounding=0.1)
    assert_close(reader, target, rounding=0.1)
