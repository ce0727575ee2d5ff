"""Reads a Hugging Face tokenizer.json as the vocabulary that a GGUF file holds.

Only byte-level BPE with GPT-2's way of splitting text: a GGUF file does not say how to split, it
names a way that llama.cpp has built in, and a wrong name gives wrong tokens without an error.
"""

from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import Any

import msgspec

from brim.errors import ModelFileError, Unsupported
from brim.registry.chat_template import read_chat_template
from brim.registry.safetensors_header import read_json

MAX_TOKENIZER_BYTES = 128 * 1024 * 1024
"""Of a tokenizer.json; those with 262,144 tokens have 33 MB."""


class TokenType(IntEnum):
    """GGUF's numbers for what a token is."""

    NORMAL = 1
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5


class Vocabulary(msgspec.Struct, frozen=True, kw_only=True):
    """Everything about text that goes into a GGUF file."""

    tokens: tuple[str, ...]
    """By id; byte-level text as in tokenizer.json."""
    types: tuple[TokenType, ...]
    merges: tuple[str, ...]
    pre_tokenizer: str
    """llama.cpp's name for the way text is split."""
    bos: int | None
    eos: int | None
    eot: int | None
    """Ends a turn of a chat; None where nothing says so."""
    chat_template: str | None


class _AddedToken(msgspec.Struct):
    id: int
    content: str
    special: bool = False


class _Model(msgspec.Struct):
    """The `model` of a tokenizer.json; a value of the last seven would change what tokens come."""

    vocab: dict[str, int]
    merges: list[str | list[str]]
    byte_fallback: bool | None = None
    ignore_merges: bool | None = None
    fuse_unk: bool | None = None
    dropout: float | None = None
    unk_token: str | None = None
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None


class _Tokenizer(msgspec.Struct):
    """What matters of a tokenizer.json."""

    model: _Model
    added_tokens: list[_AddedToken] = []
    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None
    post_processor: dict[str, Any] | None = None


def read_vocabulary(model_dir: Path, vocab_size: int) -> Vocabulary:
    """The vocabulary of a model directory, padded to `vocab_size` as the embeddings are.

    Raises:
        ModelFileError: A file is missing or contradicts itself.
        Unsupported: The tokenizer is of a kind that brim cannot convert; the message names it.
    """
    path, settings_path = model_dir / "tokenizer.json", model_dir / "tokenizer_config.json"
    tokenizer = _read(path)
    settings = read_json(settings_path) if settings_path.exists() else {}
    if settings.get("add_bos_token"):
        raise Unsupported(f"{settings_path} sets add_bos_token, which brim does not convert")
    tokens, types = _tokens(path, tokenizer, vocab_size)
    ids = {token: number for number, token in enumerate(tokens)}
    template = read_chat_template(model_dir)
    eos = _special(settings, "eos_token", ids)
    ends_turn = template is not None and eos is not None and tokens[eos] in template
    return Vocabulary(
        tokens=tokens,
        types=types,
        merges=tuple(_merges(path, tokenizer.model.merges)),
        pre_tokenizer="gpt-2",
        bos=_special(settings, "bos_token", ids),
        eos=eos,
        eot=eos if ends_turn else None,
        chat_template=template,
    )


def _read(path: Path) -> _Tokenizer:
    """A tokenizer whose tokens llama.cpp would give as well, or an error."""
    found = read_json(path, max_bytes=MAX_TOKENIZER_BYTES)
    kind = model.get("type") if isinstance(model := found.get("model"), dict) else None
    if kind != "BPE":
        raise Unsupported(f"{path}: brim converts BPE tokenizers, this one is {kind}")
    try:
        tokenizer = msgspec.convert(found, _Tokenizer)
    except msgspec.ValidationError as exc:
        raise ModelFileError(f"{path} is damaged: {exc}; download it again") from exc
    for setting in _Model.__struct_fields__[2:]:
        if getattr(tokenizer.model, setting):
            raise Unsupported(f"{path}: brim does not convert BPE with {setting}")
    if tokenizer.normalizer is not None:
        normalizer = tokenizer.normalizer.get("type")
        raise Unsupported(f"{path}: brim does not convert the normalizer {normalizer}")
    after = (tokenizer.post_processor or {}).get("type", "ByteLevel")
    if after != "ByteLevel":  # that one moves offsets only
        raise Unsupported(f"{path}: brim does not convert the post-processor {after}")
    split = tokenizer.pre_tokenizer or {}
    as_gpt2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    if {"use_regex": True, **split, "trim_offsets": None} != {**as_gpt2, "trim_offsets": None}:
        raise Unsupported(
            f"{path}: brim converts tokenizers that split text as GPT-2 does "
            f"(ByteLevel, use_regex, no prefix space), not {split.get('type')}"
        )
    return tokenizer


def _tokens(
    path: Path, tokenizer: _Tokenizer, vocab_size: int
) -> tuple[tuple[str, ...], tuple[TokenType, ...]]:
    by_id = {number: text for text, number in tokenizer.model.vocab.items()}
    kinds = dict.fromkeys(by_id, TokenType.NORMAL)
    for added in tokenizer.added_tokens:
        by_id[added.id] = added.content
        kinds[added.id] = TokenType.CONTROL if added.special else TokenType.USER_DEFINED
    if not by_id or min(by_id) < 0 or max(by_id) >= vocab_size:
        raise ModelFileError(
            f"{path} numbers its tokens up to {max(by_id, default=None)}, and config.json says "
            f"that there are {vocab_size}; the two belong to different models"
        )
    padded = range(vocab_size)
    tokens = tuple(by_id.get(number, f"[PAD{number}]") for number in padded)
    if len(set(tokens)) != vocab_size:
        raise ModelFileError(f"{path} gives two tokens the same text; download it again")
    return tokens, tuple(kinds.get(number, TokenType.UNUSED) for number in padded)


def _merges(path: Path, merges: list[str | list[str]]) -> Iterator[str]:
    """Pairs as GGUF writes them: joined by the one character that byte-level text never holds."""
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if len(pair) != 2 or any(" " in part for part in pair):
            raise Unsupported(f"{path}: the merge {merge!r} cannot be written into a GGUF file")
        yield " ".join(pair)


def _special(settings: dict[str, Any], key: str, ids: dict[str, int]) -> int | None:
    token = settings.get(key)
    text = token.get("content") if isinstance(token, dict) else token
    return ids.get(text) if isinstance(text, str) else None
