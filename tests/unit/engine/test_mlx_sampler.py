"""Draws on the device are those of the numpy reference, row by row."""

import math
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
import pytest
from conftest import require_engine
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from brim.core.sampling import SamplingParams
from brim.core.step import Sampled
from brim.engine import numpy_sampler
from brim.engine.byte_tokenizer import ByteTokenizer
from brim.engine.dry import DryBreakers
from brim.errors import EngineError

Logits = NDArray[np.float32]

GREEDY = SamplingParams(temperature=0.0)
PLAIN = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
EOG = frozenset({1, 2})
NUM_SEEDS = 12


@pytest.fixture(autouse=True)
def mlx_is_here() -> Iterator[None]:
    require_engine("mlx")
    yield


def changed(params: SamplingParams, **changes: object) -> SamplingParams:
    return msgspec.structs.replace(params, **changes)


def draw_all(
    logits: Logits,
    params: Sequence[SamplingParams],
    histories: Sequence[Sequence[int]] | None = None,
    masks: Sequence[bytes | None] | None = None,
) -> list[Sampled]:
    """One draw a row, all in one batch, by sequences that have just been opened."""
    import mlx.core as mx

    from brim.engine.mlx.sampler import Draw, SequenceSampler, draw

    breakers = DryBreakers(ByteTokenizer())
    rows = [
        Draw(
            SequenceSampler(
                of_row, vocab_size=logits.shape[1], eog_tokens=EOG, dry_breakers=breakers
            ),
            histories[row] if histories else (),
            masks[row] if masks else None,
        )
        for row, of_row in enumerate(params)
    ]
    return draw(mx.array(logits), rows).results(range(len(rows)))


def reference(logits: Logits, params: SamplingParams, history: Sequence[int] = ()) -> int:
    breakers = DryBreakers(ByteTokenizer()).find(params)
    biased = numpy_sampler.apply_bias(logits, params, EOG)
    rng = np.random.default_rng(params.seed)
    return numpy_sampler.choose(biased, history, params, rng, breakers)


@st.composite
def logit_rows(draw: st.DrawFn) -> Logits:
    """Logits with ties (tenths, or 16 bits) and now and then forbidden tokens."""
    size = draw(st.sampled_from([5, 64, 130, 1000, 2300]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    logits = rng.standard_normal(size) * draw(st.sampled_from([0.5, 3.0, 12.0]))
    if draw(st.booleans()):
        logits = np.round(logits, 1)
    logits[rng.random(size) < draw(st.sampled_from([0.0, 0.3]))] = -np.inf
    logits[3] = 1.0
    return logits.astype(np.float32)


sampled_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 3, 40, 500, 5000]),
    top_p=st.sampled_from([1.0, 0.0, 0.31, 0.83, 0.95]),
    min_p=st.sampled_from([0.0, 0.053, 0.4, 1.0]),
    typical_p=st.sampled_from([1.0, 0.0, 0.33, 0.9]),
    xtc_probability=st.sampled_from([0.0, 0.0, 0.5, 1.0]),
    xtc_threshold=st.sampled_from([0.0, 0.007, 0.11, 0.6]),
)


def is_clear(logits: Logits, params: SamplingParams, *, xtc: bool) -> bool:
    """Whether no truncation cuts so near to a candidate that rounding decides."""
    survivors = set(numpy_sampler.truncated_probs(logits, params, xtc=xtc)[0].tolist())
    for factor in (0.9999, 1.0001):
        moved = changed(
            params,
            top_p=params.top_p * factor if params.top_p < 1 else 1.0,
            min_p=params.min_p * factor if params.min_p < 1 else 1.0,
            typical_p=params.typical_p * factor if params.typical_p < 1 else 1.0,
            xtc_threshold=params.xtc_threshold * factor,
        )
        if set(numpy_sampler.truncated_probs(logits, moved, xtc=xtc)[0].tolist()) != survivors:
            return False
    logprobs = numpy_sampler.logprobs_of(logits[np.isfinite(logits)]).astype(np.float64)
    distances = np.unique(np.abs(logprobs - (np.exp(logprobs) * logprobs).sum()))
    return params.typical_p == 1.0 or bool((np.diff(distances) > 1e-4).all())


@settings(max_examples=60, deadline=None)
@given(logits=logit_rows(), params=sampled_params)
def test_survivors_are_the_references(logits: Logits, params: SamplingParams) -> None:
    """Truncations leave the same tokens as the reference, in the same order."""
    import mlx.core as mx

    from brim.engine.mlx.sampler import GREEDY as GREEDY_CHAIN
    from brim.engine.mlx.sampler import SequenceSampler, survivors

    chain, columns = SequenceSampler(
        changed(params, seed=0), vocab_size=len(logits), eog_tokens=EOG
    ).roll()
    assume(chain != GREEDY_CHAIN)
    assume(is_clear(logits, params, xtc=chain.xtc))
    left = survivors(mx.array(logits)[None], chain, mx.array([columns]))
    kept = np.isfinite(np.array(left.scores[0]))
    expected, _ = numpy_sampler.truncated_probs(logits, params, xtc=chain.xtc)
    if left.ids is None:
        assert np.flatnonzero(kept).tolist() == sorted(expected.tolist())
    else:
        assert np.array(left.ids[0])[kept].tolist() == expected.tolist()


@settings(max_examples=25, deadline=None)
@given(logits=logit_rows(), params=sampled_params)
def test_draws_are_the_references(logits: Logits, params: SamplingParams) -> None:
    """The same seed draws the same token, unless rounding decides between two neighbours."""
    seeded = [changed(params, seed=seed) for seed in range(NUM_SEEDS)]
    drawn = draw_all(np.tile(logits, (NUM_SEEDS, 1)), seeded)
    num_equal = num_clear = 0
    for sampled, of_row in zip(drawn, seeded, strict=True):
        numbers = numpy_sampler.roll(of_row, np.random.default_rng(of_row.seed))
        biased = numpy_sampler.apply_bias(logits, of_row, EOG)
        if not is_clear(biased, of_row, xtc=numbers.xtc):
            continue
        tokens, probs = numpy_sampler.truncated_probs(biased, of_row, xtc=numbers.xtc)
        assert sampled.token in tokens
        ranked = numpy_sampler.is_ranked(of_row, numbers)
        order = np.arange(len(tokens)) if ranked else np.argsort(tokens)
        borders = np.cumsum(probs[order])[:-1]
        if len(borders) and np.abs(borders - numbers.uniform).min() < 1e-5:
            continue
        num_clear += 1
        num_equal += sampled.token == reference(logits, of_row)
    assert num_equal == num_clear


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    params=st.builds(
        SamplingParams,
        temperature=st.just(0.0),
        repeat_penalty=st.sampled_from([1.0, 1.3, 0.7, 1.2e-38]),
        presence_penalty=st.sampled_from([0.0, 1.5, -2.0, -3.4e38]),
        frequency_penalty=st.sampled_from([0.0, 0.4, 3.4e38]),
        repeat_last_n=st.sampled_from([0, 5, 64]),
        dry_multiplier=st.sampled_from([0.0, 0.8, 3e38]),
        dry_allowed_length=st.sampled_from([0, 1, 2]),
    ),
)
def test_penalties_are_the_references(seed: int, params: SamplingParams) -> None:
    """Every logit after penalties and DRY is a number, the reference's to a float's rounding."""
    import mlx.core as mx

    from brim.engine.mlx import adjustments

    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((2, 260)) * 5).astype(np.float32)
    logits[:, 7] = -np.inf
    histories = [rng.integers(5, 12, 40).tolist(), [*b"again and again\nagain and"]]
    breakers = DryBreakers(ByteTokenizer()).find(params)
    penalties = [adjustments.penalties_of(history, params, breakers) for history in histories]
    before = mx.array(logits)
    found = np.array(adjustments.penalise(before, penalties))
    assert not np.isnan(found).any()
    assert np.array_equal(np.array(before), logits)
    for row, history in enumerate(histories):
        expected = numpy_sampler.apply_penalties(logits[row], history, params)
        expected = numpy_sampler.apply_dry(expected, history, params, breakers)
        np.testing.assert_allclose(found[row], expected, rtol=3e-6, atol=3e-6)


MIXED = (
    SamplingParams(seed=1, num_logprobs=3),
    GREEDY,
    changed(PLAIN, seed=2),
    SamplingParams(seed=3, top_k=7, temperature=1.9, repeat_penalty=1.2),
    SamplingParams(seed=4, top_k=0, top_p=0.9, xtc_probability=0.5, xtc_threshold=0.05),
    changed(PLAIN, seed=5, typical_p=0.8, logit_bias=((9, 4.0),), ignore_eos=True),
    changed(GREEDY, dry_multiplier=1.0, num_logprobs=0),
    SamplingParams(seed=6, top_k=40, temperature=0.4, num_logprobs=8),
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_row_does_not_depend_on_its_neighbours(dtype: str) -> None:
    """Tokens and logprobs are equal to the bit alone and in a batch of other parameters."""
    import mlx.core as mx

    logits = np.random.default_rng(0).standard_normal((len(MIXED), 3000)).astype(np.float32) * 4
    logits = np.array(mx.array(logits).astype(getattr(mx, dtype)).astype(mx.float32))
    histories = [list(range(row, 60)) * 2 for row in range(len(MIXED))]
    together = draw_all(logits, MIXED, histories)
    for row, params in enumerate(MIXED):
        (alone,) = draw_all(logits[row : row + 1], [params], histories[row : row + 1])
        assert alone == msgspec.structs.replace(together[row], seq_id=0)


def test_equal_logits_go_to_the_lower_id() -> None:
    """Ties, of which 16-bit logits are full, are broken as the reference breaks them."""
    logits = np.zeros((3, 700), np.float32)
    logits[:, ::2] = -0.0
    top = draw_all(logits, [changed(GREEDY, num_logprobs=3)] * 3)[0]
    assert top.token == 0
    assert [token for token, _ in top.top] == [0, 1, 2]
    params = [SamplingParams(top_k=3, top_p=1.0, seed=seed) for seed in range(3)]
    assert {s.token for s in draw_all(logits, params)} <= {0, 1, 2}


def test_rounding_at_the_end_takes_the_last_candidate() -> None:
    """A target that rounds up to the total draws the last token with weight, and none behind it."""
    import mlx.core as mx

    from brim.engine.mlx import candidates

    scores = np.full((1, 300), -np.inf, np.float32)
    scores[0, [4, 9, 200]] = 1.0
    one = mx.ones((1, 1))
    ids = mx.arange(300, dtype=mx.int32)[None]
    assert candidates.pick_ranked(ids, mx.array(scores), one, one).item() == 200
    assert candidates.pick_any(mx.array(scores), one, one).item() == 200


def test_logprobs_are_the_references() -> None:
    """Chosen and likeliest logprobs are of the biased, masked, unpenalised distribution."""
    logits = np.random.default_rng(1).standard_normal((2, 500)).astype(np.float32) * 3
    params = SamplingParams(
        seed=0, num_logprobs=5, logit_bias=((7, 3.0), (8, -math.inf)), presence_penalty=9.0
    )
    mask = np.packbits(np.arange(500) % 3 != 0, bitorder="little").tobytes()
    drawn = draw_all(logits, [params, GREEDY], [[4, 5], []], [mask, None])
    biased = numpy_sampler.apply_bias(logits[0], params, EOG)
    biased[~numpy_sampler.allowed_tokens(mask, 500)] = -np.inf
    logprobs = numpy_sampler.logprobs_of(biased)
    logprob, top = numpy_sampler.top_logprobs(logprobs, drawn[0].token, 5)
    assert drawn[0].token % 3 != 0
    assert drawn[0].logprob == pytest.approx(logprob, abs=1e-5)
    assert [token for token, _ in drawn[0].top] == [token for token, _ in top]
    assert [p for _, p in drawn[0].top] == pytest.approx([p for _, p in top], abs=1e-5)
    assert drawn[1] == Sampled(1, int(logits[1].argmax()))


def test_a_dead_end_is_refused() -> None:
    """A mask, a bias, or both of them that leave no token raise; one token left is enough."""
    from brim.engine.mlx.sampler import SequenceSampler

    params = changed(PLAIN, seed=3, ignore_eos=True, logit_bias=((4, -math.inf),))
    sampler = SequenceSampler(params, vocab_size=20, eog_tokens=EOG)
    for mask in (b"\0\0\0", b"\x16\0\0", b"\x06\0\xf0"):
        with pytest.raises(EngineError, match="no token"):
            sampler.check_possible(mask)
    for possible in (None, b"\x17\0\0", b"\0\0\x08"):
        sampler.check_possible(possible)
    forbid = tuple((token, -math.inf) for token in range(20))
    nothing = SequenceSampler(
        changed(PLAIN, logit_bias=forbid), vocab_size=20, eog_tokens=frozenset()
    )
    with pytest.raises(EngineError, match="no token"):
        nothing.check_possible(None)


@pytest.mark.parametrize("params", [GREEDY, PLAIN, SamplingParams()], ids=["greedy", "plain", "k"])
def test_logits_that_are_no_numbers_are_an_error(params: SamplingParams) -> None:
    """A model that computed NaN is reported by its sequence, and nothing is drawn."""
    logits = np.zeros((2, 300), np.float32)
    logits[1] = np.nan
    with pytest.raises(EngineError, match="sequence 1"):
        draw_all(logits, [params, params])


def test_padding_of_the_vocabulary_is_never_drawn() -> None:
    """Logits beyond the tokenizer's last token are left out, however large."""
    import mlx.core as mx

    from brim.engine.mlx.sampler import Draw, SequenceSampler, draw

    logits = np.zeros((1, 128), np.float32)
    logits[0, 100:] = 50.0
    for params in (GREEDY, changed(PLAIN, num_logprobs=1)):
        sampler = SequenceSampler(params, vocab_size=100, eog_tokens=EOG)
        (sampled,) = draw(mx.array(logits), [Draw(sampler, ())]).results([0])
        assert sampled.token < 100
        assert sampled.logprob is None or sampled.logprob == pytest.approx(-math.log(100))


def test_huge_biases_overflow_nothing() -> None:
    """Biases near the largest float force their token, at any temperature, twice as well."""
    huge = 3.4e38
    logits = np.random.default_rng(3).standard_normal((3, 260)).astype(np.float32)
    params = [
        SamplingParams(seed=1, temperature=0.01, logit_bias=((5, huge), (5, huge))),
        changed(PLAIN, seed=1, temperature=0.5, logit_bias=((5, huge), (6, -huge))),
        SamplingParams(seed=1, logit_bias=((5, huge),), repeat_penalty=0.5),
    ]
    histories = [[], [], [5]]
    assert [s.token for s in draw_all(logits, params, histories)] == [5, 5, 5]
    assert [reference(logits[i], params[i], histories[i]) for i in range(3)] == [5, 5, 5]


def test_seeds_and_their_absence() -> None:
    """A seed repeats its draws, another does not, and without one every sequence has its own."""
    logits = np.zeros((40, 260), np.float32)
    seeded = [s.token for s in draw_all(logits, [changed(PLAIN, seed=11)] * 40)]
    assert len(set(seeded)) == 1
    assert len({s.token for s in draw_all(logits, [PLAIN] * 40)}) > 10
