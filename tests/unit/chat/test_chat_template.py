"""Chat templates: Hugging Face's dialect, bounded, with one sentence for every failure."""

from datetime import datetime
from typing import Any

import pytest

from brim.chat.meter import MAX_SIZE
from brim.chat.template import MAX_SOURCE_CHARS, ChatTemplate
from brim.core.request import Message
from brim.errors import InvalidRequest

USER = Message(role="user", content="hi")


def make(source: str | None, **options: Any) -> ChatTemplate:
    return ChatTemplate(source, bos_piece="<s>", eos_piece="</s>", **options)


def render(source: str, **variables: Any) -> str:
    return make(source).render([USER], variables)


def failure(source: str | None, **variables: Any) -> str:
    with pytest.raises(InvalidRequest) as caught:
        make(source).render([USER], variables)
    assert "\n" not in caught.value.message
    return caught.value.message


def test_the_small_models_own_template_renders_a_conversation(template_source: str) -> None:
    """Roles, contents and the opening of the model's turn come out as the model was trained."""
    messages = [Message(role="system", content="Be brief."), USER]
    assert make(template_source).render(messages, {}) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_the_opening_of_the_models_turn_can_be_left_out(template_source: str) -> None:
    """With add_generation_prompt=False the text ends with the last message."""
    text = make(template_source).render([USER], {}, add_generation_prompt=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n"


def test_special_tokens_and_variables_reach_the_template() -> None:
    """bos_token, eos_token, `tools` (none) and the request's own variables are defined."""
    source = (
        "{{ bos_token }}{{ thinking }}{{ tools is none }}{{ documents is none }}{{ eos_token }}"
    )
    assert render(source, thinking=False) == "<s>FalseTrueTrue</s>"


def test_a_name_is_given_only_where_there_is_one() -> None:
    """`message.name` is undefined for a message without a name, as with Hugging Face."""
    template = make("{% for m in messages %}{{ m.name is defined }} {% endfor %}")
    named = Message(role="user", content="", name="ada")
    assert template.render([USER, named], {}) == "False True "


def test_whitespace_follows_hugging_face() -> None:
    """The line break after a block tag and the indentation before it are dropped."""
    assert render("{% if true %}\n    {% set x = 1 %}\n  a\n{% endif %}\nb") == "  a\nb"


def test_tojson_does_not_escape_html_or_unicode() -> None:
    """`tojson` is plain JSON and takes json.dumps's arguments."""
    assert render("{{ v|tojson }}", v={"b": "<é>", "a": 1}) == '{"b": "<é>", "a": 1}'
    assert render("{{ v|tojson(indent=1, sort_keys=true) }}", v={"b": 2, "a": 1}) == (
        '{\n "a": 1,\n "b": 2\n}'
    )


def test_loop_controls_generation_blocks_and_loop_variables_work() -> None:
    """`break`, `continue`, `{% generation %}` and `loop` act as they do with Hugging Face."""
    source = (
        "{% for i in [1, 2, 3, 4] if i != 2 %}{% if loop.last %}{% continue %}{% endif %}"
        "{% generation %}{{ i }}/{{ loop.length }} {% endgeneration %}{% endfor %}"
        "{% for i in [1, 2] %}{% break %}{% endfor %}"
    )
    assert render(source) == "1/3 3/3 "


def test_concatenation_keeps_jinjas_meaning() -> None:
    """`~` turns both sides into text and joins them."""
    assert render("{{ 'a' ~ 1 ~ none ~ messages[0].role }}") == "a1Noneuser"


def test_strftime_now_asks_the_clock_it_was_given() -> None:
    """A template's date comes from the injected clock."""
    template = make("{{ strftime_now('%d %b %Y') }}", now=lambda: datetime(2026, 2, 3))
    assert template.render([USER], {}) == "03 Feb 2026"


@pytest.mark.parametrize("source", [None, "", "  \n"])
def test_a_model_without_a_template_says_what_to_use_instead(source: str | None) -> None:
    """There is no fallback format: the error names /v1/completions and --raw."""
    message = failure(source)
    assert message.startswith("this model has no chat template")
    assert "/v1/completions" in message
    assert "--raw" in message


def test_a_template_that_refuses_is_quoted() -> None:
    """`raise_exception` reaches the client in the template's own words, on one line."""
    message = failure("{{ raise_exception('roles must\nalternate') }}")
    assert message == "this model's chat template refuses the messages: roles must alternate"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("a\n{% if %}", "line 2"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "RecursionError"),
        ("x" * (MAX_SOURCE_CHARS + 1), str(MAX_SOURCE_CHARS)),
        ("{{ messages[3].content }}", "no element 3"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% include 'x' %}", "no loader"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
    ],
)
def test_every_other_failure_is_one_sentence_with_a_way_out(source: str, words: str) -> None:
    """Compile errors, run-time errors and forbidden access are InvalidRequest with the reason."""
    message = failure(source)
    assert words in message
    assert "/v1/completions" in message


DOUBLING = "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = %s %}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ range(1000000) }}", "MAX_RANGE"),
        (DOUBLING.replace("%s", "n.x ~ n.x"), "builds a value"),
        (DOUBLING.replace("%s", "n.x + n.x"), "builds a value"),
        ("{{ 'ab' * 10 ** 12 }}", "builds a value"),
        ("{{ 10 ** 10 ** 10 }}", "bits"),
        ("{{ 'a'.ljust(10 ** 9) }}", "width"),
        ("{{ 'a'|center(10 ** 9) }}", "width"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% for i in range(99) %}{{ 'a' * 1000000 }}{% endfor %}", f"more than {MAX_SIZE}"),
    ],
)
def test_templates_that_would_grow_without_end_are_ended(source: str, words: str) -> None:
    """Text, integers and output that double or explode stop at their bounds."""
    assert words in failure(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
        "{% for i in range(9999) %}{% for j in range(9999) if false %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    ],
)
def test_templates_that_would_run_without_end_are_ended(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nested loops and branching recursion print nothing, and still end at the step bound."""
    monkeypatch.setattr("brim.chat.meter.MAX_STEPS", 10_000)
    assert "more than 10000 loop turns and calls" in failure(source)


def test_a_template_that_takes_too_long_is_given_up() -> None:
    """The deadline is looked at on every loop turn and call."""
    template = make("{% for m in messages %}{% endfor %}", max_render_s=-1)
    with pytest.raises(InvalidRequest, match="takes longer than"):
        template.render([USER], {})


@pytest.mark.parametrize("name", ["messages", "bos_token", "tools", "brim meter", "_x", ""])
def test_reserved_variable_names_are_refused(name: str) -> None:
    """A request cannot replace what the renderer itself provides, nor reach the meter."""
    with pytest.raises(InvalidRequest) as caught:
        make("{{ 1 }}").render([USER], {name: 1})
    assert caught.value.param == "chat_template_kwargs"
    assert repr(name) in caught.value.message
