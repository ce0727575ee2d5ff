"""Reads what a model directory says about text: tokenizer.json and the settings beside it.

Nothing is executed, whatever a directory holds: tokenizers that come as code are refused.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from brim.errors import ModelFileError
from brim.registry.bpe_vocabulary import MAX_TOKENIZER_BYTES
from brim.registry.config_reader import Config
from brim.registry.safetensors_header import read_json

OTHER_KINDS = (
    "tokenizer.model", "spiece.model", "tekken.json", "tiktoken.model", "*.tiktoken",
    "vocab.json", "vocab.txt",
)  # fmt: skip
"""Files of tokenizers that are converted to a tokenizer.json once, by whoever publishes a model."""


class AddedToken(msgspec.Struct, frozen=True):
    """A token that is looked for in the text before the model splits it."""

    id: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
    content: str
    special: bool = False


class Decoder(msgspec.Struct, frozen=True):
    """One step from tokens back to text, or a sequence of them."""

    type: str
    decoders: tuple["Decoder", ...] = ()

    @property
    def steps(self) -> frozenset[str]:
        """Types of all steps."""
        if not self.decoders:
            return frozenset({self.type})
        return frozenset().union(*(decoder.steps for decoder in self.decoders))


class TokenizerJson(msgspec.Struct, frozen=True):
    """What brim looks at in a tokenizer.json; the library reads the rest."""

    added_tokens: tuple[AddedToken, ...] | None = None
    decoder: Decoder | None = None


class TextSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Begin and end of text, as the files beside a tokenizer.json say."""

    bos: str | int | None
    """A token's text or its id."""
    eos: str | int | None
    eos_tokens: frozenset[int]
    """Ids that end a generation, by the model's and the generation's config."""
    add_bos: bool | None
    """None where no file says so: what the tokenizer's post-processor does."""


def read_tokenizer_json(model_dir: Path) -> tuple[bytes, TokenizerJson]:
    """A directory's tokenizer.json, as bytes for the library and as what brim looks at.

    Raises:
        ModelFileError: It is missing, too large, or damaged.
    """
    path = model_dir / "tokenizer.json"
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TOKENIZER_BYTES + 1)
    except FileNotFoundError as exc:
        raise ModelFileError(_missing(model_dir)) from exc
    except (OSError, ValueError) as exc:  # ValueError: a path with a null byte
        raise ModelFileError(f"{path} cannot be read ({exc}); download it again") from exc
    if len(data) > MAX_TOKENIZER_BYTES:
        raise damaged(path, f"it has over {MAX_TOKENIZER_BYTES:,} bytes")
    try:
        return data, msgspec.json.decode(data, type=TokenizerJson)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise damaged(path, str(exc)) from exc


def read_text_settings(model_dir: Path) -> TextSettings:
    """What tokenizer_config.json, config.json and generation_config.json say.

    The first has the last word on the texts of begin and end, even where it says that there is
    none, as transformers reads it; ids in the other two stand in where it is silent.

    Raises:
        ModelFileError: A file is damaged, or a value is of another kind.
    """
    texts = _optional(model_dir / "special_tokens_map.json")
    texts |= _optional(settings_path := model_dir / "tokenizer_config.json")
    config_path = model_dir / "config.json"
    config = Config(_optional(config_path), str(model_dir)).items
    generation_path = model_dir / "generation_config.json"
    generation = _optional(generation_path)
    model_eos = _ids(config_path, config, "eos_token_id")
    model_bos = _ids(config_path, config, "bos_token_id")
    add_bos = texts.get("add_bos_token")
    if add_bos is not None and not isinstance(add_bos, bool):
        raise damaged(settings_path, f"add_bos_token is {add_bos!r:.40}")
    return TextSettings(
        bos=_text(settings_path, texts, "bos_token", model_bos),
        eos=_text(settings_path, texts, "eos_token", model_eos),
        eos_tokens=frozenset(model_eos + _ids(generation_path, generation, "eos_token_id")),
        add_bos=add_bos,
    )


def damaged(path: Path, what: str) -> ModelFileError:
    """What to raise about a file that cannot be true."""
    return ModelFileError(f"{path} is damaged: {what:.200}; download it again")


def _missing(model_dir: Path) -> str:
    others = sorted(path.name for kind in OTHER_KINDS for path in model_dir.glob(kind))
    found = f" (only {', '.join(others[:3])}, which the mlx engine does not read)" if others else ""
    return (
        f"{model_dir} has no tokenizer.json{found}; get a copy of the model that has one, or the "
        "model as GGUF for --engine llamacpp"
    )


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _ids(path: Path, config: Mapping[str, Any], key: str) -> list[int]:
    value = config.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise damaged(path, f"{key} is {value!r:.40}, not a token's id")
    return ids


def _text(path: Path, texts: Mapping[str, Any], key: str, ids: list[int]) -> str | int | None:
    if key not in texts:
        return ids[0] if ids else None
    value = texts[key]
    text = value.get("content") if isinstance(value, Mapping) else value
    if text is not None and not isinstance(text, str):
        raise damaged(path, f"{key} is {value!r:.40}, not a token's text")
    return text
