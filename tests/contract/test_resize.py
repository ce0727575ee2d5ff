"""A pool that changes its size while answers are written: nobody notices but the system."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.driver import (
    GREEDY,
    Run,
    assert_same,
    decode,
    decode_together,
    follow,
    generate,
    prefill,
)
from support.mlx_models import FAMILIES, family_dir
from support.models import plan_for

from brim.bench.standin import blueprint, tiny, write
from brim.core.plan import Plan
from brim.core.sampling import SamplingParams
from brim.core.step import Feed, StepPlan
from brim.engine.base import Engine
from brim.engine.llamacpp import loading
from brim.errors import DoesNotFit, EngineError, StoreError
from brim.scheduler import upkeep
from brim.scheduler.loop import Scheduler
from brim.scheduler.sequence import ScheduledRequest

MakeEngine = Callable[..., Engine]
Load = Callable[[Plan], Any]

NUM_PROMPT_TOKENS = 450
NUM_IDLE = 9
"""Prompts whose sequences stay behind: with what runs they are over 4096 tokens."""

LARGE, SMALL = 16384, 4096

ENDLESS = SamplingParams(temperature=0.0, ignore_eos=True)


def prompt_of(number: int, engine: Engine) -> list[int]:
    """Tokens that no other number's prompt begins with."""
    text = f"{number:03d} = total\nfor value in values:\n    total += {number} * value\n" * 60
    tokens = engine.tokenizer.encode(text, add_special=False, parse_special=False)
    return tokens[:NUM_PROMPT_TOKENS]


class Answers:
    """What a scheduler makes of prompts."""

    def __init__(self, engine: Engine, plan: Plan) -> None:
        self.engine = engine
        self.scheduler = Scheduler(engine, plan)
        self.texts: dict[int, str] = {}

    def add(self, number: int, max_tokens: int) -> None:
        self.scheduler.add(
            ScheduledRequest(
                ticket=number,
                prompt_tokens=prompt_of(number, self.engine),
                max_tokens=max_tokens,
                sampling=ENDLESS,
            )
        )

    def step(self) -> None:
        for ticket, delta in self.scheduler.step():
            assert delta.error is None, delta.error
            self.texts[ticket] = self.texts.get(ticket, "") + delta.text

    def run(self) -> None:
        while self.scheduler.has_work:
            self.step()


def test_three_answers_are_the_same_while_the_pool_shrinks(
    make_engine: MakeEngine, engine_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 16K to 4K tokens and back: idle sequences go, and greedy answers are to the letter."""
    # None goes before, for what it costs others.
    monkeypatch.setattr(upkeep, "LEAST_CELLS", LARGE)
    options: dict[str, Any] = {"kv_tokens": LARGE, "max_sequences": NUM_IDLE + 3}
    plan = plan_for(engine_name, **options)
    still = Answers(make_engine(**options), plan)
    shrunk = Answers(make_engine(**options), plan)
    for answers in (still, shrunk):
        for number in range(NUM_IDLE):
            answers.add(number, max_tokens=2)
            answers.run()
        for number in (100, 101, 102):
            answers.add(number, max_tokens=48)
        while answers.scheduler.num_sequences < 3 or len(answers.texts) < NUM_IDLE + 3:
            answers.step()
    kv_bytes = shrunk.engine.footprint().kv_bytes
    num_idle = shrunk.scheduler.num_idle_tokens

    assert shrunk.scheduler.resize(SMALL) == SMALL
    assert 0 < shrunk.scheduler.num_idle_tokens < num_idle
    assert shrunk.engine.footprint().kv_bytes < kv_bytes
    for _ in range(12):
        shrunk.step()
    assert shrunk.scheduler.num_sequences == 3
    assert shrunk.scheduler.resize(LARGE) == LARGE
    shrunk.run()
    still.run()
    assert len(shrunk.texts[100]) > 20
    assert shrunk.texts == still.texts


def test_a_shared_prefix_is_shared_in_the_new_pool(make_engine: MakeEngine) -> None:
    """Three sequences that share their beginning fit into a pool that has room for it once."""
    engine = make_engine(kv_tokens=2048)
    if not engine.capabilities.forks_share_kv:
        pytest.skip("forks are copies here")
    prompt = prompt_of(1, engine)[:200]
    reference = generate(engine, prompt, 8)
    engine.close(reference.seq_id)
    first = Run(engine.open(GREEDY))
    prefill(engine, first, prompt)
    others = [Run(engine.open(GREEDY)) for _ in range(2)]
    for other in others:
        engine.fork(first.seq_id, other.seq_id, len(prompt) - 1)
        prefill(engine, other, prompt[-1:])
    engine.resize_kv(256)
    decode_together(engine, [first, *others], 8)
    for run in (first, *others):
        assert_same(reference, run)


def test_what_is_open_counts_in_the_new_pool(make_engine: MakeEngine) -> None:
    """Behind a resize a pool refuses what it has no cells for, and an import finds its room."""
    engine = make_engine(kv_tokens=2048)
    run = generate(engine, prompt_of(1, engine)[:200], 4)
    block = bytes(engine.export_kv(run.seq_id))
    engine.resize_kv(256)
    target = engine.open(GREEDY)
    with pytest.raises(DoesNotFit):
        engine.import_kv(target, block)
    engine.resize_kv(2048)
    engine.import_kv(target, block)
    assert engine.num_tokens(target) == engine.num_tokens(run.seq_id)


def test_a_pool_that_cannot_be_made_leaves_the_old_one(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp has no memory for the new context: the old one is made again, nothing is lost."""
    engine = load(plan_for("llamacpp"))
    reference = generate(engine, prompt_of(2, engine)[:50], 12)
    run = generate(engine, prompt_of(2, engine)[:50], 4)
    kv_bytes, real = engine.footprint().kv_bytes, loading.new_context

    def refuse(model: Any, plan: Plan, num_tokens: int, abort_flag: Any) -> Any:
        if num_tokens == 512:
            raise EngineError("llama.cpp: no context of 512 tokens")
        return real(model, plan, num_tokens, abort_flag)

    monkeypatch.setattr(loading, "new_context", refuse)
    with pytest.raises(DoesNotFit, match=r"no context of 512 tokens.*keeps its 2048"):
        engine.resize_kv(512)
    assert engine.footprint().kv_bytes == kv_bytes
    decode(engine, run, 12)
    assert_same(reference, run)


def test_sequences_that_cannot_be_moved_out_stay(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk refuses the way out before anything was touched."""
    engine = load(plan_for("llamacpp"))
    run = generate(engine, prompt_of(3, engine)[:50], 4)

    def full(_num_bytes: int) -> memoryview:
        raise StoreError("no space left on device")

    monkeypatch.setattr("brim.engine.kv_block.temporary", full)
    with pytest.raises(StoreError, match="no space"):
        engine.resize_kv(512)
    monkeypatch.undo()
    decode(engine, run, 8)
    assert len(run.tokens) == 8


def test_sequences_that_came_back_damaged_end_the_engine(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that gives back other bytes is noticed: no answer goes on from them."""
    engine = load(plan_for("llamacpp"))
    generate(engine, prompt_of(3, engine)[:50], 4)
    real = engine._save_all

    def damaged() -> memoryview:
        block: memoryview = real()
        block[len(block) // 2] ^= 1
        return block

    monkeypatch.setattr(engine, "_save_all", damaged)
    with pytest.raises(EngineError, match=r"damaged.*loaded again"):
        engine.resize_kv(512)


def test_mlx_gives_back_what_ended_sequences_took(load: Load) -> None:
    """Memory beyond what a sequence holds goes when room is wanted, and comes when it goes on."""
    engine = load(plan_for("mlx", context_tokens=2048, kv_tokens=4096))
    prompt = prompt_of(4, engine)[:100]
    reference = generate(engine, prompt, 12)
    engine.close(reference.seq_id)
    run = Run(engine.open(GREEDY, 2000))
    prefill(engine, run, prompt)
    decode(engine, run, 6)
    wide = engine.footprint().kv_bytes
    engine.resize_kv(256)
    assert engine.footprint().kv_bytes < wide / 8
    decode(engine, run, 12)
    assert_same(reference, run)
    engine.resize_kv(4096)

    early = Run(engine.open(GREEDY, 2000))
    prefill(engine, early, prompt)
    before = engine.footprint().kv_bytes
    late = engine.open(GREEDY, 2000)
    engine.open(GREEDY, 1900)
    assert engine.footprint().kv_bytes < before
    prefill(engine, Run(late), prompt)
    logits = np.array(engine.logits(late))
    assert np.array_equal(logits, reference.logits[0])


@pytest.mark.parametrize("architecture", ["gemma3", "mamba", "jamba"])
def test_states_that_cannot_be_cut_move_whole(
    load: Load, tmp_path: Path, architecture: str
) -> None:
    """Windows, recurrent states and both in one model go on in a smaller and a larger pool."""
    path = tmp_path / "model.gguf"
    write(path, blueprint(tiny(architecture), "Q8_0"))
    engine = load(plan_for("llamacpp", path=path, exact=False, kv_tokens=2048, kv_type="f16"))
    prompt = [5 + (37 * place * place + 11 * place) % 200 for place in range(180)]
    reference = follow(engine, read(engine, prompt), prompt[:6])
    engine.close(reference.seq_id)
    runs = [follow(engine, read(engine, prompt), prompt[:2])]
    engine.close(read(engine, prompt[:100]).seq_id)
    engine.resize_kv(256)
    follow(engine, runs[0], prompt[2:4])
    engine.resize_kv(2048)
    follow(engine, runs[0], prompt[4:6])
    assert_same(reference, runs[0], rounding=1e-3)


def read(engine: Engine, tokens: list[int]) -> Run:
    """A sequence that has read some tokens."""
    run = Run(engine.open(GREEDY))
    engine.step(StepPlan([Feed(run.seq_id, tokens, False)]))
    return run


@pytest.mark.parametrize("family", FAMILIES)
def test_mlx_compacts_every_kind_of_cache(load: Load, family: str) -> None:
    """What a sequence took for later is given back, whatever its layers keep, and it goes on."""
    engine = load(plan_for("mlx", path=family_dir(family), kv_tokens=2048))
    prompt = [(37 * i * i + 11 * i + 5) % 4096 for i in range(100)]
    reference = generate(engine, prompt, 10)
    engine.close(reference.seq_id)
    run = Run(engine.open(GREEDY, 500))
    prefill(engine, run, prompt)
    decode(engine, run, 5)
    kv_bytes = engine.footprint().kv_bytes
    engine.resize_kv(128)
    assert engine.footprint().kv_bytes <= kv_bytes
    engine.resize_kv(2048)
    decode(engine, run, 10)
    assert_same(reference, run)
