"""Where conversations are cut, and how the rest is summarised: costs instead of tokens."""

import itertools

import pytest

from brim.chat.overflow import (
    Conversation,
    ToSummarize,
    next_cut,
    replay_cuts,
    split_pieces,
    summary_instruction,
    summary_prompt,
    with_summary,
)
from brim.core.request import Message, ToolCall

SYSTEM = Message(role="system", content="Be kind.")


def conversation(roles: str, cost: int = 10) -> Conversation:
    """One message for each letter: system, user, assistant and tool by their first ones."""
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    messages = tuple(Message(role=names[r], content=f"{r}{i}") for i, r in enumerate(roles))
    return Conversation(messages, (cost,) * len(roles))


def cuts(roles: str, limit: int, target: int, fixed: int = 0) -> list[int]:
    return replay_cuts(
        conversation(roles), fixed_tokens=fixed, limit_tokens=limit, target_tokens=target
    )


def test_exchanges_begin_with_users_and_hold_calls_with_their_results() -> None:
    """What answers a user's message, tools included, is one exchange with it."""
    assert conversation("ssuauatatau").starts == [2, 4, 10]
    assert conversation("sauau").starts == [1, 2, 4], "a greeting is an exchange of its own"
    assert conversation("ss").starts == []


def test_nothing_is_cut_up_to_the_limit() -> None:
    """A prompt of exactly the limit stays; one token more is cut."""
    assert cuts("uauau", limit=50, target=30) == []
    assert cuts("uauau", limit=49, target=30) == [2]


def test_a_cut_leaves_the_target_or_the_newest_exchange() -> None:
    """As many of the oldest go as it takes, and never the newest."""
    assert cuts("suauauau", limit=60, target=40, fixed=10) == [5]
    assert cuts("suauauau", limit=20, target=5, fixed=10)[-1] == 7
    assert cuts("suatatat", limit=20, target=5, fixed=10) == []


def test_the_cut_stays_while_the_conversation_grows_again() -> None:
    """Of forty requests few move the cut, and those that do move it forward."""
    roles = "su" + "au" * 39
    last = [
        (cuts(roles[: 2 + 2 * n], limit=200, target=100, fixed=10) or [1])[-1] for n in range(40)
    ]
    assert last == sorted(last)
    assert sum(before != after for before, after in itertools.pairwise(last)) == 5


def test_the_next_cut_drops_enough_or_all_but_the_newest() -> None:
    """None where nothing is left to drop."""
    six = conversation("uauauau")
    assert next_cut(six, 0, 15) == 2
    assert next_cut(six, 0, 25) == 4
    assert next_cut(six, 2, 999) == 6
    assert next_cut(six, 6, 1) is None


def test_a_summary_ends_the_system_prompt() -> None:
    """The system prompt's own words stay the beginning; the turns stay as they are."""
    turns = (Message(role="user", content="Hi"),)
    first, second = with_summary([SYSTEM], turns, "They met.")
    assert first.content.startswith("Be kind.\n\nSummary of the earlier part")
    assert first.content.endswith("They met.")
    assert second is turns[0]


def test_without_a_system_prompt_a_summary_opens_the_users_message() -> None:
    """A template's own system prompt stays, and one that refuses any is not asked."""
    (only,) = with_summary([], [Message(role="user", content="Hi")], "They met.")
    assert only.role == "user"
    assert only.content.endswith("They met.\n\nHi")
    added, answer = with_summary([], [Message(role="assistant", content="Yes?")], "They met.")
    assert (added.role, answer.content) == ("user", "Yes?")


@pytest.mark.parametrize(("roles", "num_messages"), [("ua", 4), ("u", 2)])
def test_the_instruction_follows_the_turns(roles: str, num_messages: int) -> None:
    """What the model has read comes first; two user messages never follow each other."""
    piece = conversation(roles).messages
    work = ToSummarize(system=(SYSTEM,), pieces=(piece,), max_tokens=100)
    messages = summary_prompt(work, 0, "")
    assert messages[0] is SYSTEM
    assert len(messages) == num_messages
    assert messages[-1].content.endswith(summary_instruction(100))
    later = summary_prompt(work, 0, "They met.")
    assert later[0].content.endswith("They met.")
    assert later[1:] == messages[1:]


def test_pieces_end_at_the_cuts_and_fit() -> None:
    """A piece is what went in one cut, split between exchanges where that is too long."""
    talk = conversation("suauauauau")
    pieces = split_pieces(talk, [3, 9], 40, len)
    assert [[m.content for m in piece] for piece in pieces] == [
        ["u1", "a2"],
        ["u3", "a4", "u5", "a6"],
        ["u7", "a8"],
    ]


def test_an_exchange_over_the_window_is_summarised_as_a_transcript() -> None:
    """Nothing of it is lost: the parts add up to who said what, calls included."""
    call = ToolCall(name="look", arguments='{"at": "sky"}')
    messages = (
        Message(role="user", content="x" * 100),
        Message(role="assistant", content="", tool_calls=(call,)),
        Message(role="user", content="Well?"),
    )
    pieces = split_pieces(Conversation(messages, (100, 20, 5)), [2], 30, len)
    assert all(len(piece) == 1 and len(piece[0].content) <= 30 for piece in pieces)
    text = "".join(piece[0].content for piece in pieces)
    assert text.startswith("user: " + "x" * 100 + "\n\nassistant: ")
    assert '{"at": "sky"}' in text
