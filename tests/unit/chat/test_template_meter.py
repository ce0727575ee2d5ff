"""Filters, formats and methods in templates: jinja2's results, within time and size."""

from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from brim.chat.filters import _SLOW_TESTS
from brim.chat.template import ChatTemplate
from brim.core.request import Message
from brim.errors import InvalidRequest

USER = Message(role="user", content="hi")
VARIABLES: dict[str, Any] = {
    "t": "One <b>two</b> three\n4 http://a.example",
    "n": [3, 1, 2, 1],
    "d": {"b": 1, "a": [2, None, True]},
    "m": [{"r": "u", "c": "x"}, {"r": "a", "c": "y"}, {"r": "u", "c": "z"}],
}


def render(source: str, **variables: Any) -> str:
    template = ChatTemplate(source, bos_piece="", eos_piece="")
    return template.render([USER], variables)


def failure(source: str, **variables: Any) -> str:
    with pytest.raises(InvalidRequest) as caught:
        render(source, **variables)
    return caught.value.message


@pytest.mark.parametrize(
    "expression",
    [
        *(f"t|{name}" for name in (
            "capitalize", "center(60)", "count", "default('x')", "e", "escape", "first",
            "forceescape", "format", "indent", "indent('> ', true)", "int(7)", "float(1.5)",
            "last", "length", "list", "lower", "pprint", "replace('o', '0')", "safe",
            "replace('o', '00', 1)", "replace('', '-')", "reverse", "string", "striptags",
            "title", "trim", "trim('O')", "truncate(12)", "truncate(9, true, '')", "upper",
            "urlencode", "urlize", "wordcount", "wordwrap(5)", "wordwrap(5, wrapstring='|')",
            "unique|list", "map('upper')|join('.')", "batch(9)|list", "slice(3)|list", "max",
        )),
        *(f"n|{name}" for name in (
            "sum", "sum(start=1.5)", "sort", "sort(reverse=true)", "min", "max", "unique|list",
            "join", "join(', ')", "first", "last", "list", "batch(3, 0)|list", "reverse|list",
            "slice(3)|list", "select('odd')|list", "reject('eq', 1)|list", "select('in', [1])|list",
            "map('string')|map('int')|sum", "string", "length", "random > 0",
        )),
        *(f"d|{name}" for name in (
            "dictsort", "items|list", "length", "xmlattr", "urlencode", "list", "attr('x')",
            "string", "pprint", "join", "default({})",
        )),
        *(f"m|{name}" for name in (
            "map(attribute='c')|join('+')", "selectattr('r', 'equalto', 'u')|list|length",
            "rejectattr('r', 'eq', 'u')|map(attribute='c')|list", "groupby('r')",
            "join(',', attribute='c')", "selectattr('q', 'defined')|list", "max(attribute='c')",
            "sort(attribute='c', reverse=true)|first", "unique(attribute='r')|list|length",
        )),
        "(-2.5)|abs", "2.567|round(1)", "2.567|round(1, 'floor')", "10000|filesizeformat",
        "'%s is %d (%5.2f)'|format('x', 3, 2.5)", "'%(a)s'|format(a=1)", "'%s %%' % 'x'",
        "'%s-%05d' % ('x', 3)", "7 % 4", "'On 20260101: %s' % 'x'", "'{:>9}|{x}'.format(1, x=n)",
        "'On 20260101: {}'.format('x')", "'{0[a]}'.format(d)", "'-'.join(m|map(attribute='c'))",
        "'a\tb'.expandtabs(4)", "'aXbX'.replace('X', '--')", "'a' in 'cat'", "1 in n",
        "n == [3, 1, 2, 1]", "d != {}", "1 < 2 <= 3", "n is iterable", "'x' is lower",
        "2 is in n", "n + [4]", "n * 2", "missing|default('x')", "missing is defined",
        "none == missing", "[1, [2, (3,)]]", "d.items()|list", "t.split()",
    ],
)  # fmt: skip
def test_metered_expressions_give_what_jinja_gives(expression: str) -> None:
    """Every filter, with its options, has the result of jinja2's own sandbox."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    source = "{{ " + expression + " }}"
    assert render(source, **VARIABLES) == environment.from_string(source).render(**VARIABLES)


GROWING = "{% set s = namespace(x=[1]) %}{% for i in range(60) %}{% set s.x = [s.x, s.x] %}"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ (([a] * 60000)|sum(start=[]))|length }}", "no number"),
        ("{{ (([a] * 60000)|sum(none, []))|length }}", "no number"),
        ("{{ ('a' * 30000000)|replace('a', 'bb') }}", "builds a value"),
        ("{{ ('a' * 30000000).replace('a', 'bb') }}", "builds a value"),
        ("{{ 'ab'|replace('', 'c' * 30000000) }}", "builds a value"),
        ("{{ '%999999999d' % 1 }}", "width"),
        ("{{ '%.999999999f' % 1 }}", "width"),
        ("{{ '%*d' % (999999999, 1) }}", "width"),
        ("{{ '%999999999d'|format(1) }}", "width"),
        ("{{ ('%s' * 100) % (('a' * 1000000,) * 100) }}", "builds a value"),
        ("{{ '{:999999999}'.format(1) }}", "width"),
        ("{{ '{:{}}'.format(1, 999999999) }}", "width"),
        ("{{ ('{0}' * 100).format('a' * 1000000) }}", "builds a value"),
        ("{{ '{x:999999999}'.format_map({'x': 1}) }}", "width"),
        ("{{ ('a' * 1000000).join('b' * 100) }}", "builds a value"),
        ("{{ ('b' * 100)|join('a' * 1000000) }}", "builds a value"),
        ("{{ [('a' * 1000000)]|batch(9999, 'a' * 1000000)|first|join }}", "builds a value"),
        ("{{ ('a\n' * 100000)|indent(9999) }}", "builds a value"),
        ("{{ ('a\n' * 100000)|indent('b' * 9999) }}", "builds a value"),
        ("{{ ('\t' * 100000).expandtabs(9999) }}", "builds a value"),
        ("{{ ('a' * 1000000).translate({97: 'b' * 1000000}) }}", "builds a value"),
        ("{{ ('a b ' * 20000)|wordwrap(1, wrapstring='c' * 9999) }}", "builds a value"),
        ("{{ 1.5|round(999999999) }}", "width"),
        ("{{ ('<!---->' * 100000)|striptags }}", "slow filter"),
        ("{{ ('a ' * 100000)|wordcount }}", "slow filter"),
        ("{{ ('f' * 1000000)|int(base=16) }}", "bits"),
        ("{{ [('a' * 1000000)] * 100000 }}", "builds a value"),
        ("{{ ([('a' * 1000000)] * 100000)|string }}", "builds a value"),
        ("{{ ([('a' * 1000000)] * 100000)|tojson }}", "builds a value"),
        ("{{ ([('a' * 1000000)] * 100000)|sort }}", "builds a value"),
        ("{{ ([('a' * 1000000)] * 100000) ~ 'x' }}", "builds a value"),
        ("{{ ([1] * 100000)|tojson(indent=9999) }}", "builds a value"),
        ("{{ [0] * 2000000 }}", "builds a value"),
        (GROWING + "{% endfor %}{{ s.x }}", "more than"),
        (GROWING + "{% endfor %}{{ s.x|tojson }}", "more than"),
        (GROWING + "{% endfor %}{{ s.x == [s.x[0], s.x[1] + []] }}", "more than"),
        (GROWING + "{% endfor %}{{ s.x is eq([s.x[0], s.x[1] + []]) }}", "more than"),
    ],
)
def test_filters_cannot_grow_past_the_bounds(
    source: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would be too large is refused before it is made."""
    monkeypatch.setattr("brim.chat.meter.MAX_STEPS", 200_000)
    assert words in failure(source, a=[1])


@pytest.mark.parametrize(
    "source",
    [
        "{{ range(9999)|map('string')|map('upper')|map('lower')|list|length }}",
        "{{ range(20000)|list|length }}",
        "{% for i in range(999) %}{{ range(999)|sum }}{% endfor %}",
        "{% for i in range(999) %}{{ range(999)|select('none')|list }}{% endfor %}",
        "{% for i in range(9000) %}{{ i|string }}{{ i|string }}{% endfor %}",
        "{{ ('a' * 20000)|list|length }}",
    ],
)
def test_what_filters_go_through_is_counted(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every filter is a step, and so is every item that it walks over."""
    monkeypatch.setattr("brim.chat.meter.MAX_STEPS", 10_000)
    assert "more than 10000" in failure(source)


def test_constants_are_not_computed_at_compile_time() -> None:
    """jinja2 folds constants while it compiles, where no meter runs: metered ones are left."""
    for source in ("{{ 'a'|upper }}", "{{ 1 is eq(1) }}", "{{ 'a'|join }}"):
        template = ChatTemplate(source, bos_piece="", eos_piece="", max_render_s=-1)
        with pytest.raises(InvalidRequest, match="takes longer"):
            template.render([USER], {})


def test_the_slow_tests_exist_in_jinja() -> None:
    """The list of tests that are metered names tests that there are."""
    assert set(ImmutableSandboxedEnvironment().tests) >= _SLOW_TESTS
