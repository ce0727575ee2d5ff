"""The text <-> tokens protocol: two tokenizers (llama.cpp's, Hugging Face's) behind one shape."""

from collections.abc import Sequence
from typing import Protocol


class Tokenizer(Protocol):
    """Encodes text and gives each token's bytes; safe to call from a second thread."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids; valid ids are 0 up to, not including, this."""
        ...

    @property
    def eog_tokens(self) -> frozenset[int]:
        """Tokens that end a generation (end of text, end of turn, ...)."""
        ...

    @property
    def bos_piece(self) -> str:
        """Text of the begin token, empty where the model has none; for chat templates."""
        ...

    @property
    def eos_piece(self) -> str:
        """Text of the end token, empty where the model has none; for chat templates."""
        ...

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of `text`.

        Args:
            text: Any string.
            add_special: Add the begin token where the model is configured for one.
            parse_special: Read special tokens written in the text (`<|im_end|>`) as tokens.
        """
        ...

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """Bytes of one token: possibly part of a character; empty for control tokens.

        Args:
            token: A valid id.
            special: Give the text of control tokens as well.
        """
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of all tokens; invalid UTF-8 becomes U+FFFD."""
        ...
