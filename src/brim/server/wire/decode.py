"""Bytes -> request struct, with every refusal naming the field and what would be right."""

import difflib
import json
import math
import re
from typing import Any, TypeVar, get_args

import msgspec

from brim.core.request import OverflowPolicy, Priority
from brim.errors import InvalidRequest, Unsupported
from brim.server.wire import openai, options

T = TypeVar("T", bound=msgspec.Struct)

_AT = re.compile(r"^(?P<what>.*?)(?: - at (?P<key>`key` in )?`\$(?P<path>.*)`)?$", re.DOTALL)
_FIELD = re.compile(r"(?P<kind>unknown|required) field `(?P<name>.*)`$", re.DOTALL)
_WANTS_INTEGER = re.compile(r"Expected `int.*got `float`")
_JSON_WORDS = {"int": "integer", "float": "number", "str": "string", "bool": "boolean"}
_EXPECTED = {
    "role": f"expected one of {', '.join(get_args(openai.Role))}",
    "content.type": "expected text",
    "tool_calls.type": "expected function",
    "brim.priority": f"expected one of {', '.join(Priority)}",
    "brim.overflow": f"expected one of {', '.join(OverflowPolicy)}",
    "brim.cache.namespace": "expected 1 to 64 letters, digits, dots, underscores or dashes",
}
"""The end of a path, without places in lists -> what belongs there, where msgspec does not say."""

_TEXT_ALONE = "only parts of type text are done; leave the others out"
_MAX_SHOWN_CHARS = 60
"""Of a client's own value or field name quoted in a message."""


def decode(body: bytes, schema: type[T]) -> T:
    """The request in `body`.

    Raises:
        InvalidRequest: Not JSON, not of this schema, a field unknown, mistyped, out of range or
            given twice; `param` names it.
        Unsupported: A field asks for what is not done.
    """
    if not body.strip():
        raise InvalidRequest("the request body is empty; send a JSON object")
    try:
        request = _decode(body, schema)
        # The hook for numbers spares making them, and lets other threads run in between.
        json.loads(body, object_pairs_hook=_without_duplicates, parse_int=_skip, parse_float=_skip)
    except msgspec.ValidationError as exc:
        raise _explain(str(exc), body, schema) from None
    except RecursionError:
        raise InvalidRequest("the request body is nested too deeply") from None
    except UnicodeDecodeError as exc:
        raise InvalidRequest(
            f"the request body is not UTF-8: {exc.reason} at byte {exc.start} of a string"
        ) from None
    except ValueError as exc:  # msgspec.DecodeError is one, as is an integer of a million digits
        raise InvalidRequest(f"the request body is not JSON: {_one_line(str(exc))}") from None
    return request


def _decode(body: bytes, schema: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=schema)
    except msgspec.ValidationError as exc:
        if not _WANTS_INTEGER.search(str(exc)):
            raise
    # JSON has one kind of number: 3.0 is an integer where one is asked for.  msgspec tells them
    # apart, so what it refuses for that gets a second, slower look.
    return msgspec.convert(_integral_decoder.decode(body), schema)


def _integral(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError("Number out of range")
    return int(value) if value.is_integer() and abs(value) < 2**63 else value


_integral_decoder = msgspec.json.Decoder(float_hook=_integral)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> None:
    # msgspec keeps the last of two equal keys; which one the client meant, nobody knows.
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            raise InvalidRequest(f"field {_shown(name)} is given twice", param=name)
        seen.add(name)


def _skip(digits: str) -> None:
    pass


def _explain(message: str, body: bytes, schema: type[msgspec.Struct]) -> InvalidRequest:
    """The message of msgspec as a sentence about the client's field."""
    at = _AT.match(message)
    assert at is not None  # the pattern takes any text
    what, path = at["what"], (at["path"] or "").removeprefix(".")
    if not re.search("[a-z]", path):  # "[...]" alone says nothing
        path = ""
    field = _FIELD.search(what)
    if field is not None and field["kind"] == "unknown":
        return _unknown(field["name"], path, schema)
    if field is not None:
        name = _join(path, field["name"])
        return InvalidRequest(f"required field `{name}` is missing", param=name)
    refusal = _refusal(path, body)
    if refusal is not None:
        return Unsupported(f"{path}: {refusal}", param=path)
    where = f"`{path}`" if path else "the request body"
    where = f"a key of {where}" if at["key"] else where + _value_at(path, body)
    return InvalidRequest(f"{where}: {_in_json_words(what, path)}", param=path or None)


def _in_json_words(what: str, path: str) -> str:
    names = re.sub(r"\[[^]]*\]", "", f".{path}")
    for end, expected in _EXPECTED.items():
        if names.endswith(f".{end}"):
            return expected
    what = re.sub(r"\b(int|float|str|bool)\b", lambda m: _JSON_WORDS[m[1]], what).replace("`", "")
    return what[:1].lower() + what[1:]


def _unknown(name: str, path: str, schema: type[msgspec.Struct]) -> InvalidRequest:
    if name in openai.UNSUPPORTED_PARTS and path.endswith("]"):
        return Unsupported(f"{path}: {_TEXT_ALONE}", param=_join(path, name))
    owner = _owner(path, schema)
    near = difflib.get_close_matches(name, owner.__struct_fields__, n=1)
    hint = f"; did you mean `{near[0]}`?" if near else "; docs/api.md lists the known ones"
    return InvalidRequest(
        f"unknown field {_shown(_join(path, name))}{hint}", param=_join(path, name)
    )


def _owner(path: str, schema: type[msgspec.Struct]) -> type[msgspec.Struct]:
    """The struct that an object at `path` is decoded to."""
    owners: dict[str, type[msgspec.Struct]] = {
        "messages": openai.ChatMessage,
        "content": openai.TextPart,
        "tool_calls": openai.HistoryToolCall,
        "function": openai.CalledFunction,
        "stream_options": openai.StreamOptions,
        "response_format": openai.TextFormat,
        "brim": options.BrimOptions,
        "cache": options.CacheChoice,
    }
    names = re.findall(r"[a-z_]+", path)
    return owners.get(names[-1], schema) if names else schema


def _refusal(path: str, body: bytes) -> str | None:
    """Why a field that is declared but not done is refused, for paths inside such a field."""
    names = re.findall(r"[a-z_]+", path)
    for name in names:
        if name in openai.UNSUPPORTED:
            return openai.UNSUPPORTED[name]
    if names[-2:] == ["content", "type"]:
        kind = _lookup(path, body)
        return _TEXT_ALONE if isinstance(kind, str) and kind in openai.UNSUPPORTED_PARTS else None
    return None


def _value_at(path: str, body: bytes) -> str:
    value = _lookup(path, body) if path else None
    is_scalar = isinstance(value, (bool, int, float, str))
    return f" is {_shown(json.dumps(value, ensure_ascii=False))}" if is_scalar else ""


def _lookup(path: str, body: bytes) -> Any:
    """What stands at msgspec's path; None where it cannot be found, as for a key of a mapping."""
    try:
        value: Any = msgspec.json.decode(body)
        for name, index in re.findall(r"([a-z_]+)|\[(\d+)\]", path):
            value = value[name] if name else value[int(index)]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return None if "[...]" in path else value


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _shown(text: str) -> str:
    line = _one_line(text)
    return f"`{line if len(line) <= _MAX_SHOWN_CHARS else line[:_MAX_SHOWN_CHARS] + '...'}`"


def _one_line(text: str) -> str:
    return " ".join(text.split())
