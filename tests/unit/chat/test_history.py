"""Turns that agents send back: every template gets calls in the form that it can show."""

import json
from datetime import datetime

import pytest
from support.chat_templates import (
    CHATML,
    HEADERS,
    HERMES,
    INST,
    PARAMETERS,
    TEXT_CALLS,
    THINKING,
)

from brim.chat.history import SpelledNumber, dump_spelled, parse_arguments
from brim.chat.template import ChatTemplate
from brim.core.request import Message, ToolCall

ARGUMENTS = '{"zone": "b", "at": {"x": 1.50, "n": [1e3, -0, 12345678901234567890123456789012345]}}'


def made(source: str) -> ChatTemplate:
    return ChatTemplate(source, bos_piece="<s>", eos_piece="</s>", now=lambda: datetime(2026, 2, 3))


def turns(arguments: str = ARGUMENTS, content: str = "") -> list[Message]:
    call = ToolCall(id="c1", name="look", arguments=arguments)
    return [
        Message(role="user", content="Go."),
        Message(role="assistant", content=content, tool_calls=(call,)),
        Message(role="tool", content="blue", tool_call_id="c1", name="look"),
    ]


@pytest.mark.parametrize(
    ("source", "before"),
    [
        (HERMES, '<tool_call>\n{"name": "look", "arguments": '),
        (THINKING, '<tool_call>\n{"name": "look", "arguments": '),
        (HEADERS, '{"name": "look", "parameters": '),
        (TEXT_CALLS, "<|Assistant|><|tool_call|>look\n"),
    ],
)
def test_a_call_is_shown_as_it_was_written(source: str, before: str) -> None:
    """Keys stay in order, and every number keeps its spelling, in text and in object form."""
    assert before + ARGUMENTS in made(source).render(turns(), {})


def test_arguments_reach_a_template_that_takes_them_apart() -> None:
    """Names and values come one by one, numbers as the model spelt them."""
    text = made(PARAMETERS).render(turns('{"b": 1.50, "a": "x"}'), {})
    assert "<parameter=b>\n1.50\n</parameter>\n<parameter=a>\nx\n</parameter>" in text


@pytest.mark.parametrize("arguments", ['{"b": 1.5', "[1]", "blue"])
def test_a_call_that_went_wrong_does_not_end_the_conversation(arguments: str) -> None:
    """A template that takes objects apart gets it as text, and all other turns as ever."""
    good = turns('{"b": 1.50}')
    text = made(PARAMETERS).render([*good, *turns(arguments)], {})
    assert "<parameter=b>\n1.50\n</parameter>" in text
    assert f'<tool_call>\n{{"name": "look", "arguments": {arguments}}}\n</tool_call>' in text
    assert f'"arguments": {json.dumps(arguments)}}}' in made(HERMES).render(turns(arguments), {})


@pytest.mark.parametrize("source", [CHATML, INST])
def test_a_template_without_calls_gets_them_as_text(source: str) -> None:
    """Nothing that the model said is lost: the call stands in the content, after its words."""
    text = made(source).render(turns('{"b": 1.50}', content="Let me see."), {})
    assert (
        'Let me see.\n<tool_call>\n{"name": "look", "arguments": {"b": 1.50}}\n</tool_call>' in text
    )


def test_what_a_turn_does_not_have_is_not_defined() -> None:
    """As with Hugging Face, templates can ask whether a field is there."""
    source = (
        "{% for m in messages %}{{ m.tool_calls is defined }}{{ m.reasoning_content is defined }}"
        "{{ m.tool_call_id is defined }} {% endfor %}"
    )
    plain = Message(role="assistant", content="x")
    full = Message(role="assistant", content="x", reasoning="", tool_call_id="1")
    assert made(source).render([plain, full], {}) == "FalseFalseFalse FalseTrueTrue "


def test_ids_and_names_of_calls_and_results_reach_the_template() -> None:
    """A template may match results to calls."""
    source = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.id }}{{ c.type }} "
        "{{ c.function.arguments | tojson }}{{ c.function.name }} {% endfor %}"
        "{{ m.tool_call_id }}{{ m.name }}{% endfor %}"
    )
    assert made(source).render(turns("{}"), {}) == "c1function {}look c1look"


@pytest.mark.parametrize("text", ["not json", "[1]", '"x"', '{"a": NaN}', '{"a": 1', "[" * 99_999])
def test_arguments_that_are_no_object_stay_text(text: str) -> None:
    """Models write such things too, and they are shown as they are."""
    assert parse_arguments(text) == text


@pytest.mark.parametrize("text", ["", " \n"])
def test_no_arguments_are_an_empty_object(text: str) -> None:
    """Some clients send nothing for a call without arguments."""
    assert parse_arguments(text) == {}


@pytest.mark.parametrize("spelling", ["1.50", "1E5", "-0", "1e999", "9" * 5000, "0.10"])
def test_spellings_survive_a_round_trip(spelling: str) -> None:
    """Whatever Python would write for the number."""
    text = f'{{"a": [{spelling}, "{spelling}"]}}'
    value = parse_arguments(text)
    assert isinstance(value, dict)
    assert str(value["a"][0]) == spelling
    assert dump_spelled(value) == text


def test_other_numbers_are_plain_python_numbers() -> None:
    """A template can count and compare with them."""
    value = parse_arguments('{"a": 3, "b": 0.5, "c": -7}')
    assert isinstance(value, dict)
    assert not any(isinstance(number, SpelledNumber) for number in value.values())
    assert dump_spelled(value, indent=1) == json.dumps(value, indent=1)
