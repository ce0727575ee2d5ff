"""The reference sampler leaves what llama.cpp's own chain leaves."""

import ctypes
import functools
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
from conftest import require_engine
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.models import DEMO

from brim.core.sampling import SamplingParams
from brim.engine import numpy_sampler
from brim.engine.dry import DryBreakers

Logits = NDArray[np.float32]

TOKEN_DATA = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
"""llama.h's llama_token_data."""


@pytest.fixture(autouse=True)
def llama_cpp_is_here() -> Iterator[None]:
    require_engine("llamacpp")
    yield


@functools.cache
def demo_vocab() -> tuple[Any, Any]:
    """The demo model's vocabulary without its weights, and a tokenizer on it."""
    from brim.engine.llamacpp import log
    from brim.engine.llamacpp.binding import lib
    from brim.engine.llamacpp.tokenizer import LlamaTokenizer

    log.install()
    params = lib.llama_model_default_params()
    params.vocab_only = True
    vocab = lib.llama_model_get_vocab(lib.llama_model_load_from_file(str(DEMO).encode(), params))
    return vocab, LlamaTokenizer(vocab)


def chain_of(params: SamplingParams, vocab_size: int) -> Any:
    from brim.engine.llamacpp.sampler_chain import ChainBuilder

    vocab, _ = demo_vocab()
    builder = ChainBuilder(vocab, vocab_size=vocab_size, eog_tokens=frozenset(), window=4096)
    chain = builder.build(params)
    builder.free()
    return chain


def through_chain(logits: Logits, params: SamplingParams, history: list[int]) -> NDArray[np.void]:
    """The candidates behind the last sampler of llama.cpp's chain, in its own order."""
    from brim.engine.llamacpp.binding import lib

    chain = chain_of(params, len(logits))
    for token in history:
        lib.llama_sampler_accept(chain, token)
    data = np.zeros(len(logits), TOKEN_DATA)
    data["id"], data["logit"] = np.arange(len(logits)), logits
    pointer = ctypes.cast(data.ctypes.data, ctypes.POINTER(lib.llama_token_data))
    array = lib.llama_token_data_array(pointer, len(logits), -1, False)
    lib.llama_sampler_apply(chain, ctypes.byref(array))
    lib.llama_sampler_free(chain)
    # XTC moves the pointer instead of the candidates.
    first = (ctypes.addressof(array.data.contents) - data.ctypes.data) // TOKEN_DATA.itemsize
    return data[first : first + array.size]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    spread=st.sampled_from([0.5, 3.0, 9.0]),
    params=st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.4, 1.0, 1.8]),
        top_k=st.sampled_from([0, 2, 40]),
        top_p=st.sampled_from([1.0, 0.0, 0.31, 0.83]),
        min_p=st.sampled_from([0.0, 0.053, 0.4, 1.0]),
        typical_p=st.sampled_from([1.0, 0.0, 0.33, 0.9]),
        xtc_probability=st.sampled_from([0.0, 1.0]),
        xtc_threshold=st.sampled_from([0.0, 0.007, 0.11, 0.6]),
        seed=st.just(0),
    ),
)
def test_candidates_are_llama_cpps(seed: int, spread: float, params: SamplingParams) -> None:
    """Truncations and XTC leave the same tokens with the same probabilities."""
    logits = (np.random.default_rng(seed).standard_normal(300) * spread).astype(np.float32)
    xtc = numpy_sampler.roll(params, np.random.default_rng(0)).xtc
    tokens, probs = numpy_sampler.truncated_probs(logits, params, xtc=xtc)
    left = through_chain(logits, params, [])
    expected = dict(zip(left["id"].tolist(), left["p"].tolist(), strict=True))
    found = dict(zip(tokens.tolist(), probs.tolist(), strict=True))
    assert found == pytest.approx(expected, abs=2e-5)


@settings(max_examples=40, deadline=None)
@given(
    text=st.text(alphabet='ab \n":', min_size=1, max_size=60),
    params=st.builds(
        SamplingParams,
        temperature=st.just(0.0),
        repeat_penalty=st.sampled_from([1.0, 1.3]),
        presence_penalty=st.sampled_from([0.0, 1.5]),
        frequency_penalty=st.sampled_from([0.0, 0.4]),
        repeat_last_n=st.sampled_from([0, 5, 64]),
        dry_multiplier=st.sampled_from([0.0, 0.8]),
        dry_base=st.sampled_from([1.0, 1.75, 3e38]),
        dry_allowed_length=st.sampled_from([0, 1, 2, 3]),
        dry_penalty_last_n=st.sampled_from([0, 9, 1024]),
        dry_sequence_breakers=st.sampled_from(
            [(), ("\n", ":", '"', "*"), ("a b", "\n\n"), ("ab",)]
        ),
    ),
)
def test_penalties_are_llama_cpps(text: str, params: SamplingParams) -> None:
    """Penalties and DRY, with breakers of one and of several tokens, change the same logits."""
    _, tokenizer = demo_vocab()
    history = tokenizer.encode(text, add_special=False, parse_special=False)
    logits = np.random.default_rng(len(text)).standard_normal(tokenizer.vocab_size)
    logits = (logits * 5).astype(np.float32)
    penalised = numpy_sampler.apply_penalties(logits, history, params)
    breakers = DryBreakers(tokenizer).find(params)
    penalised = numpy_sampler.apply_dry(penalised, history, params, breakers)
    left = np.sort(through_chain(logits, params, history), order="id")
    expected = np.maximum(left["logit"], np.finfo(np.float32).min)
    np.testing.assert_allclose(penalised, expected, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("breaker", ["\n", ":", "ab", "a b", "return x", "en", "\u3002", "}\n\n"])
def test_breakers_are_llama_cpps(breaker: str) -> None:
    """A repetition behind any token with a piece of the breaker is penalised as llama.cpp does."""
    _, tokenizer = demo_vocab()
    params = SamplingParams(
        temperature=0.0, dry_multiplier=1.0, dry_allowed_length=1, dry_sequence_breakers=(breaker,)
    )
    logits = np.zeros(tokenizer.vocab_size, np.float32)
    breakers = DryBreakers(tokenizer).find(params)
    rest = tokenizer.encode(breaker, add_special=False, parse_special=False)
    heads = [token for token in range(tokenizer.vocab_size) if breakers.tails(token)]
    for head in [*heads[:: max(len(heads) // 8, 1)], 1234]:
        for between in ([head], [head, *rest[1:]], [head, *rest[-1:]]):
            history = [40, 41, *between, 43, 44, 40, 41, *between, 43]
            penalised = numpy_sampler.apply_dry(logits, history, params, breakers)
            left = np.sort(through_chain(logits, params, history), order="id")
            np.testing.assert_allclose(penalised, left["logit"], rtol=1e-6)


def test_xtc_takes_a_number_of_its_own_only_where_it_is_asked_for() -> None:
    """Without XTC a draw takes one random number, with it two, and it acts as often as asked."""
    params = SamplingParams(seed=1)
    plain = np.random.default_rng(1)
    numbers = [numpy_sampler.roll(params, plain) for _ in range(4)]
    expected = np.random.default_rng(1).random(4, dtype=np.float32)
    assert [number.uniform for number in numbers] == expected.tolist()
    assert not any(number.xtc for number in numbers)
    often = msgspec.structs.replace(params, xtc_probability=0.25)
    rng = np.random.default_rng(2)
    num_acting = sum(numpy_sampler.roll(often, rng).xtc for _ in range(4000))
    assert 850 < num_acting < 1150
    never = msgspec.structs.replace(params, xtc_probability=1.0, xtc_threshold=0.51)
    assert not numpy_sampler.roll(never, rng).xtc


def test_likeliest_tokens_break_ties_by_id() -> None:
    """Of equal logprobs the lower ids are given, however many there are."""
    logprobs = np.full(50, -3.0, np.float32)
    logprobs[30] = -1.0
    assert [t for t, _ in numpy_sampler.top_logprobs(logprobs, 0, 4)[1]] == [30, 0, 1, 2]
    assert len(numpy_sampler.top_logprobs(logprobs, 0, 99)[1]) == 50
