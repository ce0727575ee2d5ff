"""What one rendering of a template may spend, and how large its values may become.

jinja2's sandbox bounds neither.  Whatever makes, copies or walks through something is charged here
before it does, because nothing can end it once it runs in C.
"""

import re
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any

from jinja2.exceptions import SecurityError

MAX_STEPS = 500_000
"""Loop turns, calls and items that filters go through in one rendering: 0.1 s of empty loops, or
2 s of macro calls, on one core of a small x86 machine.  A plain template takes a few for each
message."""

MAX_SIZE = 40 * 1024 * 1024
"""Characters of any value a template builds, its output included: a request body is at most
32 MiB, and the template adds words of its own."""

ITEM_SIZE = 40
"""Characters that one item of a list counts for: it takes that many bytes."""

MAX_SLOW_SIZE = 100_000
"""Characters of a text that goes through Python's own text tools, which take a microsecond for each
of them, or are quadratic (`striptags`); no prompt needs them for more than a heading."""

MAX_INTEGER_BITS = 128
"""Wider integers than any count or time stamp; `10 ** 10 ** 10` would not return."""

MAX_WIDTH = 10_000
"""Largest number handed to a filter or method: widths and counts, never more than a screenful."""

METER = "brim meter"
"""Name of the meter among the template's variables; the space keeps templates from naming it."""

_PERCENT_FIELD = re.compile(r"%(?:\([^)]*\))?[#0\- +]*(\*|\d+)?(?:\.(\*|\d+))?")
_BRACE_FIELD = re.compile(r"\{[^{}]*:[^{}\d]*(\d+|\{)?[^{}\d]*(\d+|\{)?")
"""A field with its width and precision; `*` and a brace in their place name a value."""
_SCALAR_SIZE = 8


class Meter:
    """What one rendering may still spend."""

    def __init__(self, max_s: float) -> None:
        self._steps_left = MAX_STEPS
        self._deadline_s = time.monotonic() + max_s
        self._max_s = max_s

    def step(self, count: int = 1) -> None:
        """Count loop turns, calls or items.

        Raises:
            SecurityError: Steps or time are spent.
        """
        self._steps_left -= count
        if self._steps_left < 0:
            raise SecurityError(f"it takes more than {MAX_STEPS} loop turns and calls")
        if time.monotonic() > self._deadline_s:
            raise SecurityError(f"it takes longer than {self._max_s:g} s")

    def counted(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items, with a step for each."""
        for item in items:
            self.step()
            yield item

    def charge_items(self, value: Any) -> None:
        """Steps for what is about to be gone through; iterators are counted as they go.

        Raises:
            SecurityError: There are too many items, or more text in them than a value may have.
        """
        if isinstance(value, Sized):
            self.step(len(value))
        if isinstance(value, (list, tuple)):
            check_size(sum(len(item) for item in value if isinstance(item, str)))

    def text_size(self, value: Any, *, per_item: int = 4, indent: int = 0) -> int:
        """About how many characters `str(value)` or its JSON has, without making it.

        Args:
            value: Anything; what is in lists and mappings is counted as often as it stands there.
            per_item: Characters around each item: separators and quotes.
            indent: Characters for each level before each item.

        Raises:
            SecurityError: It is more than a value may have, or has too many lists in it.
        """
        size = 0
        waiting: list[tuple[Any, int]] = [(value, 0)]
        while waiting:
            item, depth = waiting.pop()
            size += len(item) if isinstance(item, str) else _SCALAR_SIZE
            if isinstance(item, (list, tuple, dict)):
                self.step()
                num_items = len(item) * (2 if isinstance(item, dict) else 1)
                size += num_items * (per_item + indent * (depth + 1))
                check_size(size)
                parts = [*item, *item.values()] if isinstance(item, dict) else item
                waiting.extend((part, depth + 1) for part in parts)
            check_size(size)
        return size


def check_size(size: int) -> None:
    """Refuse to build a value of so many characters."""
    if size > MAX_SIZE:
        raise SecurityError(f"it builds a value of {size} characters; the most is {MAX_SIZE}")


def check_slow(size: int) -> None:
    """Refuse a text that is too long for a slow filter."""
    if size > MAX_SLOW_SIZE:
        raise SecurityError(
            f"it puts {size} characters through a slow filter; the most is {MAX_SLOW_SIZE}"
        )


def check_bits(bits: int) -> None:
    """Refuse to compute an integer that wide."""
    if bits > MAX_INTEGER_BITS:
        raise SecurityError(
            f"it computes an integer of {bits} bits; the most is {MAX_INTEGER_BITS}"
        )


def check_numbers(values: Iterable[Any]) -> None:
    """Refuse numbers too large for a width or count."""
    for value in values:
        if isinstance(value, int) and abs(value) > MAX_WIDTH:
            raise SecurityError(f"it passes {value} as a width or count; the most is {MAX_WIDTH}")


def bounded(value: Any) -> Any:
    """The value, where it is no larger than values may be."""
    check_size(size_of(value))
    check_bits(bits_of(value))
    return value


def size_of(value: Any) -> int:
    """Size of a text or list itself, without what is in it; 0 for anything else."""
    if isinstance(value, (str, bytes)):
        return len(value)
    return len(value) * ITEM_SIZE if isinstance(value, (list, tuple)) else 0


def bits_of(value: Any) -> int:
    """Width of an integer; 0 for anything else."""
    return value.bit_length() if isinstance(value, int) else 0


def check_replace(text: str, old: str, new: str, count: int | None = None) -> None:
    """Refuse a replacement whose result is too large, before it is made."""
    num_found = text.count(old)
    if count is not None and count >= 0:
        num_found = min(num_found, count)
    check_size(len(text) + num_found * (len(new) - len(old)))


def check_format(meter: Meter, form: str, mark: str, values: Sequence[Any]) -> None:
    """Refuse a format whose widths, or whose values taken together, are too large.

    Args:
        meter: Charged for lists among the values.
        form: The format string.
        mark: What begins a field: "%" or "{".
        values: What is put in; a field may name any of them, and take its width from it.
    """
    fields = (_PERCENT_FIELD if mark == "%" else _BRACE_FIELD).findall(form)
    given = [number for field in fields for number in field if number]
    widths = [int(number[:20]) for number in given if number.isdecimal()]
    if len(widths) < len(given):
        widths += [value for value in _flat(values) if isinstance(value, int)]
    check_numbers(widths)
    largest = max((meter.text_size(value) for value in values), default=0)
    check_size(len(form) + form.count(mark) * max(largest, *widths, 0))


def _flat(values: Sequence[Any]) -> Iterator[Any]:
    for value in values:
        yield from value.values() if isinstance(value, dict) else (value,)


def joined(meter: Meter, parts: list[Any], separator: str = "") -> str:
    """The parts as text, one after the other."""
    check_size(meter.text_size(parts, per_item=len(separator)))
    return separator.join(map(str, parts))
