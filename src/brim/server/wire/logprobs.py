"""Log-probabilities in OpenAI's two shapes."""

from codecs import utf_8_decode
from collections.abc import Iterable

from brim.core.answer import TokenLogprob
from brim.server.wire.responses import ChatLogprob, ChatLogprobs, CompletionLogprobs, TopLogprob

LOWEST_LOGPROB = -9999.0
"""OpenAI's number for "practically impossible"; JSON has no -Infinity."""


def token_text(piece: bytes) -> str:
    r"""A token's text; bytes that are no whole character are written as `\xNN`, as OpenAI does.

    Example:
        >>> token_text(b"ab"), token_text(b"\xf0\x9f")
        ('ab', '\\xf0\\x9f')
    """
    return piece.decode("utf-8", "backslashreplace")


def finite(logprob: float) -> float:
    """The value itself, or LOWEST_LOGPROB for -inf, NaN and anything below."""
    return logprob if logprob > LOWEST_LOGPROB else LOWEST_LOGPROB


def chat_logprobs(entries: Iterable[TokenLogprob]) -> ChatLogprobs:
    """The `logprobs` object of a chat choice or chunk."""
    return ChatLogprobs(
        [
            ChatLogprob(
                token_text(entry.piece),
                finite(entry.logprob),
                list(entry.piece),
                [
                    TopLogprob(token_text(piece), finite(logprob), list(piece))
                    for _, piece, logprob in entry.top
                ],
            )
            for entry in entries
        ]
    )


class CompletionOffsets:
    """Builds the `logprobs` objects of one plain completion, which count characters as they go.

    Args:
        has_top: Whether alternatives were asked for; without, `top_logprobs` is null.
    """

    def __init__(self, *, has_top: bool) -> None:
        self._has_top = has_top
        self._offset = 0
        self._pending = b""

    def logprobs(self, entries: Iterable[TokenLogprob]) -> CompletionLogprobs:
        """The object for the next tokens of this choice."""
        entries = tuple(entries)
        return CompletionLogprobs(
            [token_text(entry.piece) for entry in entries],
            [finite(entry.logprob) for entry in entries],
            [self._top(entry) for entry in entries] if self._has_top else None,
            [self._advance(entry.piece) for entry in entries],
        )

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        return {token_text(piece): finite(logprob) for _, piece, logprob in entry.top}

    def _advance(self, piece: bytes) -> int:
        """Offset of this token: characters that were complete before it."""
        offset = self._offset
        data = self._pending + piece
        text, num_decoded = utf_8_decode(data, "replace", False)
        self._pending = data[num_decoded:]
        self._offset += len(text)
        return offset
