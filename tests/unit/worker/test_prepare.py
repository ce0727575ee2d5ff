"""From request to prompt tokens, with the teaching engine's tokenizer."""

from typing import Any

import msgspec
import pytest
from support.models import plan_for

from brim.core.request import Message, Request
from brim.engine.byte_tokenizer import ByteTokenizer
from brim.errors import ContextOverflow, InvalidRequest
from brim.worker.prepare import PromptBuilder

BOS = ByteTokenizer.BOS
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content }}<|im_end|>"
    "{% endfor %}{{ suffix }}"
)


def tokens(template: str | None = TEMPLATE, **fields: Any) -> list[int]:
    plan = plan_for("toy", context_tokens=32)
    model = msgspec.structs.replace(plan.model, chat_template=template)
    plan = msgspec.structs.replace(plan, model=model)
    request = Request(request_id="r", model="toy", **fields)
    return PromptBuilder(plan, ByteTokenizer()).tokens(request)


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
