"""Lines of agent clients that change with every request are put where they do no harm."""

from typing import Any

import pytest

from brim.chat.volatile import KNOWN_LINES, canonicalise
from brim.core.answer import LinePlace
from brim.core.request import Message

BILLING = "x-anthropic-billing-header: cc_version=2.1.177.01c; cc_entrypoint=sdk-cli; cch={};"
USER = Message(role="user", content="Hi")

SAMPLES: dict[str, tuple[str, tuple[str, str]]] = {
    "claude-code billing": (BILLING + "\nYou are a CLI.\n", ("36ee5", "0aaa9")),
    "env date": (
        "You are opencode.\n<env>\n  Platform: linux\n  Today's date: {}\n</env>\nBe kind.",
        ("Mon Sep 07 2026", "Tue Sep 08 2026"),
    ),
    "hermes start": (
        "You are Hermes.\n\nConversation started: {}\nModel: m",
        ("Sunday, April 26, 2026 05:07 AM", "Friday, May 22, 2026"),
    ),
    "kimi start": (
        "You are Kimi.\n\n## Date and Time\n\nThe current date and time in ISO format is `{}`. "
        "This is only a reference.\n\n## Working Directory\n",
        ("1970-01-01T00:00:00+00:00", "2026-02-03T04:05:06.789012"),
    ),
    "pi clock": (
        "You are pi.\nCurrent date and time: {}\nCurrent working directory: /tmp",
        ("Monday, March 9, 2026 at 06:00:31 PM PDT", "Tuesday, March 10, 2026 at 7:01:02 AM GMT+2"),
    ),
    "openhands clock": (
        "You help.\n<CURRENT_DATETIME>\nThe current date and time is: {}\n</CURRENT_DATETIME>\nBye",
        ("2026-06-11T00:44:42.714237", "2026-06-11T00:45:00+02:00"),
    ),
    "nanobot clock": (
        "# nanobot\n\n## Current Time\n{}\n\n## Runtime\nLinux",
        ("2026-02-06 12:34 (Friday)", "2026-02-07 01:02 (Saturday) (CET)"),
    ),
    "agno clock": (
        "<additional_information>\n- Use markdown.\n- The current time is {}.\n"
        "</additional_information>",
        ("2026-07-21 12:12:34.567890", "2026-07-21 12:13:00.1+00:00"),
    ),
}
"""A system prompt of each client, and two values of what changes in it."""


def chat(system: str, **fields: Any) -> list[Message]:
    return [Message(role="system", content=system, **fields), USER]


def test_there_is_a_sample_of_every_known_line() -> None:
    """Nothing is recognised that no test shows."""
    assert [line.kind for line in KNOWN_LINES] == list(SAMPLES)


@pytest.mark.parametrize("kind", SAMPLES)
def test_prompts_that_differ_in_a_volatile_line_begin_alike(kind: str) -> None:
    """The system prompts are equal up to where the line was put, and the report says where."""
    form, values = SAMPLES[kind]
    first, second = (canonicalise(chat(form.format(value))) for value in values)
    (moved,) = first.moved
    assert (moved.kind, moved.message_index) == (kind, 0)
    shared = first.messages[0].content
    if moved.moved_to is LinePlace.SYSTEM_END:
        assert shared.endswith("\n\n" + moved.text)
        shared = shared.removesuffix(moved.text)
    else:
        assert second.messages[0].content == shared
    assert second.messages[0].content.startswith(shared)
    assert values[0] in moved.text
    assert values[0] not in shared


@pytest.mark.parametrize("kind", SAMPLES)
def test_the_model_still_reads_the_line_unless_it_is_about_billing(kind: str) -> None:
    """What was moved is there once; every other word stays in its place."""
    form, values = SAMPLES[kind]
    system = form.format(values[0])
    found = canonicalise(chat(system))
    (moved,) = found.moved
    whole = "\n".join(message.content for message in found.messages)
    assert whole.count(moved.text) == (moved.moved_to is not LinePlace.NOWHERE)
    kept = found.messages[0].content.removesuffix("\n\n" + moved.text)
    assert kept.split() == system.replace(moved.text, "").split()


def test_a_clock_stands_in_front_of_the_last_user_turn() -> None:
    """Earlier turns do not change with it, and neither does what follows the user's words."""
    form, values = SAMPLES["pi clock"]
    result = Message(role="tool", content="3")
    earlier = [USER, Message(role="assistant", content="Yes?"), USER, result]
    system = Message(role="system", content=form.format(values[0]))
    found = canonicalise([system, *earlier])
    line = found.moved[0].text
    assert found.messages[1:3] == tuple(earlier[:2])
    assert found.messages[3].content == f"{line}\n\nHi"
    assert found.messages[4] == result
    later = found.later(found.messages)
    assert later is not None
    assert later[1:] == earlier


def test_without_a_users_turn_a_clock_ends_the_system_prompt() -> None:
    """It is never lost, and the report says where it went."""
    form, values = SAMPLES["pi clock"]
    found = canonicalise(chat(form.format(values[0]))[:1])
    (moved,) = found.moved
    assert moved.moved_to is LinePlace.SYSTEM_END
    assert found.messages[0].content.endswith(moved.text)


def test_a_message_of_billing_alone_goes_and_places_stay_known() -> None:
    """Some gateways send each block of the system prompt as a message of its own."""
    messages = [Message(role="system", content=BILLING.format("00000")), *chat("Be brief.")]
    found = canonicalise(messages)
    assert found.messages == tuple(messages[1:])
    assert found.indices == (1, 2)
    assert found.moved[0].moved_to is LinePlace.NOWHERE


def test_billing_that_runs_into_the_next_block_is_told_apart() -> None:
    """Parts are joined as they are, so the line may have no end."""
    found = canonicalise(chat(BILLING.format("00000") + "You are a CLI."))
    assert found.messages[0].content == "You are a CLI."


def test_several_lines_are_moved_at_once() -> None:
    """Each to its own place, in one system prompt or in several."""
    env, clock = SAMPLES["env date"], SAMPLES["pi clock"]
    both = BILLING.format("0") + "\n" + env[0].format(env[1][0]) + "\n"
    messages = [
        Message(role="system", content=both),
        *chat(clock[0].format(clock[1][0])),
    ]
    found = canonicalise(messages)
    assert [line.moved_to for line in found.moved] == [
        LinePlace.NOWHERE,
        LinePlace.SYSTEM_END,
        LinePlace.LAST_USER_TURN,
    ]
    assert [line.message_index for line in found.moved] == [0, 0, 1]
    assert found.messages[1].content.endswith("Current working directory: /tmp\n\n"
                                              "Today's date: Mon Sep 07 2026")  # fmt: skip
    assert found.messages[2].content.startswith("Current date and time: ")


@pytest.mark.parametrize(
    "system",
    [
        "Today's date: 2026-02-03\nBe brief.",
        "<env>\n</env>\nToday's date: 2026-02-03\n",
        "<env>\nToday's date: soon\n</env>",
        "Say: Conversation started: Friday, May 22, 2026",
        "Conversation started: a while ago\n",
        "Current date and time: now\n",
        "The header x-anthropic-billing-header: cch=1; is dropped.",
        "x-anthropic-billing-header: is a header",
        "## Current Time\nis what you are asked for\n",
        "- The current time is noon.\n",
    ],
)
def test_other_words_about_dates_are_left_alone(system: str) -> None:
    """Only whole lines of the known forms are taken, never what merely looks like one."""
    messages = chat(system)
    found = canonicalise(messages)
    assert found.messages == tuple(messages)
    assert found.moved == ()
    assert found.indices == (0, 1)
    assert found.later(messages) is None


def test_a_date_is_found_in_a_block_behind_one_that_is_never_closed() -> None:
    """A block's own opening is the last one before the line; others before it cost no more."""
    line = "Today's date: 2026-02-03\n"
    (moved,) = canonicalise(chat("<env>\n" * 3 + "cwd: /\n" + line + "</env>\n")).moved
    assert moved.kind == "env date"
    pattern = next(line.pattern for line in KNOWN_LINES if line.kind == "env date")
    assert pattern.match("<env>\n" * 2 + line) is None


@pytest.mark.parametrize("kind", SAMPLES)
def test_what_users_and_models_say_is_left_alone(kind: str) -> None:
    """The same lines outside the system prompt stay where they are."""
    form, values = SAMPLES[kind]
    messages = [
        Message(role=role, content=form.format(values[0])) for role in ("user", "assistant")
    ]
    later_system = Message(role="system", content=form.format(values[0]))
    assert canonicalise([*messages, later_system]).moved == ()
