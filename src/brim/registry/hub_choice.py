"""Which files of a repository are meant: a GGUF quant by its name, or a checkpoint's own files.

Quants are found by file name, as publishers write them.
"""

import re
from collections.abc import Iterable, Sequence

import msgspec

from brim.errors import InvalidRequest, ModelFileError, NotFound
from brim.registry.describe import SPLIT_NAME
from brim.registry.safetensors_header import INDEX, SINGLE, has_safetensors

PREFERRED_QUANTS = ("Q4_K_M", "Q8_0", "F16")
"""What a repository is asked for when no quant is named: the field's usual choice for chat, then
what loses least."""

NOT_MODELS = re.compile(r"mmproj|imatrix", re.IGNORECASE)
"""GGUF files that lie beside language models and are none."""


CHECKPOINT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""What goes with a checkpoint's weights, where it is there: never code, never another format."""

MAX_TEXT_FILE_BYTES = 128 << 20
"""Of one of them; the tokenizers with the largest vocabularies have 35 MB."""


class HubFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file of a repository, as the hub lists it."""

    name: str
    """Path inside the repository."""
    size_bytes: int | None = None
    sha256: str | None = None
    """None for a file that is not in LFS storage."""


def has_gguf(files: Iterable[HubFile]) -> bool:
    """Whether a GGUF model is among them; what only goes with one (a projector) does not count."""
    return bool(_groups(files))


def has_checkpoint(files: Iterable[HubFile]) -> bool:
    """Whether a safetensors model with its config is among them, in the repository's root."""
    names = {file.name for file in files}
    return "config.json" in names and has_safetensors(names)


def checkpoint_text_files(files: Iterable[HubFile], reference: str) -> list[HubFile]:
    """What describes a checkpoint: config, tokenizer, chat template, and the index of its parts.

    Raises:
        ModelFileError: One is far larger than any model's.
    """
    by_name = {file.name: file for file in files}
    names = CHECKPOINT_FILES if SINGLE in by_name else (*CHECKPOINT_FILES, INDEX)
    found = [by_name[name] for name in names if name in by_name]
    for file in found:
        if (file.size_bytes or 0) > MAX_TEXT_FILE_BYTES:
            raise ModelFileError(
                f"{file.name} of {reference} has {file.size_bytes} bytes, more than any model's; "
                "choose another repository of the model"
            )
    return found


def checkpoint_weight_files(
    files: Iterable[HubFile], parts: Sequence[str], reference: str
) -> list[HubFile]:
    """The files with a checkpoint's weights: the single one, or the parts that its index names.

    Raises:
        ModelFileError: The repository lacks a part.
    """
    by_name = {file.name: file for file in files}
    if SINGLE in by_name:
        return [by_name[SINGLE]]
    if missing := [part for part in parts if part not in by_name]:
        raise ModelFileError(
            f"{reference} lacks {missing[0]}, which its index names; choose another repository of "
            "the model"
        )
    return [by_name[part] for part in parts]


def choose(files: list[HubFile], quant: str | None, reference: str) -> list[HubFile]:
    """The file, or all parts of the split one, that `quant` names among a repository's files.

    Args:
        files: All files of the repository.
        quant: A quant's name or a file's; None takes the first of PREFERRED_QUANTS that is there,
            or the only model.
        reference: What the user wrote, for the message: `hf:ORG/REPO` or a directory.

    Raises:
        NotFound: Nothing matches; the message lists what exists.
        InvalidRequest: Several files match; the message lists them.
        ModelFileError: The repository lacks a part.
    """
    groups = _groups(files)
    if not groups:
        raise NotFound(
            f"{reference} has no .gguf files; look for a repository of the model whose name ends "
            "in GGUF, or download it and convert it: brim convert MODEL_DIR OUT.gguf"
        )
    matches: list[str] = []
    for wanted in [quant] if quant else PREFERRED_QUANTS:
        if matches := _matching(groups, wanted):
            break
    if not quant and not matches and len(groups) == 1:
        matches = list(groups)
    if not matches:
        asked = f"no quant {quant}" if quant else f"none of {', '.join(PREFERRED_QUANTS)}"
        raise NotFound(f"{reference} has {asked}; it has {_listed(groups)}: {_ways(reference)}")
    if len(matches) > 1:
        raise InvalidRequest(
            f"{reference} has several files for {wanted}: {_listed(matches)}; {_ways(reference)}"
        )
    return _complete(groups[matches[0]], reference)


def _groups(files: Iterable[HubFile]) -> dict[str, list[HubFile]]:
    """GGUF models by path without number and suffix."""
    groups: dict[str, list[HubFile]] = {}
    for file in sorted(files, key=lambda file: file.name):
        if file.name.lower().endswith(".gguf") and not NOT_MODELS.search(file.name):
            split = SPLIT_NAME.fullmatch(file.name)
            groups.setdefault(split["stem"] if split else file.name[:-5], []).append(file)
    return groups


def _matching(groups: dict[str, list[HubFile]], quant: str) -> list[str]:
    """Groups that are named `quant` as a whole, or have it between separators in their name."""
    asked = quant.lower().removesuffix(".gguf")
    for group, files in groups.items():
        names = (group, *(file.name for file in files))
        if any(quant.lower() in (n.lower(), n.rpartition("/")[2].lower()) for n in names):
            return [group]
    # After it `_` does not separate: Q4_K is another quant than Q4_K_M.
    pattern = re.compile(rf"(?:^|[-._/]){re.escape(asked)}(?:$|[-./])", re.IGNORECASE)
    return [group for group in groups if pattern.search(group.rpartition("/")[2])]


def _complete(parts: list[HubFile], reference: str) -> list[HubFile]:
    split = SPLIT_NAME.fullmatch(parts[0].name)
    if split and len(parts) != int(split["count"]):
        have = {int(m["number"]) for p in parts if (m := SPLIT_NAME.fullmatch(p.name))}
        missing = [n for n in range(1, int(split["count"]) + 1) if n not in have]
        raise ModelFileError(
            f"{reference} lacks part {', '.join(map(str, missing))} of {int(split['count'])} of "
            f"{split['stem']}; choose another quant"
        )
    return parts


def _listed(groups: list[str] | dict[str, list[HubFile]], most: int = 12) -> str:
    names = sorted(groups)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"{name}.gguf" for name in names[:most]) + more


def _ways(reference: str) -> str:
    if reference.startswith("hf:"):
        return "name one as hf:ORG/REPO:QUANT or hf:ORG/REPO:FILE"
    return "name one as DIRECTORY:QUANT or by its path"
