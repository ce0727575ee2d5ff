"""The error hierarchy is what its drawing says, and crosses the worker's socket unchanged."""

import re

import msgspec
import pytest

from brim import errors
from brim.core.answer import ErrorInfo
from brim.errors import BrimError, all_error_classes

# "    │   ├── ContextOverflow          400     the client: ..."
DRAWN = re.compile(r"^ {4}(?P<depth>[│├└─ ]*)(?P<name>[A-Z]\w+) +(?P<status>\d{3}|status)\b")


def drawn() -> dict[str, tuple[int, str]]:
    """Depth and status of each class in the docstring's drawing."""
    found = {}
    for line in (errors.__doc__ or "").splitlines():
        match = DRAWN.match(line)
        if match:
            found[match["name"]] = (len(match["depth"]) // 4, match["status"])
    return found


def test_the_drawing_has_every_class_at_its_place() -> None:
    """Every subclass stands in the drawing, as deep as it is derived, with its own status."""
    expected = {
        name: (len(cls.__mro__) - len(BrimError.__mro__), str(cls.status))
        for name, cls in all_error_classes().items()
    }
    expected["BrimError"] = (0, "status")
    assert drawn() == expected


@pytest.mark.parametrize("name", sorted(all_error_classes()))
def test_an_error_crosses_the_socket_as_itself(name: str) -> None:
    """Class, message, field and waiting time come back as they were."""
    error = all_error_classes()[name]("do this", param="field", retry_after_s=2.5)
    wire = msgspec.msgpack.encode(ErrorInfo.of(error))
    back = msgspec.msgpack.decode(wire, type=ErrorInfo).exception()
    assert type(back) is type(error)
    assert (back.message, back.param, back.retry_after_s) == ("do this", "field", 2.5)


def test_an_unknown_class_becomes_the_root() -> None:
    """A worker of another version cannot name a class into existence."""
    assert type(ErrorInfo(kind="SystemExit", message="x").exception()) is BrimError
