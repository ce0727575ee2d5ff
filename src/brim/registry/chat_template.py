"""Finds the chat template of a safetensors directory: the source alone, which `chat` compiles."""

from pathlib import Path
from typing import Any

from brim.errors import ModelFileError
from brim.registry.safetensors_header import read_json

MAX_TEMPLATE_BYTES = 1024 * 1024
"""What is compiled (256 Ki characters at most) has no more; the longest in use have 20,000."""

DEFAULT = "default"
"""Which of several named templates is meant; others ('tool_use', 'rag') are for what they say."""


def read_chat_template(model_dir: Path) -> str | None:
    """The chat template of a model directory; None where it has none.

    It stands in a file of its own (newer checkpoints), in chat_template.json (models that also
    see), or in tokenizer_config.json, as one text or as several with names.  The first that is
    there counts, as in transformers.

    Raises:
        ModelFileError: A file is damaged or too large.
    """
    own_file = model_dir / "chat_template.jinja"
    if own_file.is_file():
        return _read_source(own_file)
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = model_dir / name
        if path.is_file() and (source := _pick(read_json(path).get("chat_template"))) is not None:
            return _checked(path, source)
    return None


def _read_source(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TEMPLATE_BYTES + 1)
        # As text files are read everywhere: a template's line ends become part of the prompt.
        source = data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except (OSError, UnicodeDecodeError) as exc:
        raise ModelFileError(f"{path} cannot be read ({exc!s:.100}); download it again") from exc
    return _checked(path, source)


def _checked(path: Path, source: str) -> str:
    if len(source) > MAX_TEMPLATE_BYTES:
        raise ModelFileError(
            f"{path} has a chat template of over {MAX_TEMPLATE_BYTES} characters, which is none; "
            "download it again"
        )
    return source


def _pick(template: Any) -> str | None:
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get(DEFAULT)
    return template if isinstance(template, str) else None
