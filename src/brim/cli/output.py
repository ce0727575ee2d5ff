"""Tables for people and JSON for programs, both on stdout."""

from collections.abc import Sequence
from typing import Any

import msgspec
import typer

from brim.core.units import gib as gib


def print_json(value: Any) -> None:
    """Print any msgspec value as indented JSON."""
    typer.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def print_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, right: frozenset[int] = frozenset()
) -> None:
    """Print rows in columns as wide as their widest cell.

    Args:
        head: Names of the columns.
        rows: Cells, as many to each row as there are columns.
        right: Indices of columns that are aligned right.
    """
    rows = [[on_one_line(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        typer.echo("  ".join(cells).rstrip())


def on_one_line(text: str) -> str:
    """A cell without line ends or terminal codes, which names from files may hold.

    Example:
        >>> on_one_line("a" + chr(10) + "b" + chr(27) + "[31m")
        'a?b?[31m'
    """
    return "".join(letter if letter.isprintable() else "?" for letter in text)
