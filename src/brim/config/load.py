"""Reads settings: defaults < brim.toml < BRIM_* variables < flags, each value with its origin.

A key that does not exist or a value that does not fit is a `ConfigError` that names the file and
line, the variable or the flag, and the nearest key that does exist.  Nothing is ever ignored.
"""

import difflib
import functools
import os
import re
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from brim.config.tree import Settings
from brim.errors import ConfigError

_NOT_SETTINGS = frozenset({"BRIM_CONFIG", "BRIM_DEBUG"})
"""Variables with our prefix that are no settings: which file to read, and tracebacks."""

_FOR_TESTS = ("BRIM_TEST_", "BRIM_REQUIRE_")
"""Prefixes of variables that the test suite reads, which servers under test inherit."""


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """One value and where it came from."""

    key: str
    value: Any
    origin: str
    """'default', 'path/brim.toml:3', 'BRIM_SERVER_PORT' or a flag's name."""


class LoadedSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The tree, and the origin of each of its values."""

    settings: Settings
    origins: dict[str, str]
    """Key ('server.port') -> origin, for every key of the tree."""

    def listing(self) -> list[Setting]:
        """Every setting in the order of the tree."""
        return [
            Setting(key=key, value=getattr(getattr(self.settings, section), name), origin=origin)
            for key, origin in self.origins.items()
            for section, name in [key.split(".")]
        ]


@functools.cache
def all_fields() -> dict[str, msgspec.inspect.Field]:
    """Key ('server.port') -> field of the tree, in order."""
    sections = msgspec.inspect.type_info(Settings)
    assert isinstance(sections, msgspec.inspect.StructType)
    return {
        f"{section.name}.{field.name}": field
        for section in sections.fields
        if isinstance(section.type, msgspec.inspect.StructType)
        for field in section.type.fields
    }


def environment_name(key: str) -> str:
    """The variable that sets a key.

    Example:
        >>> environment_name("server.port")
        'BRIM_SERVER_PORT'
    """
    return "BRIM_" + key.replace(".", "_").upper()


def config_path(environment: Mapping[str, str]) -> Path:
    """BRIM_CONFIG, or brim.toml in the platform's directory for configuration."""
    named = environment.get("BRIM_CONFIG")
    if named:
        return Path(named)
    import platformdirs

    return platformdirs.user_config_path("brim", appauthor=False) / "brim.toml"


def load_settings(
    flags: Mapping[str, tuple[str, Any]] | None = None,
    *,
    environment: Mapping[str, str] | None = None,
) -> LoadedSettings:
    """The settings in force.

    Args:
        flags: Key -> (the flag's name, its value); values of None are left out.
        environment: Variables to read; the process's own where None.

    Raises:
        ConfigError: A file, variable or flag is wrong; the message names the place.
    """
    environment = os.environ if environment is None else environment
    tree: dict[str, dict[str, Any]] = {}
    origins = dict.fromkeys(all_fields(), "default")

    def put(key: str, value: Any, origin: str, *, strict: bool) -> None:
        section, name = key.split(".")
        tree.setdefault(section, {})[name] = _converted(key, value, origin, strict=strict)
        origins[key] = origin

    path = config_path(environment)
    if path.is_file():
        for key, value, line in _file_values(path):
            put(key, value, f"{path}:{line}" if line else str(path), strict=True)
    elif "BRIM_CONFIG" in environment:
        raise ConfigError(f"BRIM_CONFIG names {path}, which is not a file", param="BRIM_CONFIG")
    for key, text, name in _environment_values(environment):
        put(key, text, name, strict=False)
    for key, (flag, value) in (flags or {}).items():
        if value is not None:
            put(key, value, flag, strict=False)
    return LoadedSettings(settings=msgspec.convert(tree, Settings), origins=origins)


def _converted(key: str, value: Any, origin: str, *, strict: bool) -> Any:
    """The value as the tree's type has it; `strict` False also reads numbers and lists in text."""
    if not strict and isinstance(value, str) and _is_list(key):
        value = [item.strip() for item in value.split(",") if item.strip()]
    try:
        return msgspec.convert(value, _annotation(key), strict=strict)
    except msgspec.ValidationError as exc:
        example = _example(key)
        reason = str(exc) if example is None else f"each looks like '{example}'"
        raise ConfigError(
            f"{origin}: {key} cannot be {value!r}: {reason[:1].lower()}{reason[1:]}", param=key
        ) from exc


def _is_list(key: str) -> bool:
    return isinstance(_bare_type(key), msgspec.inspect.VarTupleType)


def _example(key: str) -> str | None:
    """What an item of a list looks like, where a pattern says it, which nobody wants to read."""
    kind = _bare_type(key)
    item = kind.item_type if isinstance(kind, msgspec.inspect.VarTupleType) else None
    schema = item.extra_json_schema if isinstance(item, msgspec.inspect.Metadata) else None
    return schema["examples"][0] if schema else None


def _bare_type(key: str) -> msgspec.inspect.Type:
    kind = all_fields()[key].type
    return kind.type if isinstance(kind, msgspec.inspect.Metadata) else kind


def _annotation(key: str) -> Any:
    """The annotated type of one key, range included."""
    section, name = key.split(".")
    struct = typing.get_type_hints(Settings)[section]
    return typing.get_type_hints(struct, include_extras=True)[name]


def _file_values(path: Path) -> list[tuple[str, Any, int | None]]:
    """(key, value, line) of everything in the file.

    Raises:
        ConfigError: It is not TOML, or has a key that the tree lacks.
    """
    try:
        text = path.read_text(encoding="utf-8")
        document = tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path} cannot be read: {exc}") from exc
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"{path} is not valid TOML: {exc}") from exc
    values = []
    for section, table in document.items():
        entries = table.items() if isinstance(table, dict) else [(None, table)]
        for name, value in entries:
            key = section if name is None else f"{section}.{name}"
            line = _line_of(text, section, name)
            if key not in all_fields():
                where = f"{path}:{line}" if line else str(path)
                raise ConfigError(f"{where}: there is no setting '{key}'{_nearest(key)}", param=key)
            values.append((key, value, line))
    return values


def _line_of(text: str, section: str, name: str | None) -> int | None:
    """Line on which a key is set, where it stands in the plain `[section]`, `name = ...` form."""
    current = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(r"\s*\[\s*([^\[\]]+?)\s*\]", line):
            current = header[1]
            if name is None and current == section:
                return number
        elif assigned := re.match(r"\s*([\w.\s\"'-]+?)\s*=", line):
            written = assigned[1].replace('"', "").replace("'", "").replace(" ", "")
            wanted = section if name is None else f"{section}.{name}"
            if wanted == (f"{current}.{written}" if current else written):
                return number
    return None


def _environment_values(environment: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """(key, text, variable) of every BRIM_* setting, in the order of the tree.

    Raises:
        ConfigError: A variable has our prefix and is no setting.
    """
    names = {environment_name(key): key for key in all_fields()}
    for name in environment:
        if name in names or name in _NOT_SETTINGS or name.startswith(_FOR_TESTS):
            continue
        if name.startswith("BRIM_"):
            near = difflib.get_close_matches(name, [*names, *_NOT_SETTINGS], n=1)
            hint = f"; did you mean {near[0]}?" if near else "; see: brim config show"
            raise ConfigError(f"{name} is not a setting of brim{hint}", param=name)
    return [(key, environment[name], name) for name, key in names.items() if name in environment]


def _nearest(key: str) -> str:
    """A hint with the nearest valid key, by the whole key first and then by its last word."""
    keys = list(all_fields())
    if near := difflib.get_close_matches(key, keys, n=1):
        return f"; did you mean '{near[0]}'?"
    by_word = {valid.split(".")[1]: valid for valid in keys}
    if near := difflib.get_close_matches(key.rpartition(".")[2], by_word, n=1):
        return f"; did you mean '{by_word[near[0]]}'?"
    return "; see: brim config show"
