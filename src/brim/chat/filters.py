"""jinja2's filters and tests, each charged to the meter and bounded in what it makes."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from jinja2 import Environment, pass_context, pass_environment
from jinja2.exceptions import SecurityError
from jinja2.filters import make_attrgetter, sync_do_sum
from jinja2.runtime import Context
from jinja2.utils import _PassArg

from brim.chat.history import dump_spelled
from brim.chat.meter import (
    METER,
    Meter,
    bounded,
    check_format,
    check_numbers,
    check_replace,
    check_size,
    check_slow,
    joined,
)

Function = Callable[..., Any]
Check = Callable[..., None]
"""Gets the meter and the filter's own arguments, and raises SecurityError."""

_ITERATING = frozenset(
    "batch dictsort groupby items list map max min random reject rejectattr select selectattr slice"
    " sort sum unique".split()
)
"""Filters that go through every item of their value."""

_SLOW = frozenset("pprint striptags title urlencode urlize wordcount wordwrap xmlattr".split())
_WITH_NUMBERS = frozenset("batch center indent round slice truncate urlize wordwrap".split())
"""Filters that make something as large as a number they are given."""

_SLOW_TESTS = frozenset(
    "in == eq equalto != ne > gt greaterthan ge >= < lt lessthan <= le lower upper".split()
)
"""Tests that compare, or turn what they test into text."""


def meter_functions(environment: Environment) -> None:
    """Replace the environment's filters and slow tests by metered ones."""
    environment.filters["sum"] = pass_environment(_sum)
    environment.filters["join"] = pass_context(_join)
    environment.filters["tojson"] = pass_context(_tojson)
    for name, function in list(environment.filters.items()):
        environment.filters[name] = _metered(name, function)
    tests = cast("dict[str, Function]", environment.tests)  # typed by what jinja2 has in it
    for name in _SLOW_TESTS:
        tests[name] = _metered_test(tests[name])


def _metered(name: str, function: Function) -> Function:
    check = _OWN_CHECKS.get(name)

    @pass_context
    def metered(context: Context, *args: Any, **kwargs: Any) -> Any:
        meter: Meter = context.parent[METER]
        meter.step()
        if name in _ITERATING and args:
            meter.charge_items(args[0])
        if name in _MADE_TEXT and args:
            meter.text_size(args[0])
        if name in _SLOW:
            check_slow(meter.text_size(list(args)))
        if name in _WITH_NUMBERS:
            check_numbers((*args[1:], *kwargs.values()))
        if check is not None:
            check(meter, *args, **kwargs)
        result = _passed(function, context, args, kwargs)
        return meter.counted(result) if isinstance(result, Iterator) else bounded(result)

    return metered


def _metered_test(function: Function) -> Function:
    @pass_context
    def metered(context: Context, *args: Any, **kwargs: Any) -> Any:
        meter: Meter = context.parent[METER]
        meter.step()
        for value in args:
            if isinstance(value, (list, tuple, dict)):
                meter.text_size(value)
        return _passed(function, context, args, kwargs)

    return metered


def _passed(function: Function, context: Context, args: Any, kwargs: Any) -> Any:
    """Call a filter with the first argument that it was declared to take."""
    first = _PassArg.from_obj(function)
    if first is _PassArg.context:
        return function(context, *args, **kwargs)
    if first is _PassArg.eval_context:
        return function(context.eval_ctx, *args, **kwargs)
    if first is _PassArg.environment:
        return function(context.environment, *args, **kwargs)
    return function(*args, **kwargs)


def _check_replace(meter: Meter, s: Any, old: Any, new: Any, count: Any = None) -> None:
    check_replace(_text(meter, s), _text(meter, old), _text(meter, new), count)


def _check_format(meter: Meter, value: Any, *args: Any, **kwargs: Any) -> None:
    check_format(meter, _text(meter, value), "%", (*args, kwargs))


def _check_indent(meter: Meter, s: Any, width: Any = 4, *_: Any, **__: Any) -> None:
    num_lines = _text(meter, s).count("\n") + 1
    check_size(num_lines * (len(width) if isinstance(width, str) else int(width)))


def _check_wordwrap(
    meter: Meter,
    s: Any,
    width: Any = 79,
    _: Any = True,
    wrapstring: Any = None,
    *__: Any,
    **___: Any,
) -> None:
    check_size(len(_text(meter, s)) * (1 + len(wrapstring or "")))


_OWN_CHECKS: dict[str, Check] = {
    "replace": _check_replace,
    "format": _check_format,
    "indent": _check_indent,
    "wordwrap": _check_wordwrap,
}

_MADE_TEXT = frozenset(
    "capitalize center e escape forceescape lower safe string trim truncate upper".split()
)
"""Filters that turn whatever they get into text."""


def _text(meter: Meter, value: Any) -> str:
    if isinstance(value, str):
        return value
    meter.text_size(value)
    return str(value)


def _sum(environment: Environment, iterable: Any, attribute: Any = None, start: Any = 0) -> Any:
    """Numbers only: with a list as the start, every item would copy all that came before it."""
    if not isinstance(start, (int, float)):
        raise SecurityError("it sums up with a start that is no number")
    return sync_do_sum(environment, iterable, attribute, start)


def _join(context: Context, value: Any, d: Any = "", attribute: Any = None) -> str:
    """jinja2's, with the size known before."""
    if attribute is not None:
        value = map(make_attrgetter(context.environment, attribute), value)
    return joined(context.parent[METER], list(value), str(d))


def _tojson(
    context: Context,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja2's own filter escapes HTML, which no model was trained on."""
    check_numbers((indent,))
    context.parent[METER].text_size(
        value,
        per_item=4 + sum(map(len, separators or ())),
        indent=len(indent) if isinstance(indent, str) else indent or 0,
    )
    return dump_spelled(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def finalized(context: Context, value: Any) -> Any:
    """jinja2's hook for everything that is printed: it becomes text after this."""
    if isinstance(value, (list, tuple, dict)):
        context.parent[METER].text_size(value)
    return value


def check_method(
    meter: Meter, text: str, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, ...]:
    """Refuse a call of a text's own method whose result is too large.

    Returns:
        The arguments to call it with; an iterator that had to be measured is a list in them.
    """
    if name in ("format", "format_map"):
        check_format(meter, text, "{", (*args, dict(kwargs)))
        return args
    check_numbers((*args, *kwargs.values()))
    if name == "join" and len(args) == 1:
        meter.charge_items(args[0])
        parts = list(args[0])
        meter.text_size(parts, per_item=len(text))
        return (parts,)
    if name == "replace" and all(isinstance(value, str) for value in args[:2]):
        check_replace(text, *args)
    elif name == "expandtabs":
        width = next(iter((*args, *kwargs.values())), 8)
        check_size(len(text) + text.count("\t") * int(width))
    elif name == "translate":
        widest = max((meter.text_size(table) for table in args), default=1)
        check_size(len(text) * widest)
    return args
