"""For any bytes, split and stop strings, a text stream equals decoding everything at once."""

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from brim.chat.stream import TextStream


class PieceTokenizer:
    """Token i is the i-th of the given byte strings."""

    eog_tokens: frozenset[int] = frozenset()
    bos_piece = ""
    eos_piece = ""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = pieces

    @property
    def vocab_size(self) -> int:
        return len(self._pieces)

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        return [self._pieces.index(bytes([byte])) for byte in text.encode()]

    def piece(self, token: int, *, special: bool = False) -> bytes:
        return self._pieces[token]

    def decode(self, tokens: Sequence[int]) -> str:
        return b"".join(self._pieces[token] for token in tokens).decode("utf-8", "replace")


# Few letters, so that stop strings overlap with the text and with each other; the rest are the
# bytes on which UTF-8 decoders differ: every lead byte class, its edges, and stray continuations.
ALPHABET = [b"a", b"b", b"\x00", "é".encode(), "€".encode(), "😀".encode(), b"\x80", b"\xbf"]
ALPHABET += [b"\xc0", b"\xc2", b"\xe0", b"\xe2\x82", b"\xed\xa0", b"\xf0\x9f\x98", b"\xf4", b"\xff"]
TEXT = st.one_of(
    st.lists(st.sampled_from(ALPHABET), max_size=24).map(b"".join), st.binary(max_size=24)
)
STOPS = st.lists(
    st.text(st.sampled_from(["a", "b", "é", "😀", "\ufffd", "\x00"]), min_size=1, max_size=5),
    max_size=4,
)


@st.composite
def pieces_of(draw: st.DrawFn) -> list[bytes]:
    data = draw(TEXT)
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=12)))
    return [data[i:j] for i, j in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def cut_at_first_stop(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """The rule in its slow form: complete first wins, then the longest."""
    found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not found:
        return text, None
    end, minus_length, stop = min(found)
    return text[: end + minus_length], stop


def certain_text(data: bytes) -> str:
    """What every continuation of `data` agrees on."""
    endings = (b"", b"A", b"\x80\x80\x80", b"\x90\x80\x80", b"\xa0\x80\x80")
    first, *others = [(data + end).decode("utf-8", "replace") for end in endings]
    agreed = 0
    while agreed < len(first) and all(
        other[agreed : agreed + 1] == first[agreed] for other in others
    ):
        agreed += 1
    return first[:agreed]


def longest_beginning(text: str, stops: Sequence[str]) -> int:
    """Characters at the end of `text` that may be the beginning of a stop string."""
    return max(
        (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
    )


@settings(deadline=None)
@given(pieces_of(), STOPS)
def test_joined_output_is_the_decoded_text_cut_at_the_first_stop(
    pieces: list[bytes], stops: list[str]
) -> None:
    """However bytes are split into tokens, the pieces join to the decoded text up to the stop."""
    stream = TextStream(PieceTokenizer(pieces), stops)
    got: list[str] = []
    reported = None
    for token in range(len(pieces)):
        piece = stream.push(token)
        got.append(piece.text)
        if piece.stop_string is not None:
            reported = piece.stop_string
            break
    tail = stream.finish()
    text, stop = cut_at_first_stop(b"".join(pieces).decode("utf-8", "replace"), stops)
    assert "".join(got) + tail == text
    # Only an unfinished character at the very end can complete a stop string in `finish`.
    assert reported == stop or (reported is None and stop is not None and stop.endswith("\ufffd"))


@settings(deadline=None)
@given(pieces_of(), STOPS)
def test_nothing_is_shown_early_or_late(pieces: list[bytes], stops: list[str]) -> None:
    """After each token exactly the certain text is out, less what may begin a stop string."""
    stream = TextStream(PieceTokenizer(pieces), stops)
    shown = ""
    fed = b""
    for token, data in enumerate(pieces):
        piece = stream.push(token)
        shown += piece.text
        fed += data
        assert stream.num_pending_bytes <= 3
        certain, stop = cut_at_first_stop(certain_text(fed), stops)
        assert piece.stop_string == stop
        if stop is not None:
            assert shown == certain
            return
        assert shown == certain[: len(certain) - longest_beginning(certain, stops)]


@settings(deadline=None)
@given(pieces_of(), STOPS, pieces_of())
def test_nothing_follows_a_stop(pieces: list[bytes], stops: list[str], more: list[bytes]) -> None:
    """Once a stop string was reported, later tokens and the end add nothing."""
    stream = TextStream(PieceTokenizer(pieces + more), stops)
    for token in range(len(pieces)):
        if stream.push(token).stop_string is not None:
            later = [stream.push(after) for after in range(token + 1, len(pieces + more))]
            assert not any(piece.text or piece.stop_string for piece in later)
            assert stream.finish() == ""
            return
