"""Sampling parameters mean the same on every engine."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from support.driver import GREEDY, Run, feed, generate

from brim.core.sampling import SamplingParams
from brim.core.step import Feed, StepPlan
from brim.engine import numpy_sampler
from brim.engine.base import Engine
from brim.engine.dry import DryBreakers
from brim.engine.numpy_sampler import Logits

PLAIN = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)

OPEN_TOKENS = 50
"""So much of the prompt leaves several tokens likely, so that every truncation has work."""


def replace(params: SamplingParams, **changes: object) -> SamplingParams:
    fields = {name: getattr(params, name) for name in params.__struct_fields__}
    return SamplingParams(**{**fields, **changes})


def draws(
    engine: Engine, prompt: Sequence[int], params: SamplingParams, num_draws: int
) -> Counter[int]:
    """First tokens after `prompt` with seeds 0, 1, 2, ...: forks, eight of them in a step."""
    base = Run(engine.open(GREEDY))
    feed(engine, base, prompt)
    counts: Counter[int] = Counter()
    for first in range(0, num_draws, 8):
        seq_ids = [engine.open(replace(params, seed=first + offset)) for offset in range(8)]
        for seq_id in seq_ids:
            engine.fork(base.seq_id, seq_id, len(prompt) - 1)
        result = engine.step(StepPlan([Feed(seq_id, prompt[-1:]) for seq_id in seq_ids]))
        for seq_id, sampled in zip(seq_ids, result.sampled, strict=True):
            counts[sampled.token] += 1
            engine.close(seq_id)
    engine.close(base.seq_id)
    return counts


def expected_draws(logits: Logits, params: SamplingParams) -> dict[int, float]:
    """The reference's probability of each token; XTC acts on some draws and not on others."""
    expected: dict[int, float] = {}
    for xtc, share in ((False, 1 - params.xtc_probability), (True, params.xtc_probability)):
        tokens, probs = numpy_sampler.truncated_probs(logits, params, xtc=xtc)
        for token, prob in zip(tokens.tolist(), (share * probs).tolist(), strict=True):
            expected[token] = expected.get(token, 0.0) + prob
    return {token: prob for token, prob in expected.items() if prob > 0}


def penalised(engine: Engine, run: Run, history: Sequence[int], params: SamplingParams) -> Logits:
    """The reference's logits, after all penalties, behind the run's last draw."""
    logits = numpy_sampler.apply_penalties(np.array(engine.logits(run.seq_id)), history, params)
    breakers = DryBreakers(engine.tokenizer).find(params)
    return numpy_sampler.apply_dry(logits, history, params, breakers)


def test_greedy_takes_the_likeliest(engine: Engine, prompt: list[int]) -> None:
    """Temperature 0, and top-k 1 at any temperature, draw the argmax."""
    for params in (GREEDY, SamplingParams(temperature=1.5, top_k=1)):
        run = generate(engine, prompt, 16, params)
        assert run.tokens == [int(logits.argmax()) for logits in run.logits]


def test_a_seed_gives_the_same_run_alone_and_in_a_batch(engine: Engine, prompt: list[int]) -> None:
    """A sequence's random state is its own: neighbours do not advance it."""
    params = SamplingParams(temperature=1.2, top_p=1.0, min_p=0.0, seed=7)
    alone = generate(engine, prompt, 16, params)
    run, other = generate(engine, prompt, 1, params), generate(engine, prompt, 1, PLAIN)
    while len(run.tokens) < 16:
        step = StepPlan([Feed(r.seq_id, [r.tokens[-1]]) for r in (other, run)])
        for r, sampled in zip((other, run), engine.step(step).sampled, strict=True):
            r.tokens.append(sampled.token)
    assert run.tokens == alone.tokens
    assert generate(engine, prompt, 16, replace(params, seed=8)).tokens != alone.tokens


def test_truncating_begins_the_random_numbers_again(engine: Engine, prompt: list[int]) -> None:
    """A sequence that is cut back and fed the same draws the same, XTC's numbers included."""
    params = replace(PLAIN, temperature=1.5, xtc_probability=0.5, xtc_threshold=0.01, seed=5)
    run = generate(engine, prompt, 12, params)
    engine.truncate(run.seq_id, len(prompt) - 1)
    again = Run(run.seq_id)
    feed(engine, again, prompt[-1:])
    while len(again.tokens) < 12:
        feed(engine, again, [again.tokens[-1]])
    assert again.tokens == run.tokens


def test_unlike_sequences_share_a_step(engine: Engine, prompt: list[int]) -> None:
    """Greedy, random, penalised and masked sequences in one step draw what each draws alone."""
    mask = np.packbits(np.arange(engine.tokenizer.vocab_size) % 2, bitorder="little").tobytes()
    kinds: list[tuple[SamplingParams, bytes | None]] = [
        (GREEDY, None),
        (SamplingParams(seed=1, num_logprobs=2), None),
        (replace(PLAIN, seed=2, typical_p=0.9), mask),
        (SamplingParams(seed=3, top_k=5, repeat_penalty=1.3, dry_multiplier=0.8), None),
        (replace(GREEDY, logit_bias=((42, 3.0),), presence_penalty=1.0), mask),
    ]
    alone = []
    for params, of_row in kinds:
        run = Run(engine.open(params))
        for tokens in (prompt, prompt[:1], prompt[1:2]):
            feed(engine, run, tokens, mask=of_row)
        engine.close(run.seq_id)
        alone.append(run)
    runs = [Run(engine.open(params)) for params, _ in kinds]
    for run, (_, of_row) in zip(runs, kinds, strict=True):
        feed(engine, run, prompt, mask=of_row)
    for tokens in (prompt[:1], prompt[1:2]):
        feeds = [
            Feed(run.seq_id, tokens, True, of_row)
            for run, (_, of_row) in zip(runs, kinds, strict=True)
        ]
        for run, sampled in zip(runs, engine.step(StepPlan(feeds)).sampled, strict=True):
            run.tokens.append(sampled.token)
            run.last = sampled
    assert [run.tokens for run in runs] == [run.tokens for run in alone]
    assert runs[1].last is not None
    assert alone[1].last is not None
    assert runs[1].last.logprob == alone[1].last.logprob
    assert runs[1].last.top == alone[1].last.top


def test_no_seed_means_a_fresh_one(engine: Engine, prompt: list[int]) -> None:
    """Two unseeded runs differ (with 24 tokens at temperature 2, all but surely)."""
    params = replace(PLAIN, temperature=2.0)
    first, second = (generate(engine, prompt, 24, params).tokens for _ in range(2))
    assert first != second


@pytest.mark.parametrize(
    "params",
    [
        PLAIN,
        replace(PLAIN, temperature=0.5),
        replace(PLAIN, top_k=5),
        replace(PLAIN, top_p=0.6),
        replace(PLAIN, min_p=0.2),
        replace(PLAIN, typical_p=0.5),
        replace(PLAIN, xtc_probability=1.0, xtc_threshold=0.02),
        replace(PLAIN, xtc_probability=0.4, xtc_threshold=0.02, top_k=20, temperature=0.8),
        SamplingParams(),
    ],
    ids=[
        "plain",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "typical",
        "xtc",
        "xtc_at_times",
        "defaults",
    ],
)
def test_draws_follow_the_reference_distribution(
    engine: Engine, prompt: list[int], params: SamplingParams
) -> None:
    """What is drawn is never outside the reference's candidates, and as often as it says."""
    prompt = prompt[:OPEN_TOKENS]
    base = generate(engine, prompt, 1)
    expected = expected_draws(base.logits[0], params)
    engine.close(base.seq_id)
    num_draws = 400
    counts = draws(engine, prompt, params, num_draws)
    assert set(counts) <= set(expected)
    # Tokens that are rare by themselves are counted together: there are thousands of them.
    rare = {token for token, prob in expected.items() if num_draws * prob < 5}
    shares = {token: prob for token, prob in expected.items() if token not in rare}
    shares[-1] = sum(expected[token] for token in rare)
    counts[-1] = sum(counts[token] for token in rare)
    for token, prob in shares.items():
        # Five standard deviations: a false alarm about once in a million draws of the suite.
        margin = 5 * math.sqrt(num_draws * prob * max(1 - prob, 0.0)) + 1
        assert abs(counts[token] - num_draws * prob) <= margin


def test_logit_bias_forbids_and_forces(engine: Engine, prompt: list[int]) -> None:
    """-inf removes the likeliest token, +100 makes any other one certain."""
    best = generate(engine, prompt, 1).tokens[0]
    forbidden = generate(engine, prompt, 1, replace(GREEDY, logit_bias=((best, -math.inf),)))
    assert forbidden.tokens[0] == int(np.argsort(-forbidden.logits[0])[1])
    forced = generate(engine, prompt, 1, replace(PLAIN, logit_bias=((42, 100.0),)))
    assert forced.tokens == [42]


def test_ignore_eos_forbids_every_end(engine: Engine, prompt: list[int]) -> None:
    """With ignore_eos no end token is drawn even when everything else is biased away from it."""
    ends = sorted(engine.tokenizer.eog_tokens)
    push = tuple((token, 50.0) for token in ends)
    assert generate(engine, prompt, 1, replace(PLAIN, logit_bias=push)).tokens[0] in ends
    held = replace(PLAIN, logit_bias=push, ignore_eos=True)
    assert not set(generate(engine, prompt, 8, held).tokens) & set(ends)


@pytest.mark.parametrize("params", [GREEDY, PLAIN], ids=["greedy", "sampled"])
def test_a_mask_restricts_the_draw(
    engine: Engine, prompt: list[int], params: SamplingParams
) -> None:
    """Only masked-in tokens are drawn, the likeliest of them when greedy."""
    allowed = [3, 40, 41, 77, 200]
    bits = np.zeros(engine.tokenizer.vocab_size, np.uint8)
    bits[allowed] = 1
    mask = np.packbits(bits, bitorder="little").tobytes()
    reference = generate(engine, prompt, 1).logits[0]
    run = Run(engine.open(params))
    feed(engine, run, prompt, mask=mask)
    assert run.tokens[0] in allowed
    if params is GREEDY:
        assert run.tokens[0] == allowed[int(reference[allowed].argmax())]


@pytest.mark.parametrize(
    "penalty",
    [
        {"repeat_penalty": 1.7},
        {"presence_penalty": 3.0},
        {"frequency_penalty": 0.9},
        {"dry_multiplier": 4.0, "dry_allowed_length": 1},
        {"dry_multiplier": 4.0, "dry_sequence_breakers": (), "presence_penalty": 0.5},
    ],
    ids=["repeat", "presence", "frequency", "dry", "dry_unbroken"],
)
@pytest.mark.parametrize("way", ["fed", "chunked", "forked", "imported", "truncated"])
def test_penalties_see_the_whole_history(
    engine: Engine, prompt: list[int], penalty: dict[str, Any], way: str
) -> None:
    """The penalised distribution counts the prompt however it got there, and what was drawn."""
    params = replace(GREEDY, **penalty)
    run = Run(engine.open(params))
    head, tail = prompt[:-10], prompt[-10:]
    if way == "fed":
        feed(engine, run, prompt)
    elif way == "chunked":
        engine.step(StepPlan([Feed(run.seq_id, head, False)]))
        feed(engine, run, tail)
    elif way == "truncated":
        engine.step(StepPlan([Feed(run.seq_id, [*head, 9, 9, 9], False)]))
        engine.truncate(run.seq_id, len(head))
        feed(engine, run, tail)
    else:
        source = Run(engine.open(GREEDY))
        engine.step(StepPlan([Feed(source.seq_id, head, False)]))
        if way == "forked":
            engine.fork(source.seq_id, run.seq_id, len(head))
        else:
            engine.import_kv(run.seq_id, engine.export_kv(source.seq_id))
        feed(engine, run, tail)
    for step in range(6):
        history = prompt + run.tokens[:-1]
        expected = penalised(engine, run, history, params)
        assert run.tokens[-1] == int(expected.argmax()), f"token {step}"
        feed(engine, run, [run.tokens[-1]])


def test_dry_stops_a_loop_that_breakers_excuse(engine: Engine, prompt: list[int]) -> None:
    """DRY pushes a run off the text that it repeats, but not behind a breaker in every token."""
    params = replace(GREEDY, dry_multiplier=100.0, dry_sequence_breakers=())
    loop = prompt[:12] * 3
    follower = loop[12]
    forced = ((follower, 50.0),)
    plain = generate(engine, loop, 1, replace(GREEDY, logit_bias=forced))
    assert plain.tokens == [follower]
    kept_off = generate(engine, loop, 1, replace(params, logit_bias=forced))
    assert kept_off.tokens != [follower]
    every_piece = tuple({chr(byte) for token in loop for byte in engine.tokenizer.piece(token)})
    excused = replace(params, logit_bias=forced, dry_sequence_breakers=every_piece)
    assert generate(engine, loop, 1, excused).tokens == [follower]


def test_a_drawn_token_that_is_not_fed_leaves_no_trace(engine: Engine, prompt: list[int]) -> None:
    """A caller may drop the drawn token and feed another: penalties forget the dropped one."""
    params = replace(GREEDY, repeat_penalty=1.8)
    run = Run(engine.open(params))
    dropped = feed(engine, run, prompt)
    fed = next(t for t in range(300, 400) if t not in (*prompt, dropped)) % 256
    feed(engine, run, [fed])
    expected = penalised(engine, run, [*prompt, fed], params)
    assert run.tokens[-1] == int(expected.argmax())


def test_logprobs_are_of_the_biased_distribution(engine: Engine, prompt: list[int]) -> None:
    """Logprobs follow bias, not temperature, truncation or penalties, and come likeliest first."""
    params = SamplingParams(
        temperature=0.3, top_k=3, repeat_penalty=1.5, num_logprobs=4, logit_bias=((42, 2.0),)
    )
    run = Run(engine.open(params))
    token = feed(engine, run, prompt)
    biased = np.array(engine.logits(run.seq_id), np.float64)
    biased[42] += 2.0
    reference = biased - np.log(np.exp(biased - biased.max()).sum()) - biased.max()
    assert run.last is not None
    assert run.last.logprob == pytest.approx(reference[token], abs=1e-4)
    assert [t for t, _ in run.last.top] == np.argsort(-reference, kind="stable")[:4].tolist()
    assert [p for _, p in run.last.top] == pytest.approx(sorted(reference)[::-1][:4], abs=1e-4)


def test_no_logprobs_unless_asked(engine: Engine, prompt: list[int]) -> None:
    """None gives none, 0 gives the chosen token's alone."""
    run = generate(engine, prompt, 1, GREEDY)
    assert run.last is not None
    assert run.last.logprob is None
    run = generate(engine, prompt, 1, replace(GREEDY, num_logprobs=0))
    assert run.last is not None
    assert run.last.logprob is not None
    assert run.last.top == ()
