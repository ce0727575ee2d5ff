"""Writes the tables of keys in docs/apps.md from the manifest's structs, so that they agree."""

import enum
import re
from typing import Any

import msgspec

from brim.apps.manifest import Manifest

BEGIN, END = "<!-- keys, by python -m brim.apps.document -->", "<!-- end of keys -->"


def with_keys(page: str) -> str:
    """The page with its tables made anew."""
    pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
    return re.sub(pattern, lambda _: f"{BEGIN}\n{key_tables()}\n{END}", page, flags=re.DOTALL)


def key_tables() -> str:
    """A table for the file, and one for each of its tables."""
    tables = [
        _table(field.name, field.type.cls)
        for field in _fields(Manifest)
        if isinstance(field.type, msgspec.inspect.StructType)
    ]
    return "\n".join([_table("", Manifest), *tables])


def all_keys() -> list[str]:
    """Every key that a manifest may have, as `budgets.tokens_per_day`."""
    found = []
    for field in _fields(Manifest):
        if isinstance(field.type, msgspec.inspect.StructType):
            found += [f"{field.name}.{inner.name}" for inner in field.type.fields]
        else:
            found.append(field.name)
    return found


def _table(name: str, kind: type[msgspec.Struct]) -> str:
    title = f"### `[{name}]`\n\n{kind.__doc__}\n" if name else "### The file\n"
    rows = [
        _row(field)
        for field in _fields(kind)
        if not isinstance(field.type, msgspec.inspect.StructType)
    ]
    return "\n".join([title, "| key | value | default | meaning |", "|---|---|---|---|", *rows, ""])


def _fields(kind: type[msgspec.Struct]) -> tuple[msgspec.inspect.Field, ...]:
    info = msgspec.inspect.type_info(kind)
    assert isinstance(info, msgspec.inspect.StructType)
    return info.fields


def _row(field: msgspec.inspect.Field) -> str:
    kind = field.type
    assert isinstance(kind, msgspec.inspect.Metadata), f"{field.name} has no description"
    meaning = (kind.extra_json_schema or {})["description"]
    default = "required" if field.required else _text(field.default)
    return f"| `{field.name}` | {_values(kind.type)} | {default} | {meaning} |"


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value.value if isinstance(value, enum.Enum) else value}`"


def _values(kind: Any) -> str:
    """What may stand behind the key, in words."""
    if isinstance(kind, msgspec.inspect.Metadata):
        return _values(kind.type)
    if isinstance(kind, msgspec.inspect.UnionType):
        real = [each for each in kind.types if not isinstance(each, msgspec.inspect.NoneType)]
        return " or ".join(_values(each) for each in real)
    if isinstance(kind, msgspec.inspect.EnumType):
        return ", ".join(_text(member) for member in kind.cls)
    if isinstance(kind, msgspec.inspect.BoolType):
        return "`true` or `false`"
    if isinstance(kind, msgspec.inspect.VarTupleType):
        return f"list of 1 to {kind.max_length}: {_values(kind.item_type)}"
    if isinstance(kind, msgspec.inspect.StructType):
        return "pair"
    if isinstance(kind, msgspec.inspect.StrType):
        return "text"
    return _range(kind)


def _range(kind: msgspec.inspect.IntType | msgspec.inspect.FloatType) -> str:
    """A number's range.

    Example:
        >>> _range(msgspec.inspect.IntType(ge=1, le=100_000))
        'whole number, 1 to 100,000'
    """
    what = "whole number" if isinstance(kind, msgspec.inspect.IntType) else "number"
    low = f"above {kind.gt:,g}" if kind.ge is None else f"{kind.ge:,}"
    if kind.ge is None:
        return f"{what}, {low}, up to {kind.le:,}"
    return f"{what}, {low} to {kind.le:,}"


if __name__ == "__main__":
    from pathlib import Path

    PAGE = Path("docs/apps.md")
    PAGE.write_text(with_keys(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
