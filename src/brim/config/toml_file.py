"""Reads TOML files that people write into structs; what is wrong is said with its place.

For whole files of their own (scenarios, manifests); settings, which come from several places at
once, have `load`.
"""

import difflib
import re
import tomllib
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from brim.errors import ConfigError

S = TypeVar("S", bound=msgspec.Struct)

MAX_FILE_BYTES = 1024 * 1024
"""Thousands of times what a person writes; a file beyond is some other file."""


def read_text(path: Path, *, what: str, max_bytes: int = MAX_FILE_BYTES) -> str:
    """The text of a file.

    Args:
        path: The file.
        what: What it should be, for messages: 'the scenario'.
        max_bytes: A larger one is refused.

    Raises:
        ConfigError: It cannot be read, or is too large.
    """
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"{what} {path} cannot be read: it is no regular file")
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise ConfigError(f"{what} {path} is over {max_bytes} bytes, so it is some other file")
        return data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        reason = getattr(exc, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"{what} {path} cannot be read: {reason}") from exc


def parse_document(text: str, *, where: str) -> dict[str, Any]:
    """The tables of a TOML text.

    Raises:
        ConfigError: It is not TOML.
    """
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ConfigError(f"{where} is not TOML: it is nested too deeply") from None
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"{where} is not TOML: {exc}") from exc
    except ValueError:
        # Python's own bound on what it takes the time to convert.
        raise ConfigError(f"{where} is not TOML: a number has thousands of digits") from None


def convert(document: dict[str, Any], kind: type[S], *, where: str) -> S:
    """A document as a struct; keys that it lacks are refused by `check_keys` before.

    Raises:
        ConfigError: A value is wrong; the message names its key.
    """
    try:
        return msgspec.convert(document, kind)
    except msgspec.ValidationError as exc:
        raise ConfigError(f"{where}: {_in_words(str(exc), kind)}") from exc


def check_keys(document: dict[str, Any], kind: type[msgspec.Struct], *, where: str) -> None:
    """Refuse keys that do not exist, in tables and in arrays of tables, with the nearest that does.

    Raises:
        ConfigError: There is one.
    """
    info = msgspec.inspect.type_info(kind)
    assert isinstance(info, msgspec.inspect.StructType)
    _check(document, info, where, "")


def _check(table: dict[str, Any], info: msgspec.inspect.StructType, where: str, place: str) -> None:
    fields = {field.encode_name: field for field in info.fields}
    for key, value in table.items():
        if key not in fields:
            raise ConfigError(f"{where}:{place} there is no key {key!r}; {hint(key, fields)}")
        kinds = _structs(fields[key].type)
        for inner in kinds[:1]:
            if isinstance(value, dict):
                _check(value, inner, where, f"{place} [{key}]")
            for i, entry in enumerate(value if isinstance(value, list) else (), start=1):
                if isinstance(entry, dict):
                    _check(entry, inner, where, f"{place} {key} {i}:")


def _structs(kind: Any) -> list[msgspec.inspect.StructType]:
    """The tables that a value may be, or be an array of."""
    if isinstance(kind, msgspec.inspect.StructType):
        return [kind]
    if isinstance(kind, msgspec.inspect.Metadata):
        return _structs(kind.type)
    if isinstance(kind, msgspec.inspect.VarTupleType):
        return _structs(kind.item_type)
    if isinstance(kind, msgspec.inspect.UnionType):
        return [found for each in kind.types for found in _structs(each)]
    return []


def hint(name: str, valid: Iterable[str]) -> str:
    """What the writer of a name may have meant.

    Example:
        >>> hint("prioritys", ["priority", "models"]), hint("x", ["priority", "models"])
        ("did you mean 'priority'?", 'there are priority, models')
    """
    valid = list(valid)
    near = difflib.get_close_matches(name, valid, n=1)
    return f"did you mean '{near[0]}'?" if near else f"there are {', '.join(valid)}"


def _in_words(message: str, kind: type[msgspec.Struct]) -> str:
    """A validation error with its key in front, and for a word the words that would do."""
    what, _, path = message.partition(" - at `$")
    path = path.rstrip("`").lstrip(".")
    key = re.sub(r"\[(\d+)\]", lambda n: f" {int(n[1]) + 1}", path)
    key = key.replace("[...]", "")
    what = what[0].lower() + what[1:]
    if what.startswith("invalid enum value"):
        what += f"; write {', '.join(_words(msgspec.inspect.type_info(kind), path))}"
    return f"{key}: {what}" if key else what


def _words(kind: Any, path: str) -> list[str]:
    """The words that may stand at a path."""
    for name in re.findall(r"\w+", re.sub(r"\[.*?\]", "", path)):
        (table,) = _structs(kind)
        kind = next(field.type for field in table.fields if field.encode_name == name)
    return [str(member.value) for each in _enums(kind) for member in each]


def _enums(kind: Any) -> list[type[Enum]]:
    if isinstance(kind, msgspec.inspect.EnumType):
        return [kind.cls]
    if isinstance(kind, msgspec.inspect.Metadata):
        return _enums(kind.type)
    if isinstance(kind, msgspec.inspect.UnionType):
        return [found for each in kind.types for found in _enums(each)]
    return []
