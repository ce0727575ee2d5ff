"""One model's text on two engines: llama.cpp's tokenizer and Hugging Face's agree token for token.

The trained model as GGUF and as safetensors, and small vocabularies in the manner of families whose
conversion llama.cpp's users rely on.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from conftest import require_engine

require_engine("mlx")

from hypothesis import given, settings
from hypothesis import strategies as st
from support.made_tokenizers import TEXTS, write_gguf_vocabulary, write_tokenizer
from support.models import PYSTD_1M, SHARED, pystd_1m_gguf
from support.text_pairs import llama_tokenizer

from brim.core.tokenizer import Tokenizer
from brim.engine.mlx.tokenizer import HfTokenizer
from brim.errors import InvalidRequest

Pair = tuple[HfTokenizer, Tokenizer]

SPECIAL = [
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_", "|>", "<s>", "</s>", "<bos>", "\n\n",
    "<|eot_id|>", "<|begin_of_text|>", "<tool_call>", "<unused0>", "<0x41>", "<unk>",
]  # fmt: skip
WORDS = [
    "def ",
    "return",
    "    ",
    "self.",
    "it's",
    "they'LL",
    "12345",
    "\t",
    "\r\n",
    "é",
    "日本",
    "😀",
]
# Any character but halves of surrogate pairs, which are no text; and what tokenizers split on.
ANY_TEXT = st.lists(
    st.one_of(
        st.sampled_from(SPECIAL + WORDS),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    ),
    max_size=12,
).map("".join)


@pytest.fixture(scope="session")
def trained() -> Iterator[Pair]:
    """The trained model's tokenizer on both engines."""
    require_engine("mlx")
    with llama_tokenizer(pystd_1m_gguf()) as tokenizer:
        yield HfTokenizer.from_directory(PYSTD_1M, tokenizer.vocab_size), tokenizer


@pytest.fixture(scope="session", params=["llama3", "qwen2", "llama2", "gemma"])
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Pair]]:
    """A made vocabulary on both engines."""
    require_engine("mlx")
    name, directory = str(request.param), tmp_path_factory.mktemp("tokenizer")
    with llama_tokenizer(write_gguf_vocabulary(directory / "v.gguf", name)) as tokenizer:
        yield name, (HfTokenizer.from_directory(write_tokenizer(directory, name)), tokenizer)


def assert_same_tokens(pair: Pair, text: str) -> None:
    mlx, llama = pair
    for add_special in (False, True):
        for parse_special in (False, True):
            got = mlx.encode(text, add_special=add_special, parse_special=parse_special)
            expected = llama.encode(text, add_special=add_special, parse_special=parse_special)
            assert got == expected, (text, add_special, parse_special)
            assert mlx.decode(got) == llama.decode(got)


def assert_same_vocabulary(pair: Pair) -> None:
    mlx, llama = pair
    assert (mlx.vocab_size, mlx.eog_tokens) == (llama.vocab_size, llama.eog_tokens)
    assert mlx.eos_piece == llama.eos_piece
    for special in (False, True):
        for token in range(mlx.vocab_size):
            assert mlx.piece(token, special=special) == llama.piece(token, special=special), token


def test_the_trained_vocabulary_is_the_same(trained: Pair) -> None:
    """Every piece, the end tokens, and the texts of begin and end are equal on both engines."""
    assert_same_vocabulary(trained)
    assert trained[0].bos_piece == trained[1].bos_piece == "<|endoftext|>"


@settings(max_examples=300, deadline=None)
@given(text=ANY_TEXT)
def test_any_text_is_the_same_tokens(trained: Pair, text: str) -> None:
    """Whatever the text, special tokens written in it included, both engines read the same."""
    assert_same_tokens(trained, text)


@settings(max_examples=100, deadline=None)
@given(tokens=st.lists(st.integers(0, 4095), max_size=30))
def test_any_tokens_are_the_same_text(trained: Pair, tokens: Sequence[int]) -> None:
    """Whatever a model draws, halves of characters included, both engines write the same."""
    assert trained[0].decode(tokens) == trained[1].decode(tokens)


@pytest.mark.skipif(not SHARED.exists(), reason="the published models are not beside the checkout")
@pytest.mark.parametrize("name", ["pystd-1m", "pystd-6m"])
def test_published_files_agree(name: str) -> None:
    """A GGUF file that was published beside its checkpoint reads a long text as that does."""
    require_engine("mlx")
    with llama_tokenizer(SHARED / name / "model-f16.gguf") as llama:
        pair = HfTokenizer.from_directory(SHARED / name, llama.vocab_size), llama
        assert_same_vocabulary(pair)
        for file in ("val.txt", "chat_val.txt"):
            assert_same_tokens(pair, (SHARED / file).read_text(encoding="utf-8")[:100_000])


def test_a_made_vocabulary_is_the_same(family: tuple[str, Pair]) -> None:
    """Pieces and end tokens of four families are equal on both engines."""
    name, pair = family
    assert_same_vocabulary(pair)
    # llama.cpp has no way to say that there is none, and takes the one of the config.
    assert name == "qwen2" or pair[0].bos_piece == pair[1].bos_piece
    for text in TEXTS:
        assert_same_tokens(pair, text)


@settings(max_examples=60, deadline=None)
@given(text=ANY_TEXT)
def test_any_text_in_the_manner_of_families(family: tuple[str, Pair], text: str) -> None:
    """The same holds for any text, where llama.cpp does what the tokenizer.json says."""
    name, pair = family
    if name == "qwen2":  # llama.cpp does not compose characters
        text = unicodedata.normalize("NFC", text)
    if name == "gemma":  # it takes no mark in the text for a space
        text = text.replace("▁", "_")
    assert_same_tokens(pair, text)


@pytest.mark.parametrize("unit", ["a", " ", "\n", "1", "!", "😀", "ab ", " \n"])
def test_runs_of_half_a_million(unit: str) -> None:
    """No run of characters hangs or crashes the tokenizer, and none is lost."""
    require_engine("mlx")
    tokenizer = HfTokenizer.from_directory(PYSTD_1M, 4096)
    text = unit * (500_000 // len(unit))
    tokens = tokenizer.encode(text, add_special=False, parse_special=False)
    assert tokenizer.decode(tokens) == text


def test_a_panic_of_the_library(tmp_path: Path) -> None:
    """A model's expression that gives up on a text fails that text, not the process."""
    require_engine("mlx")
    path = write_tokenizer(tmp_path, "llama3") / "tokenizer.json"
    source = path.read_text(encoding="utf-8")
    at = source.index('"Regex":')
    end = source.index("},", at)
    path.write_text(source[:at] + '"Regex": "(x+x+)+y"' + source[end:], encoding="utf-8")
    tokenizer = HfTokenizer.from_directory(tmp_path)
    with pytest.raises(InvalidRequest, match=r"cannot split the text \(Onig.*break it up"):
        tokenizer.encode("x" * 26, add_special=False, parse_special=False)
    assert tokenizer.encode("xxy", add_special=False, parse_special=False)
