"""TOML files of their own: what is wrong in one is said with its place."""

import enum
import os
from pathlib import Path

import msgspec
import pytest

from brim.config import toml_file
from brim.errors import ConfigError


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Leaf(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    size: int = 0
    colour: Colour | None = None


class Tree(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    trunk: Leaf = Leaf()
    leaf: tuple[str | Leaf, ...] = ()


def read(text: str) -> Tree:
    document = toml_file.parse_document(text, where="t.toml")
    toml_file.check_keys(document, Tree, where="t.toml")
    return toml_file.convert(document, Tree, where="t.toml")


def test_tables_arrive() -> None:
    """Nested ones, and arrays whose entries are words or tables."""
    tree = read('leaf = ["a", { size = 2, colour = "red" }]\n[trunk]\nsize = 1\n')
    assert tree == Tree(trunk=Leaf(size=1), leaf=("a", Leaf(size=2, colour=Colour.RED)))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("trnk = 1", "t.toml: there is no key 'trnk'; did you mean 'trunk'?"),
        ("x = 1", "t.toml: there is no key 'x'; there are trunk, leaf"),
        ("[trunk]\nsise = 1", "t.toml: [trunk] there is no key 'sise'; did you mean 'size'?"),
        ("[[leaf]]\n[[leaf]]\nsise = 1", "t.toml: leaf 2: there is no key 'sise'; did you mean"),
        ('"\\u001b" = 1', "t.toml: there is no key '\\x1b'; there are"),
        ("[trunk]\nsize = 'x'", "t.toml: trunk.size: expected `int`, got `str`"),
        ("[trunk]\ncolour = 'x'", "t.toml: trunk.colour: invalid enum value 'x'; write red, blue"),
        ("[[leaf]]\ncolour = 'x'", "t.toml: leaf 1.colour: invalid enum value 'x'; write red, blu"),
        ("trunk = 1", "t.toml: trunk: expected `object`, got `int`"),
    ],
)
def test_the_place_is_named(text: str, words: str) -> None:
    """The key, the table and the entry that is wrong."""
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert caught.value.message.startswith(words)


def test_files_that_are_no_text_are_refused(tmp_path: Path) -> None:
    """A pipe, which would be waited for, and a file of any size, which would fill memory."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match=r"the file .*no regular file"):
        toml_file.read_text(tmp_path / "pipe", what="the file")
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(10 * 2**30)
    with pytest.raises(ConfigError, match="over 1048576 bytes"):
        toml_file.read_text(large, what="the file")
