"""From positions in a prompt's text to positions in its tokens that hold in longer prompts too."""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

from brim.core.tokenizer import Tokenizer

MAX_BACK_BYTES = 12
"""How far before a position the token may end that stands for it: over a role and a line end
(`assistant`, `developer`), and hardly over a system prompt."""

HEADER_TOKENS = 12
"""Most tokens between the end of a turn and the next one's words: `<|start_header_id|>`, a role of
a few tokens, `<|end_header_id|>`, line ends, and a channel's name."""


_SPACE = re.compile(rb"\s+")


class PieceCache(dict[int, bytes]):
    """Bytes of each token, control tokens spelled out; fetched as they are met."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self._controls: dict[int, bool] = {}

    def __missing__(self, token: int) -> bytes:
        piece = self[token] = self.tokenizer.piece(token, special=True)
        return piece

    def is_control(self, token: int) -> bool:
        """Whether the tokenizer splits any text there.

        What stands on one side of a control token becomes the same tokens whatever stands on the
        other.
        """
        known = self._controls.get(token)
        if known is None:
            known = bool(self[token]) and not self.tokenizer.piece(token)
            self._controls[token] = known
        return known


class TokenEdges:
    """Where each token of a prompt begins in its text.

    Args:
        pieces: Of the tokenizer that made `tokens`.
        tokens: The whole prompt.
        text: What they were made from.
    """

    def __init__(self, pieces: PieceCache, tokens: Sequence[int], text: str) -> None:
        self._pieces = pieces
        self._tokens = tokens
        self._text = text
        self._edges = _edges(text.encode("utf-8", "replace"), [pieces[t] for t in tokens])

    @property
    def is_known(self) -> bool:
        """Whether the tokens could be laid over the text: not where the tokenizer changes it."""
        return self._edges is not None

    def settled(self, positions: Sequence[int]) -> Iterator[int | None]:
        """For each position in the text, tokens before it that do not depend on what follows.

        Args:
            positions: In characters, rising.

        Yields:
            The number of tokens, at most `MAX_BACK_BYTES` short of the position; None where no
            control token is near.
        """
        for at in self._byte_positions(positions):
            yield self._near_control(at, 1)

    def settled_behind(self, position: int) -> int | None:
        """As `settled`, where also what begins at the position may be a control token or not."""
        (at,) = self._byte_positions([position])
        return self._near_control(at, 0)

    def _near_control(self, at: int, num_ahead: int) -> int | None:
        """The last token edge up to a byte that has a control token behind it, or ahead of it."""
        edges = self._edges
        if edges is None:
            return None
        index = bisect_right(edges, at) - 1
        while index > 0 and at - edges[index] <= MAX_BACK_BYTES:
            beside = self._tokens[index - 1 : index + num_ahead]
            if any(map(self._pieces.is_control, beside)):
                return index
            index -= 1
        return None

    def turn_starts(self, positions: Sequence[int]) -> tuple[int, ...]:
        """For the position of each turn's own words, the token at which the turn begins.

        A turn begins with the marks and the role before its words.
        """
        if self._edges is None or not positions:
            return ()
        ends = [bisect_right(self._edges, at) - 1 for at in self._byte_positions(positions)]
        starts = [0]
        for index in ends[1:]:
            index = min(index, len(self._tokens))
            starts.append(max(starts[-1], self._header_start(index, starts[-1])))
        return tuple(starts)

    def _header_start(self, index: int, floor: int) -> int:
        """The first control token after the last turn's end token, or what comes nearest to it."""
        ends = self._pieces.tokenizer.eog_tokens
        controls: list[int] = []
        for at in range(index - 1, max(floor, index - HEADER_TOKENS) - 1, -1):
            token = self._tokens[at]
            if token in ends:
                return controls[-1] if controls else at + 1
            if self._pieces.is_control(token):
                controls.append(at)
        return controls[0] if controls else index

    def _byte_positions(self, positions: Sequence[int]) -> Iterator[int]:
        """Positions in the text's UTF-8."""
        done = num_bytes = 0
        for position in positions:
            num_bytes += len(self._text[done:position].encode("utf-8", "replace"))
            done = position
            yield num_bytes


def _edges(text: bytes, pieces: list[bytes]) -> list[int] | None:
    """Byte at which each piece begins in the text, and where the last one ends.

    Beyond the text there may be a begin token, and the spaces that SentencePiece puts before a text
    and behind control tokens; and some control tokens swallow the white space around them.
    """
    joined = b"".join(pieces)
    num_before = len(joined) - len(text)
    if num_before >= 0 and joined.endswith(text):
        ends = accumulate(map(len, pieces), initial=-num_before)
        return [max(0, end) for end in ends]
    return _tolerant_edges(text, pieces)


def _tolerant_edges(text: bytes, pieces: list[bytes]) -> list[int] | None:
    edges, at = [0], 0
    for piece in pieces:
        if not text.startswith(piece, at) and piece.startswith(b" "):
            piece = piece[1:]
        if not text.startswith(piece, at):
            behind = _SPACE.match(text, at)
            if behind is not None and text.startswith(piece, behind.end()):
                edges[-1] = at = behind.end()
            elif at:
                return None
            else:
                piece = b""
        at += len(piece)
        edges.append(at)
    return edges if not text[at:].strip() else None
