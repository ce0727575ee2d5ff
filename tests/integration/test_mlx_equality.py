"""brim's MLX engine draws what mlx-lm draws from the same model, to the bit of every logit."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import require_engine
from support import mlx_reference
from support.driver import GREEDY, Run, assert_same, decode_together, generate, record
from support.mlx_models import (
    FAMILIES,
    ROUNDED_CHUNKS,
    ROUNDED_WINDOWS,
    ROUNDING,
    family_dir,
)
from support.models import PYSTD_1M, SHARED, plan_for

from brim.core.step import Feed, StepPlan
from brim.engine import factory
from brim.engine.base import Engine

NUM_TOKENS = 64
NUM_PROMPTS = 3

Load = Callable[..., Engine]

TEXT = """def merge(left, right):
    result = []
    while left and right:
        result.append(left.pop(0) if left[0] <= right[0] else right.pop(0))
    return result + left + right


class Stack(object):
    def __init__(self, items=None):
        self.items = list(items or [])

    def push(self, item):
        self.items.append(item)

    def pop(self):
        if not self.items:
            raise IndexError("pop from an empty stack")
        return self.items.pop()

def read_lines(path, encoding="utf-8"):
    with open(path, encoding=encoding) as file:
        for line in file:
            yield line.rstrip()
"""


def _model_dirs() -> dict[str, Callable[[], Path]]:
    """Trained models, every family, and weights of other types."""
    dirs: dict[str, Callable[[], Path]] = {"pystd-1m": lambda: PYSTD_1M}
    if (SHARED / "pystd-6m" / "config.json").exists():
        dirs["pystd-6m"] = lambda: SHARED / "pystd-6m"
    for family in FAMILIES:
        dirs[family] = functools.partial(family_dir, family)
    dirs["llama bfloat16"] = functools.partial(family_dir, "llama", dtype="bfloat16")
    dirs["qwen2 4-bit"] = functools.partial(family_dir, "qwen2", quant_bits=4)
    return dirs


MODELS = _model_dirs()


@functools.cache
def prompts() -> list[list[int]]:
    """Eight pieces of code of different lengths; three are compared, the others keep company."""
    from tokenizers import Tokenizer

    tokens = Tokenizer.from_file(str(PYSTD_1M / "tokenizer.json")).encode(TEXT).ids
    return [tokens[7 * n : 7 * n + 17 + 19 * n] for n in range(8)]


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> str:
    require_engine("mlx")
    return str(request.param)


@pytest.fixture
def load() -> Iterator[Load]:
    made: list[Engine] = []

    def make(model: str, kv_type: str = "f16") -> Engine:
        engine = factory.create("mlx")
        made.append(engine)
        engine.load(plan_for("mlx", path=MODELS[model](), kv_type=kv_type))
        return engine

    yield make
    for engine in made:
        engine.shutdown()


@functools.cache
def references(model: str, kv_type: str = "f16") -> list[Run]:
    model_dir = MODELS[model]()
    return [
        Run(-1, *mlx_reference.greedy(model_dir, prompt, NUM_TOKENS, kv_type))
        for prompt in prompts()[:NUM_PROMPTS]
    ]


def rounding(model: str, inexact: frozenset[str] = frozenset()) -> float:
    """What mlx-lm's own order of additions changes."""
    return ROUNDING if model in ROUNDED_WINDOWS | inexact else 0.0


def in_company(engine: Engine) -> list[Run]:
    """All prompts in one batch, the last of them read in pieces beside the others' decoding."""
    *first, last = prompts()
    runs = [generate(engine, prompt, 1) for prompt in first]
    reader = Run(engine.open(GREEDY))
    for start in range(0, len(last), 40):
        feeds = [Feed(run.seq_id, run.tokens[-1:]) for run in runs]
        feeds.append(Feed(reader.seq_id, last[start : start + 40], start + 40 >= len(last)))
        drawn = engine.step(StepPlan(feeds)).sampled
        for run, sampled in zip([*runs, reader], drawn, strict=False):
            record(engine, run, sampled)
    decode_together(engine, [*runs, reader], NUM_TOKENS)
    return runs[:NUM_PROMPTS]


def test_alone(model: str, load: Load) -> None:
    """Three prompts, 64 tokens each: the tokens and logits of mlx-lm's generate_step."""
    engine = load(model)
    for prompt, reference in zip(prompts(), references(model), strict=False):
        found = generate(engine, prompt, NUM_TOKENS)
        assert_same(reference, found, rounding=rounding(model))


def test_in_a_batch_of_eight(model: str, load: Load) -> None:
    """Beside seven others, one of them still reading, every sequence is mlx-lm's alone."""
    for found, reference in zip(in_company(load(model)), references(model), strict=True):
        assert_same(reference, found, rounding=rounding(model))


def test_with_chunked_prefill(model: str, load: Load) -> None:
    """A prompt read in pieces of 16 gives mlx-lm's tokens and logits for the whole."""
    engine = load(model)
    for prompt, reference in zip(prompts(), references(model), strict=False):
        found = generate(engine, prompt, NUM_TOKENS, chunk=16)
        assert_same(reference, found, rounding=rounding(model, ROUNDED_CHUNKS))


QUANTISED = ["pystd-1m", "llama", "qwen2", "qwen3", "qwen3_moe", "llama bfloat16"]
"""Models whose every layer keeps all tokens; of qwen2 the groups are of 32."""


@pytest.mark.parametrize("kv_type", ["q8_0", "q4_0"])
@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_kv_in_a_batch(name: str, kv_type: str, load: Load) -> None:
    """Batched quantised KV equals mlx-lm's quantised cache, which does not batch."""
    require_engine("mlx")
    expected = references(name, kv_type)
    for found, reference in zip(in_company(load(name, kv_type)), expected, strict=True):
        assert_same(reference, found)
    plain = references(name)[0].logits[0]
    assert not np.array_equal(plain, expected[0].logits[0])
