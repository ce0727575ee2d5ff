"""llama.cpp's tokenizer behind core.tokenizer.Tokenizer; its functions are thread-safe."""

import ctypes
import re
from collections.abc import Sequence
from typing import Any

from brim.engine.llamacpp.binding import lib
from brim.errors import EngineError, InvalidRequest

_PIECE_BYTES = 64
"""Longer than nearly any token's text; others are fetched again with the size llama.cpp asks for.
Small, because the buffer is made and zeroed once for each token that is met for the first time."""


MAX_RUN_CHARACTERS = 500_000
"""Many vocabularies are split by std::regex, which recurses once for each character of a word.

At 260 to 520 bytes of stack a character this fits the 512 MiB stack of the worker's reader thread.
"""

_LONG_RUN = re.compile(rf"\S{{{MAX_RUN_CHARACTERS}}}|\s{{{MAX_RUN_CHARACTERS}}}")


class LlamaTokenizer:
    """Vocabulary of one loaded model; valid as long as the model is."""

    def __init__(self, vocab: Any) -> None:
        self._vocab = vocab
        self.vocab_size: int = lib.llama_vocab_n_tokens(vocab)
        is_eog = lib.llama_vocab_is_eog
        self.eog_tokens = frozenset(t for t in range(self.vocab_size) if is_eog(vocab, t))
        # Pieces are looked up once a produced token: a cache filled as tokens are met.
        self._pieces: list[bytes | None] = [None] * self.vocab_size
        self.bos_piece = self._special_piece(lib.llama_vocab_bos(vocab))
        self.eos_piece = self._special_piece(lib.llama_vocab_eos(vocab))

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        data = text.encode("utf-8", "replace")
        if len(data) > MAX_RUN_CHARACTERS and _LONG_RUN.search(text):
            raise InvalidRequest(
                f"the text has over {MAX_RUN_CHARACTERS:,} characters in a row without (or of "
                "nothing but) white space, which llama.cpp's tokenizer cannot split; break it up"
            )
        # No token is shorter than a byte, and special tokens add a few.
        capacity = len(data) + 16
        buffer = (ctypes.c_int32 * capacity)()
        count = lib.llama_tokenize(
            self._vocab, data, len(data), buffer, capacity, add_special, parse_special
        )
        if count < 0:
            raise EngineError(f"llama.cpp could not tokenize a text of {len(data)} bytes")
        return buffer[:count]

    def piece(self, token: int, *, special: bool = False) -> bytes:
        if special:
            return self._fetch(token, special=True)
        piece = self._pieces[token]
        if piece is None:
            piece = self._pieces[token] = self._fetch(token, special=False)
        return piece

    def decode(self, tokens: Sequence[int]) -> str:
        return b"".join(self.piece(token) for token in tokens).decode("utf-8", "replace")

    def _special_piece(self, token: int) -> str:
        return "" if token < 0 else self._fetch(token, special=True).decode("utf-8", "replace")

    def _fetch(self, token: int, *, special: bool) -> bytes:
        size = _PIECE_BYTES
        for _ in range(2):
            buffer = ctypes.create_string_buffer(size)
            count = lib.llama_token_to_piece(self._vocab, token, buffer, size, 0, special)
            if count >= 0:
                return buffer.raw[:count]
            size = -count
        raise EngineError(f"llama.cpp gave no text for token {token}")
