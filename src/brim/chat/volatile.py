"""Lines that agent clients write into the system prompt and that change while nothing else does.

A prompt's KV can be used again up to its first new token, so one line with the time of day near the
front of the system prompt makes every request a new one.  The lines that are known here are moved
behind what stays: a date, or a time that stays for a session, to the end of the system prompt; a
running clock to the front of the last user turn.  A billing line says nothing to a model and is
left out.  Only these forms are taken, whole, and from the system prompt alone; docs/prompts.md
lists them with their sources.
"""

import re
from collections.abc import Sequence

import msgspec

from brim.chat.turns import num_system
from brim.core.answer import LinePlace, MovedLine
from brim.core.request import Message

_DAY = r"(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day"
_SHORT_DAY = r"(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun)"
_SHORT_MONTH = r"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)"
_MONTH = (
    r"(?:January|February|March|April|May|June|July|August|September|October|November|December)"
)
_ISO_DATE = r"\d{4}-\d\d-\d\d"
_LONG_DATE = rf"{_DAY}, {_MONTH} \d{{1,2}}, \d{{4}}"
_DATE = rf"(?:{_ISO_DATE}|\d{{1,2}}/\d{{1,2}}/\d{{4}}|{_SHORT_DAY} {_SHORT_MONTH} \d\d \d{{4}})"
_ISO_TIME = rf"{_ISO_DATE}[T ]\d\d:\d\d(?::\d\d)?(?:\.\d{{1,9}})?(?:Z|[+-]\d\d:\d\d)?"
_CLOCK = r"\d{1,2}:\d\d(?::\d\d)? [AP]M"


class KnownLine(msgspec.Struct, frozen=True):
    """A line, or a few, of one client, told by form and surroundings."""

    kind: str
    sign: str
    """Text that is in it: most system prompts are done with when none of these is found."""
    pattern: re.Pattern[str]
    """Its group `line` is what is taken."""
    moved_to: LinePlace


def _known(kind: str, sign: str, pattern: str, moved_to: LinePlace) -> KnownLine:
    return KnownLine(kind, sign, re.compile(pattern, re.MULTILINE), moved_to)


KNOWN_LINES = (
    _known(
        "claude-code billing",
        "x-anthropic-billing-header:",
        # Also without an end of line: some gateways join it to the next block as it is.
        r"\A(?P<line>x-anthropic-billing-header:(?:[ \t]*\w+=[^;\s]*;)+[ \t]*\n*)",
        LinePlace.NOWHERE,
    ),
    _known(
        "env date",
        "Today's date: ",
        # No further block begins inside: or many openings would each be followed to the end.
        rf"^<env>\n(?:(?!</?env>).*\n)*?(?P<line>[ \t]*Today's date: {_DATE}\n)",
        LinePlace.SYSTEM_END,
    ),
    _known(
        "hermes start",
        "Conversation started: ",
        rf"^(?P<line>Conversation started: {_LONG_DATE}(?: {_CLOCK})?(?:\n|\Z))",
        LinePlace.SYSTEM_END,
    ),
    _known(
        "kimi start",
        "The current date and time in ISO format is ",
        rf"^(?P<line>The current date and time in ISO format is `{_ISO_TIME}`\..*(?:\n|\Z))",
        LinePlace.SYSTEM_END,
    ),
    _known(
        "pi clock",
        "Current date and time: ",
        rf"^(?P<line>Current date and time: {_LONG_DATE} at {_CLOCK} [A-Z0-9+:-]+(?:\n|\Z))",
        LinePlace.LAST_USER_TURN,
    ),
    _known(
        "openhands clock",
        "<CURRENT_DATETIME>",
        rf"^(?P<line><CURRENT_DATETIME>\nThe current date and time is: {_ISO_TIME}\n"
        r"</CURRENT_DATETIME>(?:\n|\Z))",
        LinePlace.LAST_USER_TURN,
    ),
    _known(
        "nanobot clock",
        "## Current Time\n",
        rf"^(?P<line>## Current Time\n{_ISO_DATE} \d\d:\d\d \({_DAY}\)(?: \(\S+\))?(?:\n|\Z))",
        LinePlace.LAST_USER_TURN,
    ),
    _known(
        "agno clock",
        "- The current time is ",
        rf"^(?P<line>- The current time is {_ISO_TIME}\.(?:\n|\Z))",
        LinePlace.LAST_USER_TURN,
    ),
)


class Canonical(msgspec.Struct, frozen=True):
    """A conversation whose beginning stays the same from request to request."""

    messages: tuple[Message, ...]
    indices: tuple[int, ...]
    """Of each message, its place among those that came."""
    moved: tuple[MovedLine, ...] = ()
    turn_prefix: str = ""
    """What was put at the front of the last user turn."""

    @classmethod
    def unchanged(cls, messages: Sequence[Message]) -> "Canonical":
        """The conversation as it came."""
        return cls(tuple(messages), tuple(range(len(messages))))

    def later(self, messages: Sequence[Message]) -> list[Message] | None:
        """Some of the messages as a later prompt has them, when another turn is the last.

        None where they stay as they are.
        """
        asked = _last_asked(messages)
        if not self.turn_prefix or asked is None:
            return None
        later = list(messages)
        content = later[asked].content.removeprefix(self.turn_prefix)
        later[asked] = msgspec.structs.replace(later[asked], content=content)
        return later


def canonicalise(messages: Sequence[Message]) -> Canonical:
    r"""Move known volatile lines out of the prefix's way.

    Example:
        >>> line = "x-anthropic-billing-header: cc_version=2.1.0; cch=1a2b3;"
        >>> system = Message(role="system", content=line + "\nBe brief.")
        >>> canonicalise([system, Message(role="user", content="Hi")]).messages[0].content
        'Be brief.'
    """
    found: list[MovedLine] = []
    system: list[tuple[int, Message]] = []
    count = num_system(messages)
    for index, message in enumerate(messages[:count]):
        content = _without(message.content, index, found)
        if content == message.content:
            system.append((index, message))
        elif content.strip():
            system.append((index, msgspec.structs.replace(message, content=content)))
    if not found:
        return Canonical.unchanged(messages)
    return _placed(system, list(enumerate(messages))[count:], found)


def _without(content: str, index: int, found: list[MovedLine]) -> str:
    """The text without its volatile lines, which are appended to `found`."""
    spans: list[tuple[int, int]] = []
    for line in KNOWN_LINES:
        match = line.pattern.search(content) if line.sign in content else None
        if match is not None:
            spans.append(match.span("line"))
            text = match["line"].strip()
            found.append(
                MovedLine(kind=line.kind, message_index=index, moved_to=line.moved_to, text=text)
            )
    for start, end in sorted(spans, reverse=True):
        content = content[:start] + content[end:]
    return content


def _placed(
    system: list[tuple[int, Message]], turns: list[tuple[int, Message]], found: list[MovedLine]
) -> Canonical:
    """The conversation with what was taken out put where it goes."""
    asked = _last_asked([message for _, message in turns])
    moved = [_place(line, asked is not None) for line in found]
    at_end = [line.text for line in moved if line.moved_to is LinePlace.SYSTEM_END]
    in_turn = [line.text for line in moved if line.moved_to is LinePlace.LAST_USER_TURN]
    if at_end and system:
        index, last = system[-1]
        content = last.content.rstrip("\n") + "\n\n" + "\n".join(at_end)
        system[-1] = (index, msgspec.structs.replace(last, content=content))
    elif at_end:
        system = [(moved[-1].message_index, Message(role="system", content="\n".join(at_end)))]
    prefix = "\n".join(in_turn) + "\n\n" if in_turn else ""
    if asked is not None:
        index, turn = turns[asked]
        turns[asked] = (index, msgspec.structs.replace(turn, content=prefix + turn.content))
    both = [*system, *turns]
    return Canonical(
        tuple(message for _, message in both),
        tuple(index for index, _ in both),
        tuple(moved),
        prefix,
    )


def _place(line: MovedLine, has_turn: bool) -> MovedLine:
    if line.moved_to is LinePlace.LAST_USER_TURN and not has_turn:
        return msgspec.structs.replace(line, moved_to=LinePlace.SYSTEM_END)
    return line


def _last_asked(messages: Sequence[Message]) -> int | None:
    """The newest turn of the user."""
    return max((n for n, message in enumerate(messages) if message.role == "user"), default=None)
