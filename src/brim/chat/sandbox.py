"""The jinja2 environment in which chat templates run: Hugging Face's dialect, with a meter.

A template comes out of a downloaded file and its variables out of a request, so neither is
trusted: jinja2's sandbox keeps Python out of reach, and the meter ends a template that would
otherwise run or grow without end.  The sandbox alone does not: two nested `range(99999)` loops
never return and never print.  A template can still waste a gigabyte (`"%999999999d"`); that ends
at the worker process, which is there to be lost.
"""

import functools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any, cast

from jinja2 import Template, TemplateError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_STEPS = 500_000
"""Loop turns and calls in one rendering: 0.1 s of empty loops, or 2 s of macro calls, on one core
of a small x86 machine.  A plain template takes one for each message."""

MAX_SIZE = 40 * 1024 * 1024
"""Characters (or items) of any value a template builds, its output included: a request body is at
most 32 MiB, and the template adds words of its own."""

MAX_INTEGER_BITS = 128
"""Wider integers than any count or time stamp; `10 ** 10 ** 10` would not return."""

MAX_WIDTH = 10_000
"""Largest number handed to a filter or method: widths and counts, never more than a screenful."""

METER = "brim meter"
"""Name of the meter among the template's variables; the space keeps templates from naming it."""

_COUNTED = "brim counted"
_JOINED = "brim joined"
_SIZED_FILTERS = ("batch", "center", "indent", "slice", "truncate", "wordwrap")
"""Filters of jinja2 that make something as large as a number they are given."""


class Refusal(TemplateError):
    """The template itself refused the conversation, through `raise_exception`."""


class Meter:
    """What one rendering may still spend."""

    def __init__(self, max_s: float) -> None:
        self._steps_left = MAX_STEPS
        self._deadline_s = time.monotonic() + max_s
        self._max_s = max_s

    def step(self) -> None:
        """Count one loop turn or call.

        Raises:
            SecurityError: Steps or time are spent.
        """
        self._steps_left -= 1
        if self._steps_left < 0:
            raise SecurityError(f"it takes more than {MAX_STEPS} loop turns and calls")
        if time.monotonic() > self._deadline_s:
            raise SecurityError(f"it takes longer than {self._max_s:g} s")


class MeteredEnvironment(ImmutableSandboxedEnvironment):
    """jinja2's immutable sandbox, metered, with what Hugging Face templates expect to find.

    Args:
        now: The clock behind `strftime_now`.
    """

    # jinja2 hands these to `call_binop`; they are the ones whose result can outgrow its operands.
    intercepted_binops = frozenset({"+", "*", "**"})

    def __init__(self, now: Callable[[], datetime]) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationExtension, LoopControlExtension],
        )
        self.globals.pop("lipsum", None)
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: now().strftime(form)
        for name in _SIZED_FILTERS:
            self.filters[name] = _with_small_numbers(self.filters[name])
        self.filters["tojson"] = _tojson
        self.filters[_COUNTED] = _counted
        self.filters[_JOINED] = _joined

    def compile_metered(self, source: str) -> Template:
        """The template with every loop counted and every concatenation bounded.

        Raises:
            TemplateSyntaxError: As jinja2 has it.
            RecursionError: The source is nested too deeply to be parsed.
        """
        tree = _Metering().visit(self.parse(source))
        code = self.compile(tree, "chat_template")
        return Template.from_code(self, code, self.make_globals(None))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call macro, method or global from a template: one step, and its result has a size."""
        __context.parent[METER].step()
        if isinstance(getattr(__obj, "__self__", None), str):  # ljust, zfill, expandtabs, ...
            _check_numbers((*args, *kwargs.values()))
        return _bounded(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Refuse operations whose result would be too large before doing them."""
        _BINOP_CHECKS[operator](left, right)
        return super().call_binop(context, operator, left, right)


class _GenerationExtension(Extension):
    """`{% generation %}` marks the assistant's words for training; only its body counts here."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


class _Metering(NodeTransformer):
    """Puts every loop's iterable and every `~` through a filter that keeps count."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(cast("nodes.Expr", node.iter), _COUNTED)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), _JOINED)


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


@pass_context
def _counted(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    step = context.parent[METER].step
    for item in items:
        step()
        yield item


def _joined(parts: list[Any]) -> str:
    texts = [str(part) for part in parts]
    _check_size(sum(map(len, texts)))
    return "".join(texts)


def _raise_exception(message: str) -> None:
    raise Refusal(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja2's own filter escapes HTML, which no model was trained on."""
    _check_numbers((indent,))
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _with_small_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        _check_numbers(args)
        _check_numbers(kwargs.values())
        return function(*args, **kwargs)

    return checked


def _check_numbers(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > MAX_WIDTH:
            raise SecurityError(f"it passes {value} as a width or count; the most is {MAX_WIDTH}")


def _check_size(size: int) -> None:
    if size > MAX_SIZE:
        raise SecurityError(f"it builds a value of {size} characters; the most is {MAX_SIZE}")


def _bounded(value: Any) -> Any:
    if isinstance(value, str):
        _check_size(len(value))
    return value


def _size(value: Any) -> int:
    return len(value) if isinstance(value, (str, list, tuple)) else 0


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 0


def _check_bits(bits: int) -> None:
    if bits > MAX_INTEGER_BITS:
        raise SecurityError(
            f"it computes an integer of {bits} bits; the most is {MAX_INTEGER_BITS}"
        )


def _check_add(left: Any, right: Any) -> None:
    _check_size(_size(left) + _size(right))


def _check_multiply(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(_bits(left) + _bits(right))
        return
    for sequence, count in ((left, right), (right, left)):
        if isinstance(count, int):
            _check_size(_size(sequence) * max(0, count))


def _check_power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(_bits(left) * max(1, right))


_BINOP_CHECKS: dict[str, Callable[[Any, Any], None]] = {
    "+": _check_add,
    "*": _check_multiply,
    "**": _check_power,
}
