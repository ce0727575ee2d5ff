"""Tokenizers of the MLX engine against the library itself, for the ways families do it."""

import functools
import json
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import require_engine

require_engine("mlx")

from support.made_tokenizers import END_TOKENS, FAMILIES, TEXTS, tokenizer_json, write_tokenizer
from support.models import PYSTD_1M
from tokenizers import AddedToken, Tokenizer

from brim.chat.stream import TextStream
from brim.engine.mlx.tokenizer import HfTokenizer
from brim.errors import InvalidRequest, ModelFileError

LEADING_SPACE_LOST = {"llama2", "mistral", "unigram"}
"""Their decoders drop the space in front of a whole text, which a piece cannot know of."""

Write = Callable[..., HfTokenizer]


@functools.cache
def made(family: str) -> HfTokenizer:
    with tempfile.TemporaryDirectory() as directory:
        return HfTokenizer.from_directory(write_tokenizer(Path(directory), family))


@functools.cache
def library(family: str) -> Tokenizer:
    return Tokenizer.from_str(tokenizer_json(family))


def id_of(hub: Tokenizer, text: str) -> int:
    token = hub.token_to_id(text)
    assert token is not None
    return int(token)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A tokenizer from a family's tokenizer.json with changes, and other files as given."""

    def write(family: str = "qwen2", vocab_size: int | None = None, **files: Any) -> HfTokenizer:
        write_tokenizer(tmp_path, family)
        for name, content in files.items():
            path = tmp_path / f"{name}.json"
            content = json.loads(path.read_text()) | content if name == "tokenizer" else content
            path.write_text(json.dumps(content))
        return HfTokenizer.from_directory(tmp_path, vocab_size)

    return write


@pytest.mark.parametrize("family", FAMILIES)
class TestFamilies:
    def test_the_library_gives_the_same_tokens(self, family: str) -> None:
        """Special tokens are read in the text where asked for, and are text where not."""
        for text in TEXTS:
            hub = Tokenizer.from_str(tokenizer_json(family))
            for parse_special in (True, False):
                hub.encode_special_tokens = not parse_special
                got = made(family).encode(text, add_special=False, parse_special=parse_special)
                assert got == hub.encode(text, add_special_tokens=False).ids, text

    def test_pieces_join_to_the_library_s_text(self, family: str) -> None:
        """Bytes of the tokens, joined, are what the library decodes, special tokens left out."""
        for text in TEXTS:
            tokens = made(family).encode(text, add_special=True, parse_special=True)
            expected = library(family).decode(tokens)
            got = made(family).decode(tokens)
            if family in LEADING_SPACE_LOST:
                got = got.removeprefix(" ")
            assert got == expected, text

    def test_a_plain_text_comes_back(self, family: str) -> None:
        """Where every character has a token, text to tokens to text changes nothing."""
        for text in TEXTS:
            tokens = made(family).encode(text, add_special=False, parse_special=False)
            if family == "unigram" and library(family).token_to_id("<unk>") in tokens:
                continue
            got = made(family).decode(tokens)
            assert got in (text, " " + text) if family in LEADING_SPACE_LOST else got == text

    def test_streams_never_split_a_character(self, family: str) -> None:
        """A stream of pieces gives whole characters, however the tokens cut them."""
        text = "naïve 日本語 😀!"
        tokens = made(family).encode(text, add_special=False, parse_special=False)
        stream = TextStream(made(family))
        shown = [stream.push(token).text for token in tokens]
        assert "\ufffd" not in "".join(shown)
        assert "".join(shown) + stream.finish() == made(family).decode(tokens)

    def test_end_tokens(self, family: str) -> None:
        """They come from the settings and from well-known names, and have no text of their own."""
        tokenizer = made(family)
        ends = {tokenizer.piece(t, special=True).decode() for t in tokenizer.eog_tokens}
        assert ends == END_TOKENS[family]
        assert {tokenizer.piece(token) for token in tokenizer.eog_tokens} == {b""}

    def test_rows_without_a_token(self, family: str, tmp_path: Path) -> None:
        """Logit rows beyond the vocabulary have empty pieces."""
        num_tokens = made(family).vocab_size
        padded = HfTokenizer.from_directory(write_tokenizer(tmp_path, family), num_tokens + 7)
        assert padded.vocab_size == num_tokens + 7
        assert padded.piece(num_tokens + 6, special=True) == b""
        assert padded.decode([num_tokens]) == ""


@pytest.mark.parametrize(
    ("family", "begin"),
    [
        ("llama3", "<|begin_of_text|>"),
        ("qwen2", ""),
        ("llama2", "<s>"),
        ("gemma", "<bos>"),
        ("mistral", "<s>"),
    ],
)
def test_the_begin_token(family: str, begin: str) -> None:
    """It is added on demand: by the post-processor, or by settings alone, or never."""
    tokenizer = made(family)
    assert tokenizer.bos_piece == begin
    plain = tokenizer.encode("x", add_special=False, parse_special=False)
    whole = tokenizer.encode("x", add_special=True, parse_special=False)
    assert whole[len(whole) - len(plain) :] == plain
    assert (
        b"".join(tokenizer.piece(t, special=True) for t in whole[: -len(plain)]).decode() == begin
    )


class TestSettings:
    def test_begin_token_switched_off(self, write: Write) -> None:
        """`add_bos_token: false` outweighs the post-processor, as in a conversion to GGUF."""
        settings = {"bos_token": "<|begin_of_text|>", "add_bos_token": False}
        tokenizer = write("llama3", tokenizer_config=settings)
        assert tokenizer.encode("", add_special=True, parse_special=False) == []

    def test_an_end_token_behind_a_text_is_not_added(self, write: Write) -> None:
        """A post-processor that closes every text is for training; a prompt stays open."""
        after = {
            "type": "TemplateProcessing",
            "single": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"<|im_end|>": {
                "id": "<|im_end|>", "ids": [library("qwen2").token_to_id("<|im_end|>")],
                "tokens": ["<|im_end|>"]}},
        }  # fmt: skip
        tokenizer = write(tokenizer={"post_processor": after}, tokenizer_config={})
        plain = tokenizer.encode("ab", add_special=False, parse_special=False)
        assert tokenizer.encode("ab", add_special=True, parse_special=False) == plain

    def test_ids_of_the_configs(self, write: Write) -> None:
        """Ids of config.json and generation_config.json end too, and name what is not named."""
        tokenizer = write(
            "llama3",
            tokenizer_config={},
            config={"text_config": {"eos_token_id": [3, 99_999], "bos_token_id": 5}},
            generation_config={"eos_token_id": 4},
        )
        named = {library("llama3").token_to_id(text) for text in END_TOKENS["llama3"]}
        assert tokenizer.eog_tokens == named | {3, 4}
        assert tokenizer.bos_piece == tokenizer.piece(5).decode()
        assert tokenizer.eos_piece == library("llama3").id_to_token(3)
        assert tokenizer.piece(3) == b""

    def test_an_end_token_of_its_own(self, write: Write) -> None:
        """The settings' end token ends, though no list knows its name and no config its id."""
        tokenizer = write("llama3", tokenizer_config={"eos_token": "<|start_header_id|>"})
        end = id_of(library("llama3"), "<|start_header_id|>")
        assert end in tokenizer.eog_tokens
        assert tokenizer.eos_piece == "<|start_header_id|>"

    def test_older_checkpoints(self, write: Write) -> None:
        """special_tokens_map.json names begin and end where the settings are silent."""
        names = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
        tokenizer = write("llama2", tokenizer_config={}, special_tokens_map=names)
        assert (tokenizer.bos_piece, tokenizer.eos_piece) == ("<s>", "</s>")

    def test_a_message_s_end_is_not_the_turn_s(self, write: Write) -> None:
        """Where a vocabulary has calls and returns, `<|end|>` ends a message and is shown."""
        hub = Tokenizer.from_str(tokenizer_json("qwen2"))
        names = ["<|return|>", "<|call|>", "<|end|>", "<|channel|>", "<|other|>"]
        hub.add_special_tokens(names)
        tokenizer = write(tokenizer=json.loads(hub.to_str()))
        pieces = {name: tokenizer.piece(id_of(hub, name)) for name in names}
        assert pieces == {
            "<|return|>": b"", "<|call|>": b"", "<|end|>": b"<|end|>",
            "<|channel|>": b"<|channel|>", "<|other|>": b"",
        }  # fmt: skip
        assert hub.token_to_id("<|call|>") in tokenizer.eog_tokens
        assert hub.token_to_id("<|end|>") not in tokenizer.eog_tokens

    def test_truncation_and_padding_are_off(self, write: Write) -> None:
        """What is left over from training neither cuts a prompt nor lengthens it."""
        hub = Tokenizer.from_str(tokenizer_json("qwen2"))
        hub.enable_truncation(3)
        hub.enable_padding(length=64)
        tokenizer = write(tokenizer=json.loads(hub.to_str()))
        tokens = tokenizer.encode("one two three four", add_special=False, parse_special=False)
        assert tokenizer.decode(tokens) == "one two three four"


class TestDamage:
    def test_a_model_with_fewer_rows(self, write: Write) -> None:
        """A tokenizer with more tokens than the model has rows belongs to another model."""
        with pytest.raises(ModelFileError, match=r"belong to different models"):
            write("llama2", vocab_size=100)

    def test_a_token_without_a_row(self, write: Write) -> None:
        """An added token past the logits is known, and refused where a text holds it."""
        hub = Tokenizer.from_str(tokenizer_json("qwen2"))
        num_rows = hub.get_vocab_size()
        hub.add_tokens([AddedToken("<image>", normalized=False)])
        tokenizer = write(tokenizer=json.loads(hub.to_str()), vocab_size=num_rows)
        with pytest.raises(InvalidRequest, match=r"'<image>', a token .* no weights"):
            tokenizer.encode("see <image>", add_special=False, parse_special=True)
        assert tokenizer.encode("see", add_special=False, parse_special=True)

    @pytest.mark.parametrize(
        ("decoder", "named"),
        [
            (None, "no decoder"),
            ({"type": "WordPiece", "prefix": "##", "cleanup": True}, "the decoder WordPiece"),
            (
                {
                    "type": "Sequence",
                    "decoders": [{"type": "Fuse"}, {"type": "BPEDecoder", "suffix": "_"}],
                },
                r"the decoder BPEDecoder \+ Fuse",
            ),
        ],
    )
    def test_decoders_that_give_no_pieces(self, write: Write, decoder: Any, named: str) -> None:
        """A way of decoding that looks at neighbours is refused by name, with the way out."""
        with pytest.raises(ModelFileError, match=named + r", which .* GGUF"):
            write(tokenizer={"decoder": decoder})


def test_added_tokens_are_not_byte_level_text(write: Write) -> None:
    """An added token's letters are themselves, though byte-level text gives them other bytes."""
    hub = Tokenizer.from_str(tokenizer_json("qwen2"))
    hub.add_tokens([AddedToken("<Größe>", normalized=False)])
    tokenizer = write(tokenizer=json.loads(hub.to_str()))
    assert tokenizer.piece(id_of(hub, "<Größe>")) == "<Größe>".encode()


def test_a_token_that_is_no_byte_level_text(write: Write) -> None:
    """A token of the vocabulary with a character outside the byte table is meant as it stands."""
    source = json.loads(tokenizer_json("qwen2"))
    token = max(source["model"]["vocab"].values()) + 100
    source["model"]["vocab"]["Ġ日é"] = token
    tokenizer = write(tokenizer=source, vocab_size=token + 1)
    hub = Tokenizer.from_str(json.dumps(source))
    assert tokenizer.piece(token).decode() == hub.decode([token]) == "Ġ日é"


def test_half_a_surrogate_pair() -> None:
    """Any Python string can be encoded; what is no character becomes a question mark."""
    tokens = made("qwen2").encode("a\ud83d é", add_special=False, parse_special=False)
    assert made("qwen2").decode(tokens) == "a? é"


def test_two_threads_do_not_mix_their_flags() -> None:
    """One thread reads special tokens in its texts while another takes the same for text."""
    tokenizer = HfTokenizer.from_directory(PYSTD_1M, 4096)
    text = "<|im_start|>user\nhi<|im_end|>\n"
    wrong: list[tuple[bool, list[int]]] = []

    def encode(parse_special: bool) -> None:
        expected = tokenizer.encode(text, add_special=False, parse_special=parse_special)
        for _ in range(200):
            got = tokenizer.encode(text, add_special=False, parse_special=parse_special)
            if got != expected or (1 in got) != parse_special:
                wrong.append((parse_special, got))

    threads = [threading.Thread(target=encode, args=(flag,)) for flag in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
