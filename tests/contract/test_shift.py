"""Tokens dropped from the middle: the rest moves up, and nobody else notices."""

import struct
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from conftest import require_engine
from numpy.typing import NDArray
from support.driver import GREEDY, Run, assert_close, decode, feed, follow
from support.models import plan_for

from brim.core.plan import Plan
from brim.core.sampling import SamplingParams
from brim.core.step import Feed, StepPlan
from brim.engine import factory, kv_block
from brim.engine.base import Engine
from brim.errors import Busy, EngineError

MakeEngine = Callable[..., Engine]
Load = Callable[[Plan], Engine]

CONTINUATION = [9, 30, 31, 8, 40, 41]

TOKENS = [5 + (37 * place * place + 11 * place) % 200 for place in range(90)]

ROUNDING = 0.1
"""Float caches are summed in the order of their cells, some in f16."""


@pytest.fixture(params=["toy", "llamacpp"])
def shifting(request: pytest.FixtureRequest) -> Iterator[MakeEngine]:
    """Makes engines that can shift, with plan values overridden."""
    require_engine(request.param)
    made: list[Engine] = []

    def make(**overrides: int) -> Engine:
        engine = factory.create(request.param)
        made.append(engine)
        engine.load(plan_for(request.param, exact=False, kv_type="f16", **overrides))  # type: ignore[arg-type]
        return engine

    yield make
    for engine in made:
        engine.shutdown()


def read(engine: Engine, tokens: list[int]) -> Run:
    """A sequence that has read some tokens."""
    run = Run(engine.open(GREEDY))
    engine.step(StepPlan([Feed(run.seq_id, tokens, False)]))
    return run


def go_on(engine: Engine, run: Run) -> Run:
    """Feed a few more tokens."""
    return follow(engine, run, CONTINUATION)


def test_a_shift_drops_just_those_tokens(shifting: MakeEngine) -> None:
    """A sequence is shorter by what was dropped, can be used on, and keeps its beginning as is."""
    engine = shifting()
    assert engine.capabilities.can_shift
    run = read(engine, TOKENS)
    before = bytes(engine.export_kv(run.seq_id, 0, 10))
    engine.shift(run.seq_id, 10, 30)
    assert engine.num_tokens(run.seq_id) == 60
    assert bytes(engine.export_kv(run.seq_id, 0, 10)) == before
    held = kv_block.read(engine.kv_identity, engine.export_kv(run.seq_id)).tokens
    assert held == TOKENS[:10] + TOKENS[40:]
    go_on(engine, run)
    assert engine.num_tokens(run.seq_id) == 60 + len(CONTINUATION)


def test_shifts_add_up_alike(shifting: MakeEngine) -> None:
    """The same shifts on the same tokens give the same draws, alone and beside others."""
    engine = shifting()
    runs = []
    for _ in range(2):
        run = read(engine, TOKENS)
        for num_kept, num_dropped in ((10, 20), (10, 5), (40, 1), (0, 3)):
            engine.shift(run.seq_id, num_kept, num_dropped)
        assert engine.num_tokens(run.seq_id) == 61
        runs.append(go_on(engine, run))
    assert_close(runs[0], runs[1], rounding=ROUNDING)


def test_a_shift_at_the_end_is_a_cut(shifting: MakeEngine) -> None:
    """With nothing behind what is dropped, the sequence equals one that never read it."""
    engine = shifting()
    reference = go_on(engine, read(engine, TOKENS[:50]))
    run = read(engine, TOKENS)
    engine.shift(run.seq_id, 50, 40)
    assert_close(reference, go_on(engine, run), rounding=ROUNDING)


@pytest.mark.parametrize("num_shared", [90, 45, 20])
def test_a_shift_is_not_seen_by_forks(shifting: MakeEngine, num_shared: int) -> None:
    """Sequences that share tokens with a shifted one hold what they held, whoever was forked."""
    engine = shifting()
    reference = go_on(engine, read(engine, TOKENS))
    fork_reference = go_on(engine, read(engine, TOKENS[:num_shared]))
    shifted_reference = read(engine, TOKENS)
    engine.shift(shifted_reference.seq_id, 10, 30)
    go_on(engine, shifted_reference)
    source, bystander, fork = (
        read(engine, TOKENS),
        Run(engine.open(GREEDY)),
        Run(engine.open(GREEDY)),
    )
    engine.fork(source.seq_id, bystander.seq_id, len(TOKENS))
    engine.fork(source.seq_id, fork.seq_id, num_shared)
    engine.shift(source.seq_id, 10, 30)
    for wanted, run in (
        (shifted_reference, source),
        (reference, bystander),
        (fork_reference, fork),
    ):
        assert_close(wanted, go_on(engine, run), rounding=ROUNDING)


def test_others_are_not_touched_to_the_bit(shifting: MakeEngine) -> None:
    """What another sequence holds is the same bytes after a shift as before it."""
    engine = shifting()
    other, run = read(engine, TOKENS[:50]), read(engine, TOKENS)
    before = bytes(engine.export_kv(other.seq_id))
    engine.shift(run.seq_id, 3, 50)
    assert bytes(engine.export_kv(other.seq_id)) == before


def test_a_shifted_sequence_can_leave_memory(shifting: MakeEngine) -> None:
    """What was shifted is exported as it is, and goes on elsewhere."""
    engine = shifting()
    run, target = read(engine, TOKENS), Run(engine.open(GREEDY))
    engine.shift(run.seq_id, 10, 30)
    for start, end in ((0, 25), (25, 60)):
        engine.import_kv(target.seq_id, engine.export_kv(run.seq_id, start, end))
    assert_close(go_on(engine, run), go_on(engine, target), rounding=ROUNDING)


def test_penalties_forget_what_was_dropped(shifting: MakeEngine) -> None:
    """A dropped token counts as repeated no more."""
    engine = shifting()
    likely = 60
    params = SamplingParams(
        temperature=0.0, presence_penalty=1e5, repeat_last_n=256, logit_bias=((likely, 1e4),)
    )
    run = Run(engine.open(params))
    assert feed(engine, run, [50, likely, 51, 52]) != likely
    engine.shift(run.seq_id, 1, 1)
    assert feed(engine, run, [53]) == likely


def test_random_draws_go_on_across_a_shift(shifting: MakeEngine) -> None:
    """An answer that is shifted does not draw by the same numbers again."""
    engine = shifting()
    # So hot that every token is as likely as another, whatever was read.
    params = SamplingParams(
        temperature=1e7, presence_penalty=1e-3, seed=5, top_p=1.0, top_k=0, min_p=0.0
    )
    drawn = []
    for num_dropped in (0, 2):
        run = Run(engine.open(params))
        feed(engine, run, TOKENS[:10])
        decode(engine, run, 8)
        if num_dropped:
            engine.shift(run.seq_id, 3, num_dropped)
        decode(engine, run, 20)
        drawn.append(run.tokens)
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) > 15


@pytest.mark.parametrize(("num_kept", "num_dropped"), [(0, 0), (-1, 2), (80, 11), (91, 1)])
def test_a_shift_of_what_is_not_there_is_refused(
    engine: Engine, num_kept: int, num_dropped: int
) -> None:
    """Dropping nothing, or more than there is, is an error with the numbers."""
    run = read(engine, TOKENS)
    with pytest.raises(EngineError, match=f"drop {num_dropped} tokens behind {num_kept}"):
        engine.shift(run.seq_id, num_kept, num_dropped)
    assert engine.num_tokens(run.seq_id) == 90


def test_engines_that_cannot_shift_say_so(engine: Engine) -> None:
    """Where keys cannot be turned, a shift is refused and changes nothing."""
    if engine.capabilities.can_shift:
        pytest.skip("it can")
    reference = go_on(engine, read(engine, TOKENS))
    run = read(engine, TOKENS)
    with pytest.raises(EngineError, match="cannot be shifted"):
        engine.shift(run.seq_id, 10, 30)
    assert_close(reference, go_on(engine, run), rounding=0.0)


def first_keys(block: memoryview, identity: str, num_tokens: int) -> NDArray[np.float16]:
    """Keys of the first layer in a llama.cpp block of f16, a row for each token."""
    state = kv_block.read(identity, block).state
    # Magic, sequence, streams, cells; a position, a count and a sequence for each; the layout of
    # values, layers; then the first layer's type and bytes of a row.
    at = 16 + 12 * num_tokens + 8
    kind, row_bytes = struct.unpack_from("<iQ", state, at)
    assert kind == 1
    rows = np.frombuffer(state, np.float16, num_tokens * row_bytes // 2, at + 12)
    return rows.reshape(num_tokens, -1)


def test_keys_are_those_of_their_new_positions(load: Load) -> None:
    """In the first layer, where a key depends on its token and place alone, it is that of both."""
    engine = load(plan_for("llamacpp", exact=False, kv_type="f16"))
    run, fresh = read(engine, TOKENS), read(engine, TOKENS[:10] + TOKENS[40:])
    unturned = first_keys(engine.export_kv(run.seq_id, 40, 90), engine.kv_identity, 50)
    engine.shift(run.seq_id, 10, 30)
    turned, wanted = (
        first_keys(engine.export_kv(one.seq_id, 10, 60), engine.kv_identity, 50)
        for one in (run, fresh)
    )
    spread = float(wanted.astype(np.float32).std())
    assert np.abs(turned - wanted).max() < 0.01 * spread
    assert np.abs(unturned - wanted).max() > spread


def test_a_shift_copies_what_it_shares_or_waits(load: Load) -> None:
    """Moving shared tokens needs cells of their own; without free ones it is busy for now."""
    engine = load(
        plan_for("llamacpp", exact=False, kv_type="f16", kv_tokens=256, context_tokens=256)
    )
    long = (TOKENS * 3)[:200]
    run, fork = read(engine, long), Run(engine.open(GREEDY))
    engine.fork(run.seq_id, fork.seq_id, 200)
    with pytest.raises(Busy, match="which a shift copies"):
        engine.shift(run.seq_id, 10, 30)
    assert engine.num_tokens(run.seq_id) == 200
    engine.truncate(fork.seq_id, 100)
    engine.shift(run.seq_id, 10, 150)
    assert engine.num_tokens(run.seq_id) == 50
    go_on(engine, run)
    go_on(engine, fork)


def test_a_shift_copies_nothing_of_what_nobody_else_holds_any_more(load: Load) -> None:
    """A conversation that went on from an idle sequence fills the pool, and shifts in it."""
    engine = load(plan_for("llamacpp", exact=False, kv_type="f16", kv_tokens=256))
    earlier = read(engine, TOKENS)
    later = Run(engine.open(GREEDY))
    engine.move(earlier.seq_id, later.seq_id)
    engine.step(StepPlan([Feed(later.seq_id, TOKENS + TOKENS[:75], False)]))
    engine.shift(later.seq_id, 10, 60)
    assert engine.num_tokens(later.seq_id) == 195
    go_on(engine, later)


def test_keys_turn_in_a_full_pool(load: Load) -> None:
    """A shift needs no free cell where nothing has to be copied."""
    engine = load(
        plan_for("llamacpp", exact=False, kv_type="f16", kv_tokens=256, context_tokens=256)
    )
    reference = read(engine, TOKENS)
    engine.shift(reference.seq_id, 10, 30)
    wanted = bytes(engine.export_kv(reference.seq_id))
    engine.close(reference.seq_id)
    run, fork = read(engine, TOKENS), Run(engine.open(GREEDY))
    # The dropped tokens' cells stay taken, and so does every other one.
    engine.fork(run.seq_id, fork.seq_id, 40)
    read(engine, (TOKENS * 2)[: 256 - 90])
    engine.shift(run.seq_id, 10, 30)
    assert bytes(engine.export_kv(run.seq_id)) == wanted


@pytest.mark.parametrize("kv_type", ["q8_0", "bf16"])
def test_keys_that_would_round_again_are_not_turned(load: Load, kv_type: str) -> None:
    """Turning is for the whole pool, so types that it would change for everybody are refused."""
    engine = load(plan_for("llamacpp", exact=False, flash_attention=True, kv_type=kv_type))
    assert not engine.capabilities.can_shift
    run = read(engine, TOKENS)
    with pytest.raises(EngineError, match=f"keys in {kv_type}"):
        engine.shift(run.seq_id, 10, 30)


def test_an_abort_does_not_reach_a_shift(load: Load) -> None:
    """A request to abort that comes while keys are turned leaves them turned in every layer."""
    engine = load(plan_for("llamacpp", exact=False, kv_type="f16"))
    blocks = []
    for is_aborted in (False, True):
        run = read(engine, TOKENS)
        if is_aborted:
            engine.request_abort()
        engine.shift(run.seq_id, 10, 30)
        blocks.append(bytes(engine.export_kv(run.seq_id)))
        engine.close(run.seq_id)
    assert blocks[0] == blocks[1]
