"""Where a conversation is cut when it outgrows the window, and what stands for the rest.

Pure: messages and their costs in tokens, no tokenizer.  A conversation is its system prompt and
its exchanges: a user's message with all that answered it, tool calls and their results included.
Only whole exchanges go, the oldest first.

The cut must stay where it is from one request to the next, or no request would begin as the last
one did and the prefix cache would never hit.  So it is not computed from the newest request but by
living through the conversation from its beginning: each time that it would have been over the
limit, it is cut well below.  That depends on the messages alone.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from brim.core.request import Message

SYSTEM_ROLES = frozenset({"system", "developer"})

START_PART = 0.85
"""Of the window: a longer prompt is cut, so that the answer has room.  The design's figure."""

TARGET_PART = 0.5
"""Of the window: what a cut leaves at most.  The cut then stays for as many turns as it takes to
grow by a third of the window, and in each of them the prefix cache hits."""

SUMMARY_HEADING = "Summary of the earlier part of this conversation:"

SUMMARY_INSTRUCTION = (
    "Summarize our conversation so far in at most {num_words} words: facts, names, numbers, "
    "decisions and open questions. Write only the summary."
)

WORDS_PER_TOKEN = 0.6
"""English has about 0.75 words a token; what is asked for must end before it is cut off."""

MIN_PIECE_TOKENS = 32
"""A conversation is not summarised in pieces shorter than this: each costs a request."""


class Conversation(NamedTuple):
    """Messages with what each adds to the prompt."""

    messages: tuple[Message, ...]
    costs: tuple[int, ...]
    """Tokens of each message, about; at least what they turn out to be keeps a cut in place."""

    @property
    def num_system(self) -> int:
        """Messages of the system prompt: those before the first other one."""
        return next(
            (i for i, m in enumerate(self.messages) if m.role not in SYSTEM_ROLES),
            len(self.messages),
        )

    @property
    def starts(self) -> list[int]:
        """Where each exchange begins, rising; what comes before a user's word is one too."""
        first = self.num_system
        return [
            i for i, m in enumerate(self.messages) if i == first or (i > first and m.role == "user")
        ]

    def kept(self, cut: int) -> tuple[Message, ...]:
        """The system prompt and the messages from `cut` on."""
        return self.messages[: self.num_system] + self.messages[cut:]


class ToSummarize(msgspec.Struct, frozen=True, kw_only=True):
    """What a model must summarise before its conversation fits."""

    system: tuple[Message, ...]
    """The conversation's system prompt, which every piece is read under: the model has just read
    system prompt and turns in this order, so that their KV may still be there."""
    pieces: tuple[tuple[Message, ...], ...]
    """Oldest first; each is summarised together with the summary of those before it."""
    max_tokens: int
    """Of each summary."""


def replay_cuts(
    conversation: Conversation, *, fixed_tokens: int, limit_tokens: int, target_tokens: int
) -> list[int]:
    """Every place where the conversation was cut as it grew, rising; the last one holds.

    Args:
        conversation: All of it.
        fixed_tokens: What every prompt has: the system prompt and the words that open the answer.
        limit_tokens: Longest prompt that is left as it is.
        target_tokens: A prompt over the limit is cut to this or less, or to its newest exchange.

    Example:
        >>> turns = [Message(role=r, content="") for r in ("user", "assistant") * 3]
        >>> six = Conversation(tuple(turns), (10,) * 6)
        >>> replay_cuts(six, fixed_tokens=0, limit_tokens=45, target_tokens=30)
        [2]
    """
    messages, costs = conversation.messages, conversation.costs
    starts = conversation.starts
    if not starts:
        return []
    cuts: list[int] = []
    position = 0  # of the first exchange that is kept, in `starts`
    newest = 0
    size = fixed_tokens
    for index in range(starts[0], len(messages)):
        if newest + 1 < len(starts) and starts[newest + 1] == index:
            newest += 1
        size += costs[index]
        is_asked = index + 1 == len(messages) or messages[index + 1].role == "assistant"
        if size <= limit_tokens or not is_asked or position == newest:
            continue
        while position < newest and size > target_tokens:
            size -= sum(costs[starts[position] : starts[position + 1]])
            position += 1
        cuts.append(starts[position])
    return cuts


def next_cut(conversation: Conversation, cut: int, over_tokens: int) -> int | None:
    """The nearest later cut that makes the prompt shorter by `over_tokens`.

    The newest exchange where none does; None where `cut` is there already.
    """
    later = [start for start in conversation.starts if start > cut]
    for start in later:
        if sum(conversation.costs[cut:start]) >= over_tokens:
            return start
    return later[-1] if later else None


def with_summary(
    system: Sequence[Message], turns: Sequence[Message], summary: str
) -> tuple[Message, ...]:
    """The messages with the summary of what went before `turns`.

    It ends the system prompt, which stays the beginning that all share.  Where there is none, it
    opens the first user's message: a system prompt of ours would displace the one that a template
    writes by itself, and some templates refuse any.
    """
    note = f"{SUMMARY_HEADING}\n{summary}"
    if system:
        return (*system[:-1], _extended(system[-1], after=note), *turns)
    if turns and turns[0].role == "user":
        return (_extended(turns[0], before=note), *turns[1:])
    return (Message(role="user", content=note), *turns)


def summary_prompt(work: ToSummarize, piece: int, summary: str) -> tuple[Message, ...]:
    """The messages that make the model summarise one piece.

    The instruction comes last, so that everything before it is what the model has read already.

    Args:
        work: What is to be summarised.
        piece: Which of its pieces.
        summary: Of the pieces before it; empty for the first.
    """
    turns = work.pieces[piece]
    instruction = summary_instruction(work.max_tokens)
    if turns and turns[-1].role == "user":  # many templates refuse two in a row
        turns = (*turns[:-1], _extended(turns[-1], after=instruction))
    else:
        turns = (*turns, Message(role="user", content=instruction))
    return with_summary(work.system, turns, summary) if summary else (*work.system, *turns)


def summary_instruction(max_tokens: int) -> str:
    """What the model is told, for a summary of at most so many tokens.

    Example:
        >>> summary_instruction(100)[:56]
        'Summarize our conversation so far in at most 60 words: f'
    """
    return SUMMARY_INSTRUCTION.format(num_words=max(10, int(max_tokens * WORDS_PER_TOKEN)))


def split_pieces(
    conversation: Conversation,
    cuts: Sequence[int],
    max_tokens: int,
    cost: Callable[[str], int],
) -> tuple[tuple[Message, ...], ...]:
    """What lies before the last cut, in pieces that the model can read at once.

    Pieces end at the cuts, where they ended when the conversation was shorter: so the summary of
    the earlier ones is one that was made before.

    Args:
        conversation: All of it.
        cuts: Rising.
        max_tokens: Of one piece.
        cost: Tokens of a text.
    """
    pieces: list[tuple[Message, ...]] = []
    bounds = [conversation.num_system, *cuts]
    for start, end in itertools.pairwise(bounds):
        group: list[Message] = []
        num_tokens = 0
        exchanges = [s for s in conversation.starts if start <= s < end]
        for first, last in zip(exchanges, [*exchanges[1:], end], strict=True):
            exchange = conversation.messages[first:last]
            num_exchange_tokens = sum(conversation.costs[first:last])
            if group and num_tokens + num_exchange_tokens > max_tokens:
                pieces.append(tuple(group))
                group, num_tokens = [], 0
            if num_exchange_tokens > max_tokens:
                pieces += _split_exchange(exchange, max_tokens, cost)
            else:
                group += exchange
                num_tokens += num_exchange_tokens
        if group:
            pieces.append(tuple(group))
    return tuple(pieces)


def _split_exchange(
    exchange: Sequence[Message], max_tokens: int, cost: Callable[[str], int]
) -> list[tuple[Message, ...]]:
    """An exchange that is over the window by itself, as a transcript in parts."""
    transcript = "\n\n".join(f"{m.role}: {text_of(m)}" for m in exchange)
    parts: list[tuple[Message, ...]] = []
    queue = [transcript]
    while queue:
        text = queue.pop()
        if len(text) > 1 and cost(text) > max_tokens:
            middle = len(text) // 2
            queue += [text[middle:], text[:middle]]
        else:
            parts.append((Message(role="user", content=text),))
    return parts


def text_of(message: Message) -> str:
    r"""Everything in a message that a template may write, as one text.

    Example:
        >>> text_of(Message(role="user", content="hi", name="Ann"))
        'hi\nAnn'
    """
    found: list[str] = []
    fields = msgspec.structs.asdict(message)
    del fields["role"]
    queue: list[object] = [fields]
    while queue:
        value = queue.pop(0)
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, msgspec.Struct):
            queue += msgspec.structs.asdict(value).values()
        elif isinstance(value, dict):
            queue += value.values()
        elif isinstance(value, (list, tuple)):
            queue += value
        elif value is not None:
            found.append(str(value))
    return "\n".join(found)


def _extended(message: Message, *, before: str = "", after: str = "") -> Message:
    content = "\n\n".join(part for part in (before, message.content, after) if part)
    return msgspec.structs.replace(message, content=content)
