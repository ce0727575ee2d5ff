"""Where turns begin and end in a prompt's text, from renderings alone."""

from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise

import pytest
from support.chat_templates import (
    CHATML,
    HEADERS,
    HERMES,
    INST,
    PLAIN,
    TEXT_CALLS,
    THINKING,
    TURNS,
)

from brim.chat.template import ChatTemplate
from brim.chat.turns import Outline, common_length, locate, outline
from brim.core.request import Message, ToolCall
from brim.errors import InvalidRequest

SYSTEM = Message(role="system", content="Be brief.")


def user(text: str) -> Message:
    return Message(role="user", content=text)


def said(text: str, reasoning: str | None = None) -> Message:
    return Message(role="assistant", content=text, reasoning=reasoning)


def stepped(number: int) -> list[Message]:
    """A call with its reasoning, and the result."""
    call = ToolCall(id=f"c{number}", name="look", arguments=f'{{"n": {number}}}')
    return [
        Message(role="assistant", content="", reasoning=f"Step {number}.", tool_calls=(call,)),
        Message(role="tool", content=f"found {number}", tool_call_id=f"c{number}"),
    ]


def outlined(source: str, messages: Sequence[Message]) -> Outline:
    template = ChatTemplate(
        source, bos_piece="<s>", eos_piece="</s>", now=lambda: datetime(2026, 2, 3)
    )

    def render(part: Sequence[Message], is_open: bool) -> str:
        return template.render(part, {}, is_open)

    return outline(render, messages)


def ends(found: Outline) -> list[str]:
    """The text before each end, as far as the end before."""
    places = [0, *([found.system_end] if found.system_end else []), *found.ends]
    return [found.text[start:end] for start, end in pairwise(places)]


def starts(found: Outline) -> list[str]:
    """The first word of each turn but the first."""
    return [found.text[start:].partition(" ")[0].partition("\n")[0] for start in found.starts[1:]]


def test_a_conversation_ends_at_its_system_prompt_and_its_users_turns() -> None:
    """The user's header is what all share, the words that open the model's turn are not."""
    found = outlined(CHATML, [SYSTEM, user("a"), said("b"), user("c")])
    assert ends(found) == [
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n",
        "a<|im_end|>\n",
        "<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n",
    ]
    assert starts(found) == ["a<|im_end|>", "b<|im_end|>", "c<|im_end|>"]


def test_only_the_last_two_turns_are_looked_for() -> None:
    """A long history costs no more renderings than a short one."""
    messages = [SYSTEM, user("a"), said("b"), user("c"), said("d"), user("e")]
    found = outlined(CHATML, messages)
    assert [text[-12:] for text in ends(found)] == [
        "start|>user\n",
        "c<|im_end|>\n",
        "e<|im_end|>\n",
    ]


def test_a_run_of_results_ends_one_turn() -> None:
    """The model speaks after the last of them."""
    call = ToolCall(name="look", arguments="{}")
    results = [Message(role="tool", content=str(n)) for n in range(2)]
    messages = [user("a"), Message(role="assistant", content="", tool_calls=(call, call)), *results]
    found = outlined(HERMES, messages)
    assert found.text[: found.ends[0]].endswith("a<|im_end|>\n")
    assert found.system_end == 0
    assert found.text[: found.ends[-1]].endswith("<tool_response>\n1\n</tool_response><|im_end|>\n")
    assert len(found.ends) == 2


@pytest.mark.parametrize("source", [CHATML, HERMES, HEADERS, INST, PLAIN, THINKING, TEXT_CALLS])
def test_what_is_before_an_end_stays_when_the_conversation_grows(source: str) -> None:
    """The text up to each end is the beginning of the next prompt, plain turns and tool turns."""
    messages = [SYSTEM, user("ask 1")]
    prompts = [outlined(source, messages)]
    tools = [] if source == INST else [stepped(1), stepped(2)]
    for added in [
        *tools,
        [said("Done."), user("ask 2")],
        [said("So.", reasoning="Hm."), user("?")],
    ]:
        messages = [*messages, *added]
        prompts.append(outlined(source, messages))
    for before, after in pairwise(prompts):
        # What was thought between tool calls is dropped when the user speaks again.
        is_asked = source == THINKING and "ask 2" in after.text[-60:]
        for end in (before.system_end, *(() if is_asked else before.ends)):
            assert after.text.startswith(before.text[:end])


def test_thoughts_stay_within_a_turn_and_are_gone_behind_it() -> None:
    """Between calls the end behind a result holds, and when the user speaks only the user's do."""
    first = [SYSTEM, user("ask")]
    second = [*first, *stepped(1)]
    third = [*second, *stepped(2)]
    fourth = [*third, said("Done."), user("more")]
    texts = [outlined(THINKING, messages) for messages in (first, second, third, fourth)]
    assert texts[2].text.startswith(texts[1].text[: texts[1].ends[-1]])
    assert not texts[3].text.startswith(texts[1].text[: texts[1].ends[-1]])
    assert texts[3].text.startswith(texts[0].text[: texts[0].ends[-1]])


def test_a_system_prompt_that_moves_along_ends_nothing() -> None:
    """Where the template writes it into the last turn, only what is before that turn stays."""
    found = outlined(INST, [SYSTEM, user("a"), said("b"), user("c")])
    assert found.text == "<s>[INST]a[/INST] b</s>[INST]Be brief.\n\nc[/INST]"
    assert found.text[: found.ends[-1]] == "<s>[INST]a[/INST] b</s>[INST]"


def test_a_template_that_refuses_parts_still_gives_the_rest() -> None:
    """A system prompt alone, or none, may be refused; the conversation itself is not."""
    source = "{% if messages | length < 3 %}{{ raise_exception('too short') }}{% endif %}" + CHATML
    found = outlined(source, [SYSTEM, user("a"), said("b"), user("c")])
    assert found.text[: found.ends[-1]].endswith("c<|im_end|>\n")
    with pytest.raises(InvalidRequest, match="System role not supported"):
        outlined(TURNS, [SYSTEM, user("a")])


def test_turns_are_found_through_reasoning_calls_and_empty_contents() -> None:
    """A turn begins with the first of its words that the template shows."""
    messages = [SYSTEM, user(" ask"), *stepped(1), said("<think>x</think>Done."), user("")]
    found = outlined(THINKING, messages)
    assert starts(found)[:4] == ["ask<|im_end|>", 'look",', "found", "Done.<|im_end|>"]
    assert found.starts[-1] == len(found.text)


def test_a_template_that_looks_at_the_words_has_no_turn_starts() -> None:
    """Marks that would change the prompt are noticed, and nothing is made up."""
    source = CHATML.replace("{{ m.content }}", "{{ m.content | length }}{{ m.content }}")
    assert outlined(source, [user("a"), said("b"), user("c")]).starts == ()


def test_words_like_the_marks_are_left_alone() -> None:
    """A conversation about marks gives no positions rather than wrong ones."""
    assert outlined(CHATML, [user("xbrimturn1x"), said("b"), user("c")]).starts == ()


def test_places_are_turn_and_token_counted_from_one() -> None:
    """A turn without tokens is never where a position lies."""
    assert [locate(at, (0, 5, 5, 9)) for at in (0, 4, 5, 9, 20)] == [
        (1, 1),
        (5, 1),
        (1, 3),
        (1, 4),
        (12, 4),
    ]


def test_common_lengths_are_those_of_the_longest_common_beginning() -> None:
    """Also of empty, equal and entirely different ones."""
    assert common_length("", "a") == 0
    assert common_length("ab", "ba") == 0
    assert common_length("abc" * 99, "abc" * 99) == 297
    assert common_length([1, 2, 3], [1, 2, 4, 3]) == 2
