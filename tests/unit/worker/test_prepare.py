"""From request to prompt tokens, with the teaching engine's tokenizer."""

from datetime import datetime
from typing import Any

import msgspec
import pytest
from support.models import plan_for

from brim.core.request import Message, OverflowPolicy, Request
from brim.engine.byte_tokenizer import ByteTokenizer
from brim.errors import ContextOverflow, InvalidRequest
from brim.worker.prepare import BuiltPrompt, PromptBuilder

BOS = ByteTokenizer.BOS
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content }}<|im_end|>"
    "{% endfor %}{{ suffix }}"
)


def built(
    template: str | None = TEMPLATE, *, context_tokens: int = 32, day: int = 3, **fields: Any
) -> BuiltPrompt:
    plan = plan_for("toy", context_tokens=context_tokens)
    model = msgspec.structs.replace(plan.model, chat_template=template)
    plan = msgspec.structs.replace(plan, model=model)
    request = Request(request_id="r", model="toy", **fields)
    return PromptBuilder(plan, ByteTokenizer(), now=lambda: datetime(2026, 2, day)).build(request)


def tokens(template: str | None = TEMPLATE, **fields: Any) -> list[int]:
    return built(template, **fields).tokens


def test_messages_are_rendered_and_special_tokens_read() -> None:
    """The template's control words become tokens, with one begin token."""
    messages = (Message(role="user", content="hi"),)
    expected = [BOS, ByteTokenizer.IM_START, *b"user:hi", ByteTokenizer.IM_END]
    assert tokens(messages=messages) == expected


def test_a_template_without_begin_token_gets_the_models_own() -> None:
    """A model that wants a begin token has one, whether or not its template writes it."""
    messages = (Message(role="user", content="hi"),)
    assert tokens("{{ messages[0].content }}", messages=messages) == [BOS, *b"hi"]


def test_template_variables_reach_the_template() -> None:
    """What the request passes is visible in the prompt."""
    messages = (Message(role="user", content="hi"),)
    prompt = tokens(messages=messages, template_variables={"suffix": "!"})
    assert prompt[-1] == ord("!")


def test_special_tokens_in_a_raw_prompt_are_text() -> None:
    """Only the begin token is read, and not doubled."""
    assert tokens(prompt="a<|im_end|>") == [BOS, *b"a<|im_end|>"]
    assert tokens(prompt="<|bos|>a") == [BOS, *b"a"]


def test_prompt_tokens_are_taken_as_they_are() -> None:
    """No begin token is added to what the client has tokenised."""
    assert tokens(prompt_tokens=(1, 2, 259)) == [1, 2, 259]


@pytest.mark.parametrize("bad", [260, -1])
def test_a_token_outside_the_vocabulary_is_refused(bad: int) -> None:
    """The message names the model's range."""
    with pytest.raises(InvalidRequest, match="outside 0 to 259"):
        tokens(prompt_tokens=(1, bad))


def test_an_empty_prompt_is_refused() -> None:
    """There would be nothing to draw the first token from."""
    with pytest.raises(InvalidRequest, match="no tokens"):
        tokens(prompt_tokens=())


def test_messages_without_a_template_are_refused() -> None:
    """A model without a chat template still completes prompts."""
    with pytest.raises(InvalidRequest, match="no chat template"):
        tokens(None, messages=(Message(role="user", content="hi"),))
    assert tokens(None, prompt="hi") == [BOS, *b"hi"]


def test_a_prompt_far_over_the_window_is_not_tokenised() -> None:
    """513 bytes are 42 tokens even if all were the longest, of 12; a byte less is counted."""
    assert len(tokens(prompt="x" * 512)) == 513
    with pytest.raises(ContextOverflow, match="prompt is 513 bytes, at least 42 tokens, context"):
        tokens(prompt="x" * 513)


CLOCKED = "The current date and time in ISO format is `2026-02-03T04:05:0{}Z`.\nBe brief."


def chat(*contents: str) -> tuple[Message, ...]:
    """A system prompt, and turns of user and model."""
    roles = ("system", *("user", "assistant") * len(contents))
    return tuple(Message(role=r, content=c) for r, c in zip(roles, contents, strict=False))


def test_a_chat_knows_its_turns_and_where_later_ones_will_go_on() -> None:
    """Boundaries lie behind the system prompt and behind the user's turns, by the token."""
    prompt = built(messages=chat("Be brief.", "ask", "say", "more"), context_tokens=512)
    turns = [b"system:Be brief.", b"user:ask", b"assistant:say", b"user:more"]
    lengths = [len(turn) + 2 for turn in turns]
    assert prompt.turn_starts == tuple(sum(lengths[:n]) + (n > 0) for n in range(4))
    system = 1 + lengths[0]
    # Behind the control token of the user's header: what the user says may not begin it.
    assert prompt.boundaries == (system + 1, system + lengths[1], len(prompt.tokens))


def test_a_plain_prompt_is_one_piece() -> None:
    """Sent again, or gone on with, it begins with all of its tokens."""
    for prompt in (built(prompt="abc"), built(prompt_tokens=(1, 2, 3))):
        assert prompt.boundaries == (len(prompt.tokens),)
        assert prompt.turn_starts == ()


def test_moved_lines_are_reported_and_can_be_left_alone() -> None:
    """The opt-out leaves the prompt as the client wrote it."""
    moved = built(messages=chat(CLOCKED.format(6), "ask"), context_tokens=512)
    kept = built(
        messages=chat(CLOCKED.format(6), "ask"), context_tokens=512, keep_volatile_lines=True
    )
    assert [line.kind for line in moved.moved_lines] == ["kimi start"]
    assert kept.moved_lines == ()
    shown = ByteTokenizer().decode(kept.tokens)
    assert CLOCKED.format(6) in shown
    assert shown != ByteTokenizer().decode(moved.tokens)


def test_what_a_policy_drops_is_named_by_its_place_in_the_request() -> None:
    """Also where a message went because it held nothing but a billing line."""
    line = Message(role="system", content="x-anthropic-billing-header: cch=00000;")
    messages = (line, *chat("Be brief.", "a" * 40, "b" * 40, "c" * 40))
    prompt = built(messages=messages, context_tokens=160, overflow=OverflowPolicy.TRIM)
    assert prompt.overflow is not None
    assert [turn.index for turn in prompt.overflow.removed_turns] == [2, 3]
    assert [messages[2].role, messages[3].role] == ["user", "assistant"]


def test_a_templates_date_is_one_for_the_whole_prompt_and_changes_with_the_day() -> None:
    """The clock is asked once, and the date is not hidden from the model."""
    template = "{{ strftime_now('%d') }}" + TEMPLATE
    first, same, next_day = (
        built(template, messages=chat("Be brief.", "ask"), context_tokens=512, day=day)
        for day in (3, 3, 4)
    )
    assert first == same
    assert first.boundaries[-1] == len(first.tokens)
    assert first.tokens[:3] != next_day.tokens[:3]


class MergingTokenizer(ByteTokenizer):
    """Two letters that meet may be one token, as in any byte-pair vocabulary."""

    vocab_size = ByteTokenizer.vocab_size + 1

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        tokens = super().encode(text, add_special=add_special, parse_special=parse_special)
        while (at := bytes(t if t < 256 else 0 for t in tokens).find(b"bA")) >= 0:
            tokens[at : at + 2] = [260]
        return tokens

    def piece(self, token: int, *, special: bool = False) -> bytes:
        return b"bA" if token == 260 else super().piece(token, special=special)


@pytest.mark.parametrize(
    ("form", "boundaries"),
    [
        # What follows the user's words is told from a longer conversation, then from this one.
        ("{% for m in messages %}{{ m.content }}{% endfor %}", (21,)),
        ("{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}A"
         "{% endif %}", (21,)),
        ("{% for m in messages %}{{ m.content }}|{% endfor %}", (23,)),
    ],
)  # fmt: skip
def test_a_boundary_never_parts_letters_that_may_be_one_token(
    form: str, boundaries: tuple[int, ...]
) -> None:
    """Without control tokens it moves back to where the tokens are the same in both."""
    plan = plan_for("toy")
    model = msgspec.structs.replace(plan.model, chat_template=form)
    prompts = PromptBuilder(msgspec.structs.replace(plan, model=model), MergingTokenizer())
    request = Request(
        request_id="r", model="toy", messages=(Message(role="user", content="a" * 20 + "b"),)
    )
    assert prompts.build(request).boundaries == boundaries
