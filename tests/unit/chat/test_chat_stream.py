"""TextStream over a real byte-level tokenizer: what is shown when, token by token."""

import pytest

from brim.chat.stream import Piece, TextStream
from brim.core.tokenizer import Tokenizer


def feed(stream: TextStream, tokenizer: Tokenizer, text: str) -> list[Piece]:
    tokens = tokenizer.encode(text, add_special=False, parse_special=False)
    return [stream.push(token) for token in tokens]


def test_each_token_of_plain_text_is_shown_at_once(tokenizer: Tokenizer) -> None:
    """Without stop strings, every ASCII token gives its own text immediately."""
    text = "def add(a, b):\n    return a + b\n"
    pieces = feed(TextStream(tokenizer), tokenizer, text)
    assert len(pieces) > 5
    assert all(piece.text for piece in pieces)
    assert "".join(piece.text for piece in pieces) == text


def test_a_character_split_over_tokens_is_shown_whole(tokenizer: Tokenizer) -> None:
    """An emoji that takes several tokens appears with its last one, never in parts."""
    tokens = tokenizer.encode("😀", add_special=False, parse_special=False)
    assert len(tokens) > 1
    stream = TextStream(tokenizer)
    texts = [stream.push(token).text for token in tokens]
    assert texts == [""] * (len(tokens) - 1) + ["😀"]
    assert stream.num_pending_bytes == 0


def test_an_unfinished_character_becomes_a_replacement_at_the_end(tokenizer: Tokenizer) -> None:
    """Bytes that no token completes are one U+FFFD from `finish`."""
    tokens = tokenizer.encode("😀", add_special=False, parse_special=False)
    stream = TextStream(tokenizer)
    assert stream.push(tokens[0]).text == ""
    assert stream.num_pending_bytes > 0
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


def test_control_tokens_have_no_text(tokenizer: Tokenizer) -> None:
    """Pushing an end-of-turn token shows nothing."""
    end = min(tokenizer.eog_tokens)
    assert TextStream(tokenizer).push(end) == Piece("")


def test_the_beginning_of_a_stop_string_is_held_until_it_is_not(tokenizer: Tokenizer) -> None:
    """Text that may begin a stop string waits, and is released when it turns out otherwise."""
    stream = TextStream(tokenizer, ["\n\n\nclass"])
    assert "".join(p.text for p in feed(stream, tokenizer, "x = 1\n\n\n")) == "x = 1"
    assert "".join(p.text for p in feed(stream, tokenizer, "cl")) == ""
    assert "".join(p.text for p in feed(stream, tokenizer, "ever")) == "\n\n\nclever"


def test_held_text_is_shown_at_the_end(tokenizer: Tokenizer) -> None:
    """Half a stop string at the end of the answer is text after all."""
    stream = TextStream(tokenizer, ["STOP"])
    shown = "".join(p.text for p in feed(stream, tokenizer, "go ST"))
    assert (shown, stream.finish()) == ("go ", "ST")


def test_a_stop_string_is_reported_with_the_text_before_it(tokenizer: Tokenizer) -> None:
    """The token that completes a stop string gives the text up to it and names it."""
    stream = TextStream(tokenizer, ["return"])
    pieces = feed(stream, tokenizer, "a = 1\nreturn a")
    assert "".join(piece.text for piece in pieces) == "a = 1\n"
    assert [p.stop_string for p in pieces if p.stop_string is not None] == ["return"]
    assert stream.finish() == ""


@pytest.mark.parametrize(
    ("stops", "text", "shown", "winner"),
    [
        (["b", "abcd"], "abcd", "a", "b"),
        (["bc", "abc"], "xabc", "x", "abc"),
        (["abc", "bc"], "xabc", "x", "abc"),
        (["ab", "abc"], "abc", "", "ab"),
        (["aab"], "aaab", "a", "aab"),
        (["\ufffd"], "x\ufffdy", "x", "\ufffd"),
    ],
)
def test_the_stop_string_that_is_complete_first_wins_and_then_the_longest(
    tokenizer: Tokenizer, stops: list[str], text: str, shown: str, winner: str
) -> None:
    """Generation stops at the first character that completes a stop; the longest one cuts."""
    pieces = feed(TextStream(tokenizer, stops), tokenizer, text)
    assert "".join(piece.text for piece in pieces) == shown
    assert [p.stop_string for p in pieces if p.stop_string is not None] == [winner]


def test_an_empty_stop_string_is_refused(tokenizer: Tokenizer) -> None:
    """An empty stop string would end every answer before it began."""
    with pytest.raises(ValueError, match="empty"):
        TextStream(tokenizer, ["x", ""])
