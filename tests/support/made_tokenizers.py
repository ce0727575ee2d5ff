"""Small tokenizers in the manner of well-known families, made on the spot; and as GGUF files.

Trained on a few lines, so that they have merges, splits and missing characters like real ones.
"""

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n",
    "The quick brown fox's tail isn't over 12345 lazy dogs; they'll say: don't!\r\n\r\n",
    "Die schöne Müllerin, naïve café, Ελληνικά и русский, 日本語のテキスト, 😀😁 ok\t\tok  \n",
] * 4

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")

TEXTS = [
    "", " ", "a", "hello world", " a  b", "don't 12345 they'LL", "\n\n x", "  \n  x", "ok\t\tok  ",
    "naïve 日本語 😀 é", "z\xdf\x00\x7f\u200b\ufffd",
    "\u0627\u0644 \u0e01\u0e33 \U0001f468\u200d\U0001f469",
    "<s>hi</s>", "<|eot_id|><tool_call>x</tool_call>", "<|im_start|>user\nhi<|im_end|>\n",
    "<bos><end_of_turn>\n<unused0>", "<0x41><unk>", "\r\n\r\n\x0b\u2028",
]  # fmt: skip
"""What tokenizers differ on: spaces, line ends, digits, contractions, bytes, special tokens."""

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def llama3() -> Tokenizer:
    """Byte-level BPE, split by a regular expression, a begin token put before every text."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>"]
    made = _byte_level(LLAMA3_SPLIT, special, vocab_size=500)
    begin = [("<|begin_of_text|>", made.token_to_id("<|begin_of_text|>"))]
    template = processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=begin)
    made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return made


def qwen2() -> Tokenizer:
    """Byte-level BPE over composed characters, with an added token that is text."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|file_sep|>"]
    made = _byte_level(QWEN2_SPLIT, special, vocab_size=450)
    made.normalizer = normalizers.NFC()
    made.add_tokens([AddedToken("<tool_call>", normalized=False)])
    return made


def llama2() -> Tokenizer:
    """SentencePiece BPE: a space before every text, and bytes for what has no token."""
    normalizer = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    made = _sentence_piece(
        ["<unk>", "<s>", "</s>"], normalizers.Sequence(normalizer), _LLAMA2_STEPS
    )
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.post_processor = template
    return made


def gemma() -> Tokenizer:
    """The same without the space in front, and with runs of spaces and line ends as added text."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<end_of_turn>"]
    made = _sentence_piece(special, normalizers.Replace(" ", "▁"), _GEMMA_STEPS)
    made.add_tokens([AddedToken(text, normalized=False) for text in ("\n\n", "<unused0>")])
    made.add_tokens([AddedToken("▁▁", normalized=True)])
    return made


def mistral() -> Tokenizer:
    """The same with the space in front of a text only, not behind a special token."""
    made = _sentence_piece(["<unk>", "<s>", "</s>", "[INST]"], None, _LLAMA2_STEPS)
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.post_processor = template
    return made


def unigram() -> Tokenizer:
    """Unigram over words that begin with a mark, as T5 and ALBERT have it."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


FAMILIES: dict[str, Callable[[], Tokenizer]] = {
    "llama3": llama3, "qwen2": qwen2, "llama2": llama2, "gemma": gemma, "mistral": mistral,
    "unigram": unigram,
}  # fmt: skip

SETTINGS: dict[str, dict[str, Any]] = {
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "qwen2": {"bos_token": None, "eos_token": "<|im_end|>", "add_bos_token": False},
    "llama2": {
        "bos_token": {"__type": "AddedToken", "content": "<s>", "special": True},
        "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True},
    },
    "gemma": {"bos_token": "<bos>", "eos_token": "<eos>", "add_bos_token": True},
    "mistral": {"bos_token": "<s>", "eos_token": "</s>"},
    "unigram": {"eos_token": "</s>"},
}
"""Each family's tokenizer_config.json."""

END_TOKENS = {
    "llama3": {"<|eot_id|>", "<|end_of_text|>"},
    "qwen2": {"<|endoftext|>", "<|im_end|>", "<|file_sep|>"},
    "llama2": {"</s>"},
    "gemma": {"<eos>", "<end_of_turn>"},
    "mistral": {"</s>"},
    "unigram": {"</s>"},
}


@functools.cache
def tokenizer_json(family: str) -> str:
    """Trained once a session."""
    return FAMILIES[family]().to_str()


def write_tokenizer(directory: Path, family: str) -> Path:
    """A model directory's files about text."""
    (directory / "tokenizer.json").write_text(tokenizer_json(family), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(SETTINGS[family]))
    return directory


def write_gguf_vocabulary(path: Path, family: str) -> Path:
    """The same vocabulary as llama.cpp reads it, in a file without tensors."""
    made = json.loads(tokenizer_json(family))
    vocab: dict[str, int] = dict(made["model"]["vocab"])
    kinds = {
        i: gguf.TokenType.BYTE if t in BYTES else gguf.TokenType.NORMAL for t, i in vocab.items()
    }
    for added in made["added_tokens"]:
        vocab[added["content"]] = added["id"]
        is_control = added["special"]
        kinds[added["id"]] = gguf.TokenType.CONTROL if is_control else gguf.TokenType.USER_DEFINED
    tokens = sorted(vocab, key=vocab.__getitem__)
    is_sentence_piece = made["model"].get("byte_fallback")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama" if is_sentence_piece else "gpt2")
    if is_sentence_piece:
        # Spaces of added tokens are written as such, the others as the mark.
        user = gguf.TokenType.USER_DEFINED
        texts = [t.replace("▁", " ") if kinds[vocab[t]] == user else t for t in tokens]
        writer.add_token_list(texts)
        writer.add_token_scores([-float(number) for number in range(len(tokens))])
        writer.add_add_space_prefix(family == "llama2")
        writer.add_unk_token_id(vocab["<unk>"])
    else:
        writer.add_token_list(tokens)
        writer.add_tokenizer_pre({"llama3": "llama-bpe", "qwen2": "qwen2"}[family])
        writer.add_token_merges([" ".join(pair) for pair in made["model"]["merges"]])
    writer.add_token_types([int(kinds[vocab[token]]) for token in tokens])
    _add_special(writer, family, vocab)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def _add_special(writer: gguf.GGUFWriter, family: str, vocab: dict[str, int]) -> None:
    bos, eos = (_text(SETTINGS[family].get(key)) for key in ("bos_token", "eos_token"))
    writer.add_bos_token_id(vocab[bos or eos])
    writer.add_eos_token_id(vocab[eos])
    writer.add_add_bos_token(family != "qwen2")


def _text(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token or "")


_GEMMA_STEPS = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
_LLAMA2_STEPS = [*_GEMMA_STEPS, decoders.Strip(" ", 1, 0)]


def _byte_level(split: str, special: list[str], vocab_size: int) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    made.add_special_tokens(special)
    return made


def _sentence_piece(special: list[str], normalizer: Any, steps: list[Any]) -> Tokenizer:
    """Trained as BPE, then given the merges that SentencePiece's scores stand for."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    # Pieces do not go past a space, which begins them.
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trained.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=300, limit_alphabet=80, show_progress=False)
    )
    by_rank = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    # SentencePiece numbers what it merges first, then single characters.
    pieces = [p for p in by_rank if len(p) > 1] + [p for p in by_rank if len(p) == 1]
    vocab = {piece: number for number, piece in enumerate([*special, *BYTES, *pieces])}
    merges = [pair for piece in pieces for pair in _splits(piece, vocab)]
    model = models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    made = Tokenizer(model)
    if normalizer is not None:
        made.normalizer = normalizer
    made.decoder = decoders.Sequence(steps)
    made.add_special_tokens(special)
    return made


def _splits(piece: str, vocab: dict[str, int]) -> Iterator[tuple[str, str]]:
    for at in range(1, len(piece)):
        if piece[:at] in vocab and piece[at:] in vocab:
            yield piece[:at], piece[at:]
