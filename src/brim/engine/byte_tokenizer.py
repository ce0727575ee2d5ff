"""The toy engine's tokenizer: no vocabulary to load, and every text has one encoding."""

from collections.abc import Sequence

SPECIAL = (b"<|bos|>", b"<|eos|>", b"<|im_start|>", b"<|im_end|>")
VOCAB_SIZE = 260


class ByteTokenizer:
    """Bytes are tokens 0 to 255; four special tokens follow.  Implements core.tokenizer."""

    BOS, EOS, IM_START, IM_END = range(256, 260)
    vocab_size = VOCAB_SIZE
    eog_tokens = frozenset({EOS, IM_END})
    bos_piece, eos_piece = "<|bos|>", "<|eos|>"

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        tokens = list(text.encode("utf-8", "replace"))
        for token, name in enumerate(SPECIAL if parse_special else (), start=256):
            while (at := bytes(t if t < 256 else 0 for t in tokens).find(name)) >= 0:
                tokens[at : at + len(name)] = [token]
        return [self.BOS, *tokens] if add_special else tokens

    def piece(self, token: int, *, special: bool = False) -> bytes:
        return bytes([token]) if token < 256 else SPECIAL[token - 256] if special else b""

    def decode(self, tokens: Sequence[int]) -> str:
        return b"".join(self.piece(token) for token in tokens).decode("utf-8", "replace")
