"""The small trained model's own tokenizer, through the library that made it."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers

MODEL = Path(__file__).parents[2] / "models" / "pystd-1m"


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE writes printable Latin-1 bytes as themselves and the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + i): byte for i, byte in enumerate(others)}


class BpeTokenizer:
    """`core.tokenizer.Tokenizer` over a byte-level `tokenizer.json`."""

    bos_piece = "<|endoftext|>"
    eos_piece = "<|im_end|>"

    def __init__(self, path: Path) -> None:
        self._hub = tokenizers.Tokenizer.from_file(str(path))
        bytes_of = _byte_of_character()
        special = self._hub.get_added_tokens_decoder()
        self.eog_tokens = frozenset(special)
        self._pieces = [
            b""
            if token in special
            else bytes(bytes_of[character] for character in self._hub.id_to_token(token) or "")
            for token in range(self._hub.get_vocab_size())
        ]

    @property
    def vocab_size(self) -> int:
        return len(self._pieces)

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        ids: list[int] = self._hub.encode(text, add_special_tokens=add_special).ids
        return ids

    def piece(self, token: int, *, special: bool = False) -> bytes:
        return self._pieces[token]

    def decode(self, tokens: Sequence[int]) -> str:
        return b"".join(self._pieces[token] for token in tokens).decode("utf-8", "replace")


@pytest.fixture(scope="session")
def tokenizer() -> BpeTokenizer:
    return BpeTokenizer(MODEL / "tokenizer.json")


@pytest.fixture(scope="session")
def template_source() -> str:
    source: str = json.loads((MODEL / "tokenizer_config.json").read_text())["chat_template"]
    return source
