"""Writes docs/settings.md from the tree, so that the page cannot disagree with the code."""

import enum
from typing import Any

import msgspec

from brim.config.load import all_fields, environment_name
from brim.config.tree import Settings

_HEAD = """\
# Settings

Every setting, from weakest to strongest: its default, `brim.toml` (in the platform's directory for
configuration, or the file that `BRIM_CONFIG` names), its `BRIM_*` variable, a flag of the command
line.
`brim config show` prints the values in force and where each came from.
Unknown keys and values out of range are errors.

This page is made from `src/brim/config/tree.py` by `python -m brim.config.document`.
"""


def settings_page() -> str:
    """The whole page as Markdown."""
    parts = [_HEAD]
    fields = all_fields()
    for section in Settings.__struct_fields__:
        keys = [key for key in fields if key.startswith(f"{section}.")]
        parts.append(f"\n## `[{section}]`\n\n{_purpose(section)}\n")
        parts.append("\n| key | default | range | variable | meaning |\n|---|---|---|---|---|\n")
        parts.extend(_row(key, fields[key]) for key in keys)
    return "".join(parts)


def _purpose(section: str) -> str:
    return str(type(getattr(Settings(), section)).__doc__)


def _row(key: str, field: msgspec.inspect.Field) -> str:
    kind, meaning = field.type, ""
    if isinstance(kind, msgspec.inspect.Metadata):
        meaning = str((kind.extra_json_schema or {}).get("description", ""))
        kind = kind.type
    name = key.split(".")[1]
    default = _text(field.default)
    return f"| `{name}` | {default} | {_range(kind)} | `{environment_name(key)}` | {meaning} |\n"


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        value = list(value)
    if isinstance(value, bool):
        value = str(value).lower()  # as TOML writes it
    return f"`{value.value if isinstance(value, enum.Enum) else value}`"


def _range(kind: Any) -> str:
    """The allowed values in words."""
    if isinstance(kind, msgspec.inspect.EnumType):
        return ", ".join(_text(member) for member in kind.cls)
    if isinstance(kind, msgspec.inspect.BoolType):
        return "`true` or `false`"
    if isinstance(kind, msgspec.inspect.VarTupleType):
        return "list of texts; in the variable with commas between"
    low, high = getattr(kind, "ge", None), getattr(kind, "le", None)
    if low is not None and high is not None:
        return f"{low} to {high}"
    return f"from {low}" if low is not None else "text"


if __name__ == "__main__":
    from pathlib import Path

    Path("docs/settings.md").write_text(settings_page(), encoding="utf-8")
