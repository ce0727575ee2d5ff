"""From a position in the text to one in the tokens, for tokenizers of every manner."""

from collections.abc import Sequence

import pytest

from brim.chat.token_edges import PieceCache, TokenEdges
from brim.engine.byte_tokenizer import ByteTokenizer


class WordTokenizer:
    """Tokens by number: a few words, some of them control tokens."""

    def __init__(self, pieces: Sequence[bytes], controls: int = 0) -> None:
        self.pieces = pieces
        self.controls = controls
        self.vocab_size = len(pieces)
        self.eog_tokens = frozenset({0} if controls else ())
        self.bos_piece = self.eos_piece = ""

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        raise NotImplementedError

    def piece(self, token: int, *, special: bool = False) -> bytes:
        return self.pieces[token] if special or token >= self.controls else b""

    def decode(self, tokens: Sequence[int]) -> str:
        return b"".join(map(self.piece, tokens)).decode()


def edges(pieces: Sequence[bytes], text: str, controls: int = 0) -> TokenEdges:
    """Of a text that is every piece once, in order."""
    tokenizer = WordTokenizer(pieces, controls)
    return TokenEdges(PieceCache(tokenizer), range(len(pieces)), text)


def toy(text: str) -> TokenEdges:
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(text, add_special=False, parse_special=True)
    return TokenEdges(PieceCache(tokenizer), tokens, text)


def test_a_position_beside_a_control_token_is_exact() -> None:
    """Before it and behind it nothing on one side can change the tokens of the other."""
    text = "ab<|im_end|>cd"
    assert list(toy(text).settled([2, 12])) == [2, 3]


def test_a_position_behind_a_role_goes_back_to_the_control_token() -> None:
    """What the user says may share a token with the line end before it."""
    text = "ä<|im_start|>user\nhi"
    assert list(toy(text).settled([text.index("hi")])) == [3]


@pytest.mark.parametrize("text", ["no control token", "<|im_start|>far from here, far away"])
def test_a_position_far_from_control_tokens_is_not_settled(text: str) -> None:
    """Then the caller has to tokenise."""
    assert list(toy(text).settled([len(text)])) == [None]


def test_a_begin_token_and_a_space_beyond_the_text_are_skipped() -> None:
    """The tokenizer adds them; the text does not have them."""
    found = edges([b"<s>", b" hello", b"</s>"], "hello</s>")
    assert found.is_known
    assert edges([b"<s>", b" hello", b"</s>", b" you"], "hello</s>you").is_known
    assert found.turn_starts([0, 5]) == (0, 2)


def test_white_space_that_control_tokens_swallow_is_skipped() -> None:
    """Position by position the tokens are those behind it."""
    found = edges([b"<end>", b"<user>", b"hi", b"<end>"], "<end>\n<user>\nhi<end>\n", 2)
    assert found.is_known
    assert list(found.settled([6])) == [1]


@pytest.mark.parametrize(
    ("pieces", "text"), [([b"ab"], "ac"), ([b"a"], "ab"), ([b"a", b"bc"], "ab")]
)
def test_tokens_of_another_text_are_noticed(pieces: list[bytes], text: str) -> None:
    """A tokenizer that normalises leaves no positions, so none are made up."""
    found = edges(pieces, text)
    assert not found.is_known
    assert list(found.settled([1])) == [None]
    assert found.turn_starts([0, 1]) == ()


def test_a_turn_begins_with_its_header() -> None:
    """The first control token after the end of the turn before, or the token behind that end."""
    pieces = [b"<end>", b"<role>", b"<of>", b"hi", b"\n", b"you"]
    tokens = [3, 0, 4, 1, 3, 2, 5, 0, 4, 5, 3]
    text = "hi<end>\n<role>hi<of>you<end>\nyouhi"
    found = TokenEdges(PieceCache(WordTokenizer(pieces, 3)), tokens, text)
    assert found.turn_starts([0, text.index("you"), text.index("youhi")]) == (0, 3, 8)


def test_turns_without_marks_begin_with_their_words() -> None:
    """Positions rise whatever a template does."""
    found = edges([b"a", b"b", b"c"], "abc")
    assert found.turn_starts([0, 1, 1, 3]) == (0, 1, 1, 3)
