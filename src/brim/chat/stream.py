"""Tokens become text, one at a time: whole characters only, and never past a stop string.

`TextStream` is in the worker's hot path, one `push` for each token of each sequence.
"""

from codecs import utf_8_decode
from collections.abc import Sequence

import msgspec

from brim.chat.stop import StopMatcher
from brim.core.tokenizer import Tokenizer


class Piece(msgspec.Struct, frozen=True, gc=False):
    """Text that one token made certain, possibly none."""

    text: str
    stop_string: str | None = None
    """The stop string that this token completed; nothing follows it."""


_NOTHING = Piece("")

_HALF_SURROGATES = frozenset(bytes([0xED, byte]) for byte in range(0xA0, 0xC0))
"""No character begins like this, yet CPython's decoder waits for the third byte of a surrogate."""


class TextStream:
    """The text of one growing sequence.

    What `push` and `finish` return, joined, is the decoded text of all tokens cut at the first stop
    string, however the tokens split it: bytes that are not UTF-8 become U+FFFD as soon as they
    cannot become a character (so at most three bytes wait), and text that may be the beginning of
    a stop string waits until it is or is not.

    Args:
        tokenizer: Gives each token's bytes.
        stop: Stop strings, none of them empty; `chat.stop` says which one wins.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._piece_of = tokenizer.piece
        self._pending = b""
        self._stop = StopMatcher(tuple(stop)) if stop else None
        self._stopped = False

    @property
    def num_pending_bytes(self) -> int:
        """Bytes of an unfinished character, 0 to 3."""
        return len(self._pending)

    def push(self, token: int) -> Piece:
        """The text that `token` made certain.

        After a stop string was reported, everything is swallowed.
        """
        data = self._piece_of(token)
        if self._pending:
            data = self._pending + data
        text, num_decoded = utf_8_decode(data, "replace", False)
        self._pending = data[num_decoded:]
        if self._pending in _HALF_SURROGATES:
            text += "\ufffd\ufffd"
            self._pending = b""
        if not text:
            return _NOTHING
        if self._stop is None:
            return Piece(text)
        return self._match(self._stop, text)

    def _match(self, stop: StopMatcher, text: str) -> Piece:
        if self._stopped:
            return _NOTHING
        text, stop_string = stop.feed(text)
        self._stopped = stop_string is not None
        return Piece(text, stop_string)

    def finish(self) -> str:
        """What was held back, now that no token follows: an unfinished character is U+FFFD."""
        text = utf_8_decode(self._pending, "replace", True)[0]
        self._pending = b""
        if self._stop is None:
            return text
        if self._stopped:
            return ""
        piece = self._match(self._stop, text)
        return piece.text if piece.stop_string is not None else piece.text + self._stop.finish()
