"""Hugging Face's `tokenizers` behind core.tokenizer.Tokenizer.

Never through transformers, which is heavy and may run a model's own code.  What counts as an end of
generation, and which control tokens are shown, follows llama.cpp, so that one model behaves alike
on both engines.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import tokenizers

from brim.engine.mlx.token_pieces import TokenPieces
from brim.engine.mlx.tokenizer_files import (
    AddedToken,
    TextSettings,
    damaged,
    read_text_settings,
    read_tokenizer_json,
)
from brim.errors import BrimError, InvalidRequest, ModelFileError

END_NAMES = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
    "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
    "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>",
    "<\uff5cend▁of▁sentence\uff5c>", "[e~[",
    "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]",
    "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>",
})  # fmt: skip
"""Added tokens that end a generation by their names, because configs often leave them out.
Source: llama.cpp's llama-vocab.cpp, the list behind `llama_vocab_is_eog`."""

SHOWN_NAMES = frozenset({"<|channel|>", "<|message|>", "<|start|>", "<|constrain|>", "<|end|>"})
"""Special tokens that are part of the answer's text (gpt-oss writes its channels with them), unless
they end it.  Source: as above."""


class HfTokenizer:
    """The tokenizer of one model directory.

    `encode` holds a lock: whether special tokens are read in the text is state of the library's
    object, and a second one took 41 MB more at 150,000 tokens.  `piece` and `decode` never wait.

    Args:
        library: Made from tokenizer.json.
        added: Its added tokens.
        pieces: Its way from tokens to bytes.
        settings: Of the files beside it.
        begin: Tokens before every text.
        vocab_size: Rows of the model's logits.
    """

    def __init__(
        self,
        library: tokenizers.Tokenizer,
        added: Sequence[AddedToken],
        pieces: TokenPieces,
        settings: TextSettings,
        *,
        begin: Sequence[int],
        vocab_size: int,
    ) -> None:
        self.vocab_size = vocab_size
        self._library = library
        self._lock = threading.Lock()
        self._begin = begin
        self._decoder = pieces
        self._added = {token.id: token for token in added}
        names = {token.content: token.id for token in added}
        # Ids past the model's rows are left out everywhere: it can neither read nor write them.
        ends = _end_tokens(names, settings.eos_tokens.union(_ids(library, settings.eos)))
        self.eog_tokens = frozenset(token for token in ends if 0 <= token < vocab_size)
        self._control = _control_tokens(added, self.eog_tokens)
        # Pieces are looked up once a produced token: a cache filled as tokens are met.
        self._pieces: dict[int, bytes] = {}
        self.bos_piece = self._special_piece(settings.bos)
        self.eos_piece = self._special_piece(settings.eos)

    @classmethod
    def from_directory(cls, model_dir: Path, vocab_size: int | None = None) -> "HfTokenizer":
        """The tokenizer that a model directory holds.

        Args:
            model_dir: Has tokenizer.json; tokenizer_config.json, config.json and
                generation_config.json are read where they are there.
            vocab_size: Rows of the model's logits, which may be more than there are tokens (the
                rest have empty pieces) or a few less (those are never read); by default as many
                as there are tokens.

        Raises:
            ModelFileError: A file is missing, damaged, of another model, or of a kind that is not
                read; the message says which and what to take instead.
        """
        path = model_dir / "tokenizer.json"
        data, parsed = read_tokenizer_json(model_dir)
        settings = read_text_settings(model_dir)
        with _as_error(lambda reason: damaged(path, reason)):
            library = tokenizers.Tokenizer.from_buffer(data)
            # Left over from training in some files: they would cut prompts, or lengthen them.
            library.no_truncation()
            library.no_padding()
            begin = _begin_tokens(library, settings)
        added = parsed.added_tokens or ()
        if vocab_size is None:
            vocab_size = max(library.get_vocab().values(), default=-1) + 1
        num_plain = library.get_vocab_size(with_added_tokens=False) - len(added)
        if num_plain > vocab_size:
            raise ModelFileError(
                f"{path} has {num_plain} tokens, and the model only {vocab_size}; the two belong "
                "to different models: download both again"
            )
        pieces = TokenPieces(parsed.decoder, library.decoder, path)
        return cls(library, added, pieces, settings, begin=begin, vocab_size=vocab_size)

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        tokens = self._encode(_without_surrogates(text), parse_special)
        if add_special:
            tokens = [*self._begin, *tokens]
        if tokens and max(tokens) >= self.vocab_size:
            beyond = next(token for token in tokens if token >= self.vocab_size)
            raise InvalidRequest(
                f"the text holds {self._library.id_to_token(beyond)!r:.80}, a token that this "
                "model has no weights for; leave it out"
            )
        return tokens

    def piece(self, token: int, *, special: bool = False) -> bytes:
        if special and token in self._control:
            return self._fetch(token)
        piece = self._pieces.get(token)
        if piece is None:
            piece = b"" if token in self._control else self._fetch(token)
            self._pieces[token] = piece
        return piece

    def decode(self, tokens: Sequence[int]) -> str:
        return b"".join(self.piece(token) for token in tokens).decode("utf-8", "replace")

    def _encode(self, text: str, parse_special: bool) -> list[int]:
        library = self._library
        with self._lock, _as_error(_cannot_split):
            library.encode_special_tokens = not parse_special
            # Without offsets it takes a fifth of the memory and a sixth of the time: 0.5 s instead
            # of 3.0 for 500,000 emoji.  Special tokens are added here, not by the library.
            return library.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def _fetch(self, token: int) -> bytes:
        """Bytes of any token; none for a row of the logits that stands for no token."""
        if token in self._added:
            return self._decoder.of_added(self._added[token].content)
        text = self._library.id_to_token(token)
        return b"" if text is None else self._decoder.of_token(text)

    def _special_piece(self, name: str | int | None) -> str:
        data = b"".join(self._fetch(token) for token in _ids(self._library, name))
        return data.decode("utf-8", "replace")


_PROBE = "a"
"""A text in every vocabulary, to see what is put around it."""


def _begin_tokens(library: tokenizers.Tokenizer, settings: TextSettings) -> list[int]:
    """What stands before every text: what the post-processor puts there, if the settings let it.

    What it puts behind (an end token) is for training: nothing would be left to generate.
    """
    if settings.add_bos is False:
        return []
    with_special = library.encode(_PROBE).ids
    plain = library.encode(_PROBE, add_special_tokens=False).ids
    ends = range(len(with_special) + 1)
    at = next((at for at in ends if plain and with_special[at:][: len(plain)] == plain), 0)
    return with_special[:at] or (_ids(library, settings.bos) if settings.add_bos else [])


def _ids(library: tokenizers.Tokenizer, name: str | int | None) -> list[int]:
    """The id of a token given by text or id; none where there is no such token."""
    token = library.token_to_id(name) if isinstance(name, str) else name
    return [] if token is None or token < 0 else [token]


def _end_tokens(names: dict[str, int], configured: frozenset[int]) -> frozenset[int]:
    """Ids that end a generation, by config and by name.  Source: as END_NAMES."""
    ends = END_NAMES & names.keys()
    if {"<|return|>", "<|call|>"} <= ends or (
        {"<|call|>", "<|calls|>"} & ends and "<|flush|>" in ends
    ):
        ends -= {"<|end|>"}  # there it ends a message, and the turn goes on
    if "<|tool_response>" in ends:
        ends -= {"</s>"}  # an HTML tag there
    return configured | {names[name] for name in ends}


def _control_tokens(added: Iterable[AddedToken], ends: frozenset[int]) -> frozenset[int]:
    """Tokens that are no text: special ones, but for those that are shown, and every end."""
    return ends | {t.id for t in added if t.special and t.content not in SHOWN_NAMES}


def _without_surrogates(text: str) -> str:
    """Any string as valid UTF-8; halves of surrogate pairs become question marks."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _cannot_split(reason: str) -> BrimError:
    return InvalidRequest(
        f"this model's tokenizer cannot split the text ({reason:.200}); break it up or change it"
    )


@contextmanager
def _as_error(describe: Callable[[str], BrimError]) -> Iterator[None]:
    """Turn what the library raises into one sentence.

    Its panics are no `Exception` (pyo3's class derives from BaseException), so that a regular
    expression of a model that gives up on a client's text would end the worker.
    """
    try:
        yield
    except BaseException as exc:
        if not isinstance(exc, Exception) and type(exc).__name__ != "PanicException":
            raise
        raise describe(" ".join(str(exc).split())) from exc
