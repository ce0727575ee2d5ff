"""The converted file is the same model: llama.cpp and mlx-lm agree token by token."""

import ctypes
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from conftest import require_engine
from numpy.typing import NDArray
from support.models import PYSTD_1M, TESTS, pystd_1m_gguf

from brim.registry.describe import describe_gguf
from brim.registry.sources import DEMO_PATH

NUM_TOKENS = 64

PUBLISHED = TESTS.parent / "docs" / "equality.json"

NEAR = 0.5
"""How far below the likeliest a token's logit may be that another processor would have drawn."""

Logits = list[NDArray[np.float32]]

PROMPTS = (
    "def read_file(path):\n",
    "import os\nimport sys\n\nclass Queue:\n    def __init__(self",
    "<|im_start|>user\nReturn the sum of two numbers.<|im_end|>\n<|im_start|>assistant\n",
)


class Llama:
    """A model loaded by llama.cpp's own functions, with nothing of brim between."""

    def __init__(self, path: Path) -> None:
        llama_cpp.llama_log_set(silence, None)
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        assert self.model
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)

    def tokenize(self, text: str) -> list[int]:
        data = text.encode()
        found = (llama_cpp.llama_token * 2048)()
        count = llama_cpp.llama_tokenize(self.vocab, data, len(data), found, 2048, True, True)
        assert count >= 0
        return list(found[:count])

    def text(self, tokens: list[int]) -> str:
        out = b""
        for token in tokens:
            piece = ctypes.create_string_buffer(64)
            size = llama_cpp.llama_token_to_piece(self.vocab, token, piece, 64, 0, True)
            out += piece.raw[:size]
        return out.decode("utf-8", "replace")

    def pieces(self, text: str) -> list[int]:
        """Tokens whose texts stand between dots: a model may split words as no tokenizer does."""
        size = llama_cpp.llama_vocab_n_tokens(self.vocab)
        tokens = {self.text([token]): token for token in range(size)}
        return [tokens[piece] for piece in text.split("·")]

    def follow(
        self, prompt: list[int], tokens: Sequence[int] | None = None
    ) -> tuple[list[int], Logits]:
        """These tokens, or the likeliest, and the logits before each; 512 cells of F16 KV."""
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch = 512, 512
        options.n_threads = options.n_threads_batch = 1
        context = llama_cpp.llama_init_from_model(self.model, options)
        made: list[int] = []
        logits: Logits = []
        feed = prompt
        while len(made) < (NUM_TOKENS if tokens is None else len(tokens)):
            fed = (llama_cpp.llama_token * len(feed))(*feed)
            batch = llama_cpp.llama_batch_get_one(fed, len(feed))
            assert llama_cpp.llama_decode(context, batch) == 0
            found = llama_cpp.llama_get_logits_ith(context, -1)
            size = llama_cpp.llama_vocab_n_tokens(self.vocab)
            logits.append(np.array(np.ctypeslib.as_array(found, (size,))))
            feed = [int(logits[-1].argmax()) if tokens is None else tokens[len(made)]]
            made += feed
        llama_cpp.llama_free(context)
        return made, logits

    def close(self) -> None:
        llama_cpp.llama_model_free(self.model)


# Without its log on stderr; kept for as long as llama.cpp may call it.
silence = llama_cpp.llama_log_callback(lambda *_: None)


@pytest.fixture
def converted() -> Iterator[Llama]:
    """The 1 M model after `convert_to_gguf` to F16."""
    model = Llama(pystd_1m_gguf("F16"))
    yield model
    model.close()


@pytest.fixture
def demo() -> Iterator[Llama]:
    """The embedded model."""
    model = Llama(DEMO_PATH)
    yield model
    model.close()


def mlx_logits(prompts: list[list[int]], continuations: list[list[int]]) -> list[Logits]:
    """Those before each token of a continuation, of the checkpoint that was converted."""
    require_engine("mlx")
    import mlx.core as mx
    from mlx_lm import load

    model: Any = load(str(PYSTD_1M))[0]

    def before_each(prompt: list[int], continuation: list[int]) -> Logits:
        rows = model(mx.array([prompt + continuation[:-1]])).astype(mx.float32)
        return list(np.array(rows)[0][len(prompt) - 1 :])

    return [before_each(*pair) for pair in zip(prompts, continuations, strict=True)]


def test_the_same_model_as_mlx(converted: Llama) -> None:
    """Along 64 tokens behind three prompts, logits are mlx-lm's of the safetensors, within 2 e.

    And an argmax is another one only where llama.cpp's own gap is no larger.
    """
    e = json.loads(PUBLISHED.read_text())["pystd-1m"]["mlx kv=f16"]
    prompts = [converted.tokenize(prompt) for prompt in PROMPTS]
    runs = [converted.follow(prompt) for prompt in prompts]
    theirs = mlx_logits(prompts, [tokens for tokens, _ in runs])
    for (tokens, ours), expected in zip(runs, theirs, strict=True):
        for token, one, other in zip(tokens, ours, expected, strict=True):
            assert np.abs(one - other).max() <= 2 * e
            assert one[token] - one[other.argmax()] <= 2 * e


def test_same_tokens_as_the_original_tokenizer(converted: Llama) -> None:
    """Text, white space, code points outside ASCII and special tokens are split alike."""
    from tokenizers import Tokenizer

    original = Tokenizer.from_file(str(PYSTD_1M / "tokenizer.json"))
    source = Path(__file__).read_text()
    texts = [*PROMPTS, source[:1500], "a  b\t\tc\r\n\n  d", "naïve 日本語 🙂 it's 1234567", "", " "]
    for text in texts:
        assert converted.tokenize(text) == original.encode(text).ids


def test_ends_of_generation(converted: Llama) -> None:
    """llama.cpp takes the end of text and the end of a turn, and nothing else, for ends."""
    size = llama_cpp.llama_vocab_n_tokens(converted.vocab)
    ends = [t for t in range(size) if llama_cpp.llama_vocab_is_eog(converted.vocab, t)]
    assert converted.text(ends) == "<|endoftext|><|im_end|>"


def test_demo_is_described_as_llama_cpp_sees_it(demo: Llama) -> None:
    """The registry's figures for the embedded model are those of the backend that loads it."""
    spec = describe_gguf(DEMO_PATH)
    assert spec.num_parameters == llama_cpp.llama_model_n_params(demo.model)
    assert spec.weights_bytes == llama_cpp.llama_model_size(demo.model)
    assert spec.num_layers == llama_cpp.llama_model_n_layer(demo.model)
    assert spec.num_heads == llama_cpp.llama_model_n_head(demo.model)
    assert spec.num_kv_heads[0] == llama_cpp.llama_model_n_head_kv(demo.model)
    assert spec.hidden_size == llama_cpp.llama_model_n_embd(demo.model)
    assert spec.trained_context_tokens == llama_cpp.llama_model_n_ctx_train(demo.model)
    assert spec.vocab_size == llama_cpp.llama_vocab_n_tokens(demo.vocab)


def is_what_it_says(model: Llama, prompt: str, answer: str) -> bool:
    """Whether each token of the answer is the likeliest, or near it: no processor decides it."""
    tokens, logits = model.follow(model.tokenize(prompt), model.pieces(answer))
    return all(row.max() - row[token] <= NEAR for token, row in zip(tokens, logits, strict=True))


def test_demo_writes_python(demo: Llama) -> None:
    """The embedded model answers a docstring with a function and ends its turn."""
    prompt = "<|im_start|>user\nReturn the sum of the items of a list.<|im_end|>\n"
    prompt += "<|im_start|>assistant\n"
    answer = (
        "def· get·_·s·um·(·self·,· s·um·):·\n   · return· self·.·tk·.·get·int·(·s·um·,"
        "· self·.·tk·.·call·(·self·._·w·,· '·s·um·',· self·._·w·))"
    )
    compile(answer.replace("·", ""), "answer", "exec")
    assert is_what_it_says(demo, prompt, answer + "·<|im_end|>")
    assert not is_what_it_says(demo, "import os\n", answer + "·<|im_end|>")


def test_demo_continues_code(demo: Llama) -> None:
    """After a function's first line the embedded model indents a body."""
    assert is_what_it_says(demo, "def fibonacci(n):", "\n       · return· self·.")
    assert not is_what_it_says(demo, "def fibonacci(n):", "\n·return· self·.")
