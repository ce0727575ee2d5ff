"""Where a conversation's turns begin and end in its prompt: in the text, then in tokens.

Positions are found from renderings alone, since templates may do anything with a message: move it,
drop its reasoning, treat the last one differently.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence

import msgspec

from brim.core.request import Message
from brim.errors import InvalidRequest

Render = Callable[[Sequence[Message], bool], str]
"""Messages, and whether the words that open the model's turn follow, to text."""

NUM_LAST_TURNS = 2
"""Ends of turns that are looked for, from the newest: the one that this prompt adds, and the one
that the prompt before it added.  Each costs a rendering."""


class Outline(msgspec.Struct, frozen=True):
    """Positions in a prompt's text, in characters."""

    text: str
    system_end: int
    """Up to here prompts with this system prompt are alike, whatever the user says; 0 where there
    is none."""
    probes: tuple[str, ...]
    """Prompts of other conversations with this system prompt."""
    ends: tuple[int, ...]
    """Behind turns of the user, rising: up to each the text stays the same when the conversation
    grows."""
    starts: tuple[int, ...]
    """Where each message's own words begin; empty where the template hides it."""
    longer: str | None
    """The prompt of the conversation as it may go on; None where the template refuses to."""


def locate(position: int, turn_starts: Sequence[int]) -> tuple[int, int]:
    """Which token of which turn a position is, both counted from 1; turn 0 where there are none.

    Args:
        position: From 0.
        turn_starts: Rising, the first is 0.

    Example:
        >>> locate(7, (0, 5, 20)), locate(5, (0, 5, 20)), locate(7, ())
        ((3, 2), (1, 2), (8, 0))
    """
    turn = bisect_right(turn_starts, position)
    return position - (turn_starts[turn - 1] if turn else 0) + 1, turn


def common_length(first: Sequence[object], second: Sequence[object]) -> int:
    """Length of the longest common prefix, of texts or lists.

    Example:
        >>> common_length("abcd", "abXd"), common_length([1, 2], [1, 2, 3])
        (2, 2)
    """
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def outline(
    render: Render, messages: Sequence[Message], later: Sequence[Message] | None = None
) -> Outline:
    """Render a conversation and find its turns.

    Args:
        render: The template's.
        messages: The conversation.
        later: The same turns as the next prompt will have them, where that is known to differ.

    Raises:
        InvalidRequest: The template refuses the conversation as it is.
    """
    text = render(messages, True)
    longer = _tried(render, _continued(messages if later is None else later), True)
    probes = _probes(render, messages)
    system_end = min((common_length(text, probe) for probe in probes), default=0)
    ends: set[int] = set()
    for count in _turn_ends(messages)[-NUM_LAST_TURNS:]:
        partial = _tried(render, messages[:count], False)
        if partial is not None:
            ends.add(common_length(text, partial))
    if longer is not None:
        # Templates write some things into the last turn alone, the system prompt for one.
        stays = common_length(text, longer)
        ends = {min(end, stays) for end in ends}
        system_end = min(system_end, stays)
    return Outline(
        text=text,
        system_end=system_end,
        probes=probes,
        ends=tuple(sorted(ends - {0})),
        starts=_starts(render, messages, text),
        longer=longer,
    )


def _tried(render: Render, messages: Sequence[Message], is_open: bool) -> str | None:
    """A rendering that is only looked at: a template may refuse a conversation that ends there."""
    try:
        return render(messages, is_open)
    except InvalidRequest:
        return None


def _turn_ends(messages: Sequence[Message]) -> list[int]:
    """Numbers of messages after which the model speaks."""
    count = len(messages)
    return [
        number
        for number in range(num_system(messages) + 1, count + 1)
        if messages[number - 1].role != "assistant"
        and (number == count or messages[number].role == "assistant")
    ]


def num_system(messages: Sequence[Message]) -> int:
    """Messages of the system prompt: those before anyone speaks."""
    return next((n for n, m in enumerate(messages) if m.role != "system"), len(messages))


PROBE_WORDS = ("Aa", "\n\nBb")
"""What other users may say: the second begins with what tokenizers like to join to a line end."""


def _probes(render: Render, messages: Sequence[Message]) -> tuple[str, ...]:
    """Prompts that begin with the same system prompt; none where there is none to share."""
    count = num_system(messages)
    if not 0 < count < len(messages):
        return ()
    found = [
        _tried(render, [*messages[:count], Message(role="user", content=word)], True)
        for word in PROBE_WORDS
    ]
    return tuple(text for text in found if text is not None)


def _continued(messages: Sequence[Message]) -> list[Message]:
    """The conversation with a further exchange, of the kind that follows its last turn."""
    last_answer = max((n for n, m in enumerate(messages) if m.role == "assistant"), default=-1)
    if messages[-1].role == "tool" and last_answer >= 0:
        # After a result comes another call, or an answer; both keep what the model thought so far.
        return [*messages, *messages[last_answer:]]
    answer = Message(role="assistant", content="Aa")
    return [*messages, answer, Message(role="user", content="Aa")]


_MARK = "xbrimturn"
_MARKS = re.compile(rf"{_MARK}(\d+)x")
_TOOL_RESPONSE = "<tool_response>"
"""Qwen's templates look for it at the front of what a user says."""


def _starts(render: Render, messages: Sequence[Message], text: str) -> tuple[int, ...]:
    """Where each message begins, found by marking all of them.

    Marks that change more than themselves show in the rendering, and then there are no positions.
    """
    marked = _tried(render, [_marked(m, f"{_MARK}{n}x") for n, m in enumerate(messages)], True)
    if marked is None or _MARKS.sub("", marked) != text:
        return ()
    found: dict[int, int] = {}
    num_removed = 0
    for match in _MARKS.finditer(marked):
        found.setdefault(int(match[1]), match.start() - num_removed)
        num_removed += match.end() - match.start()
    return _filled(found, len(messages), len(text))


def _filled(found: dict[int, int], count: int, end: int) -> tuple[int, ...]:
    """Rising positions; a message without words of its own begins where the next one does."""
    starts: list[int] = []
    for number in reversed(range(count)):
        end = min(end, found.get(number, end))
        starts.append(end)
    return (0, *reversed(starts[:-1]))


def _marked(message: Message, mark: str) -> Message:
    """The mark in front of everything of the message that a template may show first."""
    calls = message.tool_calls
    if calls:
        calls = (msgspec.structs.replace(calls[0], name=mark + calls[0].name), *calls[1:])
    reasoning = message.reasoning
    return msgspec.structs.replace(
        message,
        content=_marked_content(message.content, mark),
        reasoning=_mark_word(reasoning, mark) if reasoning else reasoning,
        tool_calls=calls,
    )


def _marked_content(content: str, mark: str) -> str:
    if content.startswith(_TOOL_RESPONSE):
        return content
    thought, end, answer = content.rpartition("</think>")
    # Templates drop what stands before it.
    return (_mark_word(thought, mark) + end if end else "") + _mark_word(answer, mark)


def _mark_word(text: str, mark: str) -> str:
    """The mark before the first word: templates trim what stands before that."""
    word = text.lstrip()
    return text[: len(text) - len(word)] + mark + word if word else text
