"""The jinja2 environment in which chat templates run: Hugging Face's dialect, with a meter.

A template comes out of a downloaded file and its variables out of a request, so neither is
trusted: jinja2's sandbox keeps Python out of reach, and the meter ends a template that would
otherwise run or grow without end.  The sandbox alone does not: two nested `range(99999)` loops
never return and never print.  What a single call can still waste, some hundred megabytes and a
few seconds, ends at the worker process, which is there to be lost.
"""

from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any, cast

from jinja2 import Template, TemplateError, nodes, pass_context
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from brim.chat.filters import check_method, finalized, meter_functions
from brim.chat.meter import (
    METER,
    Meter,
    bits_of,
    bounded,
    check_bits,
    check_format,
    check_size,
    joined,
    size_of,
)

_COUNTED = "brim counted"
_JOINED = "brim joined"
_COMPARED = "brim compared"


class Refusal(TemplateError):
    """The template itself refused the conversation, through `raise_exception`."""


class MeteredEnvironment(ImmutableSandboxedEnvironment):
    """jinja2's immutable sandbox, metered, with what Hugging Face templates expect to find.

    Args:
        now: The clock behind `strftime_now`.
    """

    # jinja2 hands these to `call_binop`; they are the ones whose result can outgrow its operands.
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, now: Callable[[], datetime]) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationExtension, LoopControlExtension],
            finalize=pass_context(finalized),
        )
        self.globals.pop("lipsum", None)
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: now().strftime(form)
        meter_functions(self)
        self.filters[_COUNTED] = _counted
        self.filters[_JOINED] = _joined
        self.filters[_COMPARED] = _compared

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
        meter: Meter = __context.parent[METER]
        meter.step()
        # The sandbox wraps `format`, and leaves the method it wraps behind.
        method = getattr(__obj, "__wrapped__", __obj)
        text = getattr(method, "__self__", None)
        if isinstance(text, str):
            args = check_method(meter, text, method.__name__, args, kwargs)
        return bounded(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Refuse operations whose result would be too large before doing them."""
        if operator == "%" and isinstance(left, str):
            values = right if isinstance(right, tuple) else (right,)
            check_format(context.parent[METER], left, "%", values)
        elif operator != "%":
            _BINOP_CHECKS[operator](left, right)
        return super().call_binop(context, operator, left, right)


class _GenerationExtension(Extension):
    """`{% generation %}` marks the assistant's words for training; only its body counts here."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


class _Metering(NodeTransformer):
    """Puts every loop's iterable and every `~` and comparison through a filter that keeps count."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(cast("nodes.Expr", node.iter), _COUNTED)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), _JOINED)

    def visit_Operand(self, node: nodes.Operand) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.expr, nodes.Const):
            node.expr = _filtered(node.expr, _COMPARED)
        return node


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


@pass_context
def _counted(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    meter: Meter = context.parent[METER]
    return meter.counted(items)


@pass_context
def _joined(context: Context, parts: list[Any]) -> str:
    return joined(context.parent[METER], parts)


@pass_context
def _compared(context: Context, value: Any) -> Any:
    """Lists that hold each other many times over take exponential time to compare."""
    if isinstance(value, (list, tuple, dict)):
        context.parent[METER].text_size(value)
    return value


def _raise_exception(message: str) -> None:
    raise Refusal(message)


def _check_add(left: Any, right: Any) -> None:
    check_size(size_of(left) + size_of(right))


def _check_multiply(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        check_bits(bits_of(left) + bits_of(right))
        return
    for sequence, count in ((left, right), (right, left)):
        if isinstance(count, int):
            check_size(size_of(sequence) * max(0, count))


def _check_power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        check_bits(bits_of(left) * max(1, right))


_BINOP_CHECKS: dict[str, Callable[[Any, Any], None]] = {
    "+": _check_add,
    "*": _check_multiply,
    "**": _check_power,
}
