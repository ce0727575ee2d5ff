"""The bytes behind one token, for the ways of decoding that language models use.

`tokenizers` gives text, which is too late for a token that holds half a character; here every token
has its bytes, whatever stands before it.
"""

import re
from pathlib import Path

from tokenizers import decoders

from brim.engine.mlx.tokenizer_files import Decoder
from brim.errors import ModelFileError

TEXT_STEPS = frozenset({"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"})
"""Steps in which a token's text depends at most on whether it is the first: the ways of
SentencePiece, written in several forms."""

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""A token of one byte, for what has no token of its own."""

_BEFORE = "a"
"""Stands before a token while it is decoded, because only the first one loses its space."""


def _byte_characters() -> dict[str, int]:
    """Byte-level text: bytes that print stand for themselves, the others for what follows 255.

    Source: GPT-2's encoder, whose table every byte-level vocabulary shares.
    """
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printing]
    table = {chr(byte): byte for byte in printing}
    return table | {chr(256 + number): byte for number, byte in enumerate(others)}


BYTE_OF = _byte_characters()


class TokenPieces:
    """Turns a token's text, as it stands in the vocabulary, into bytes.

    Args:
        decoder: What tokenizer.json says about decoding.
        library: The same, made by `tokenizers`.
        path: The file, for messages.

    Raises:
        ModelFileError: Tokens are decoded in a way that gives no bytes for each.
    """

    def __init__(
        self, decoder: Decoder | None, library: decoders.Decoder | None, path: Path
    ) -> None:
        steps = frozenset() if decoder is None else decoder.steps
        self._is_byte_level = steps - {"Fuse"} == {"ByteLevel"}
        if library is None or not (self._is_byte_level or steps <= TEXT_STEPS):
            way = "no decoder" if decoder is None else f"the decoder {' + '.join(sorted(steps))}"
            raise ModelFileError(
                f"{path} has {way:.80}, which the mlx engine does not read; take the model as "
                "GGUF for --engine llamacpp"
            )
        self._has_bytes = "ByteFallback" in steps
        self._decode = library.decode

    def of_token(self, text: str) -> bytes:
        """Bytes of a token of the vocabulary."""
        if self._is_byte_level:
            numbers = [BYTE_OF.get(character) for character in text]
            # As in the library, one foreign character means that the text is meant as it stands.
            known = [number for number in numbers if number is not None]
            return bytes(known) if len(known) == len(numbers) else text.encode()
        if self._has_bytes and (match := _BYTE.fullmatch(text)):
            return bytes.fromhex(match[1])
        return self._decode([_BEFORE, text]).removeprefix(_BEFORE).encode()

    def of_added(self, text: str) -> bytes:
        """Bytes of an added token, which is written as it is read: never as byte-level text."""
        return text.encode() if self._is_byte_level else self.of_token(text)
