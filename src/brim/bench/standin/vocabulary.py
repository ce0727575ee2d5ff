"""A synthetic byte-level BPE tokenizer of any size, for GGUF files and for checkpoints.

It encodes any text as single bytes and decodes whatever a random model draws.  Tables cost what a
real vocabulary's cost: as many tokens, and as many merges as there are tokens beyond the bytes.
"""

import itertools
import string
from collections.abc import Iterator
from typing import Any

from brim.bench.standin.blueprint import Pair, count_pair, counts_pair, flag_pair, text_pair
from brim.bench.standin.blueprint import texts_pair as texts
from brim.errors import InvalidRequest

BEGIN, END = "<|begin|>", "<|end|>"

_NORMAL, _CONTROL = 1, 3

NUM_BYTES = 256

MIN_VOCAB_SIZE = NUM_BYTES + 2
"""Every byte, a token that begins a text and one that ends it."""

CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
"""Enough for a server to take chats: a stand-in's answers have no meaning anyway."""


def byte_letters() -> list[str]:
    """The letter that stands for each byte in byte-level BPE, by the byte's value.

    Printable bytes stand for themselves, the others are moved above U+0100 in order.

    Example:
        >>> byte_letters()[ord("A")], byte_letters()[ord(" ")]
        ('A', 'Ġ')
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = itertools.count(0x100)
    return [chr(byte) if byte in printable else chr(next(moved)) for byte in range(NUM_BYTES)]


def filler_words() -> Iterator[str]:
    """Distinct words with a leading space, as the byte-level alphabet writes it, of 5 letters."""
    number = 0
    while True:
        letters = (chr(ord("a") + number // 26**place % 26) for place in range(5))
        yield "\u0120" + "".join(letters)
        number += 1


def tokenizer_pairs(vocab_size: int) -> list[Pair]:
    """The `tokenizer.*` pairs of a vocabulary with `vocab_size` tokens.

    Raises:
        InvalidRequest: It is smaller than the bytes and the two special tokens.
    """
    _check_size(vocab_size)
    fillers = list(itertools.islice(filler_words(), vocab_size - MIN_VOCAB_SIZE))
    tokens = [*byte_letters(), *fillers, BEGIN, END]
    # No merge makes the left part of another one, so none ever applies: text stays bytes, and
    # fillers are drawn but never encoded.
    merges = [f"{word[:-1]} {word[-1]}" for word in fillers] or ["a b"]
    types = [_NORMAL] * (vocab_size - 2) + [_CONTROL] * 2
    return [
        text_pair("tokenizer.ggml.model", "gpt2"),
        text_pair("tokenizer.ggml.pre", "gpt-2"),
        texts("tokenizer.ggml.tokens", tokens),
        counts_pair("tokenizer.ggml.token_type", types),
        texts("tokenizer.ggml.merges", merges),
        count_pair("tokenizer.ggml.bos_token_id", vocab_size - 2),
        count_pair("tokenizer.ggml.eos_token_id", vocab_size - 1),
        flag_pair("tokenizer.ggml.add_bos_token", False),
        text_pair("tokenizer.chat_template", CHAT_TEMPLATE),
    ]


def _check_size(vocab_size: int) -> None:
    if vocab_size < MIN_VOCAB_SIZE:
        raise InvalidRequest(
            f"a stand-in's vocabulary has at least {MIN_VOCAB_SIZE} tokens, not {vocab_size}"
        )


def letter_words() -> Iterator[str]:
    """All words of two and more small letters, the short ones first.

    Each is a shorter one and a letter, so that a merge can make it: checkpoints' tokenizers take
    no token that nothing makes.

    Example:
        >>> words = letter_words()
        >>> next(words), next(words)
        ('aa', 'ab')
    """
    for length in itertools.count(2):
        for letters in itertools.product(string.ascii_lowercase, repeat=length):
            yield "".join(letters)


def tokenizer_json(vocab_size: int) -> dict[str, Any]:
    """A checkpoint's tokenizer.json with `vocab_size` tokens.

    Raises:
        InvalidRequest: It is smaller than the bytes and the two special tokens.
    """
    _check_size(vocab_size)
    words = list(itertools.islice(letter_words(), vocab_size - MIN_VOCAB_SIZE))
    tokens = [*byte_letters(), *words]
    split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": len(tokens) + place, "content": text, "special": True, "normalized": False,
                "single_word": False, "lstrip": False, "rstrip": False,
            }
            for place, text in enumerate((BEGIN, END))
        ],
        "normalizer": None,
        "pre_tokenizer": split | {"use_regex": True},
        "post_processor": None,
        "decoder": split | {"use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": [[word[:-1], word[-1]] for word in words],
        },
    }  # fmt: skip


def tokenizer_config() -> dict[str, Any]:
    """A checkpoint's tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "chat_template": CHAT_TEMPLATE,
    }
