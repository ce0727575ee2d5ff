"""Turns that agents send back, in the shapes that templates read: reasoning, tool calls, results.

A turn has to become the same text whenever it is sent, or no later prompt finds what an earlier one
left: so arguments of a call keep their keys' order and the spelling of their numbers, and what a
template needs of them is found out once for the template, not guessed from the turn.
"""

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

import msgspec

from brim.core.request import Message, ToolCall


class CallForm(msgspec.Struct, frozen=True, kw_only=True):
    """How a template wants turns with tool calls."""

    has_objects: bool
    """Arguments as an object; otherwise as the JSON text."""
    empty_content: str | None
    """What stands for the content of a turn that only calls."""
    takes_text: bool = True
    """With objects: arguments that models wrote as something else may come as their text."""


class _AsText(Enum):
    AS_TEXT = "as text"


AS_TEXT = _AsText.AS_TEXT
"""The template shows no calls, so they are written into the content."""

ChosenForm = CallForm | _AsText

CALL_FORMS = (
    CallForm(has_objects=True, empty_content=""),
    CallForm(has_objects=True, empty_content=None),
    CallForm(has_objects=False, empty_content=""),
    CallForm(has_objects=False, empty_content=None),
)
"""In this order: objects are Hugging Face's convention, text is that of DeepSeek's older templates,
which also tell a call by its missing content."""

_ID, _NAME, _VALUE = "brimprobe", "brim_probe_call", "brim_probe_value"


def _probe(arguments: str) -> tuple[Message, ...]:
    """A conversation with a call; Mistral's templates want nine characters of its id."""
    call = ToolCall(id=_ID, name=_NAME, arguments=arguments)
    return (
        Message(role="user", content="a"),
        Message(role="assistant", content="", tool_calls=(call,)),
        Message(role="tool", content="b", tool_call_id=_ID),
    )


def choose_form(render: Callable[[Sequence[Mapping[str, Any]]], str | None]) -> ChosenForm:
    """The first form of which a template shows the whole call.

    Args:
        render: Messages as templates index them to text, or None where the template refuses.
    """

    def rendered(form: CallForm, arguments: str) -> str | None:
        return render([plain(message, form) for message in _probe(arguments)])

    for form in CALL_FORMS:
        text = rendered(form, f'{{"key": "{_VALUE}"}}')
        if text is not None and _shows_call(text):
            # Some take arguments apart, and one call that went wrong would end the conversation.
            takes_text = rendered(form, _VALUE) is not None
            return msgspec.structs.replace(form, takes_text=takes_text)
    return AS_TEXT


def _shows_call(text: str) -> bool:
    """Whether name and value are there, as JSON or bare, and nothing in Python's own spelling."""
    is_python = f"'{_VALUE}'" in text or "None" in text
    # Kimi's templates write the id, which has the name in it.
    is_named = _NAME in text or _ID in text
    return is_named and _VALUE in text and not is_python


def plain(message: Message, form: ChosenForm) -> dict[str, Any]:
    """A message as templates index it; what it does not have is not defined, as in Hugging Face."""
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name is not None:
        fields["name"] = message.name
    if message.reasoning is not None:
        fields["reasoning_content"] = message.reasoning
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    if message.tool_calls and isinstance(form, CallForm) and _can_show(message, form):
        fields["tool_calls"] = [_plain_call(call, form) for call in message.tool_calls]
        fields["content"] = message.content or form.empty_content
    elif message.tool_calls:
        fields["content"] = "\n".join(
            [*filter(None, [message.content]), *map(_call_as_text, message.tool_calls)]
        )
    return fields


def _can_show(message: Message, form: CallForm) -> bool:
    """Whether arguments are what the template wants, for all calls of a turn."""
    if not form.has_objects or form.takes_text:
        return True
    return all(isinstance(parse_arguments(call.arguments), dict) for call in message.tool_calls)


def _plain_call(call: ToolCall, form: CallForm) -> dict[str, Any]:
    arguments = parse_arguments(call.arguments) if form.has_objects else call.arguments
    named = {"id": call.id} if call.id is not None else {}
    return {
        **named,
        "type": "function",
        "function": {"name": call.name, "arguments": arguments},
    }


def _call_as_text(call: ToolCall) -> str:
    """As Hermes models write a call, which most others have learnt too.

    Source: NousResearch's Hermes function calling format.
    """
    name = json.dumps(call.name, ensure_ascii=False)
    return f'<tool_call>\n{{"name": {name}, "arguments": {call.arguments or "{}"}}}\n</tool_call>'


class SpelledNumber(float):
    """A number of JSON that Python would write differently, with its spelling.

    Example:
        >>> str(SpelledNumber("1.50")), SpelledNumber("1e3") == 1000
        ('1.50', True)
    """

    def __new__(cls, spelling: str) -> "SpelledNumber":
        """Of the JSON text of a number."""
        number = super().__new__(cls, spelling)
        number.spelling = spelling
        return number

    spelling: str

    def __str__(self) -> str:
        return self.spelling

    __repr__ = __str__


def parse_arguments(text: str) -> dict[str, Any] | str:
    """Arguments of a call as an object; the text itself where it is none, as models also write.

    Example:
        >>> parse_arguments('{"b": 1.50, "a": 2}')
        {'b': 1.50, 'a': 2}
    """
    if not text.strip():
        return {}
    try:
        value = json.loads(
            text, parse_float=_number, parse_int=_number, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


_MAX_INTEGER_CHARS = 30
"""Longer ones keep their spelling too: making an integer takes quadratic time."""


def _number(spelling: str) -> float:
    if len(spelling) <= _MAX_INTEGER_CHARS:
        if spelling.lstrip("-").isdecimal():
            integer = int(spelling)
            return integer if str(integer) == spelling else SpelledNumber(spelling)
        number = float(spelling)
        if repr(number) == spelling:
            return number
    return SpelledNumber(spelling)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def dump_spelled(value: Any, **options: Any) -> str:
    """`json.dumps` with the spelling of numbers that `parse_arguments` kept.

    Example:
        >>> dump_spelled(parse_arguments('{"b": [1.50, 1e3], "a": 2}'))
        '{"b": [1.50, 1e3], "a": 2}'
    """
    spellings: list[str] = []
    mark = secrets.token_hex(8)  # in no client's text

    def hidden(item: Any) -> Any:
        if isinstance(item, SpelledNumber):
            spellings.append(item.spelling)
            return f"{mark}{len(spellings) - 1}"
        if isinstance(item, dict):
            return {key: hidden(part) for key, part in item.items()}
        return [hidden(part) for part in item] if isinstance(item, (list, tuple)) else item

    shown = hidden(value) if _has_spelled(value) else value
    text = json.dumps(shown, **options)
    if not spellings:
        return text
    return re.sub(rf'"{mark}(\d+)"', lambda match: spellings[int(match[1])], text)


def _has_spelled(value: Any) -> bool:
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, SpelledNumber):
            return True
        if isinstance(item, (list, tuple)):
            waiting.extend(item)
        elif isinstance(item, dict):
            waiting.extend(item.values())
    return False
