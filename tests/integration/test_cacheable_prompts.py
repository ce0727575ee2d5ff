"""Prompts that stay cacheable: each prompt of a growing conversation begins as the last one did.

With real tokenizers on both engines, for templates of every manner and any words.
"""

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from conftest import require_engine
from hypothesis import given, settings
from hypothesis import strategies as st
from support.chat_templates import (
    CHATML,
    HEADERS,
    HERMES,
    INST,
    PARAMETERS,
    PLAIN,
    TEXT_CALLS,
    THINKING,
    TURNS,
)
from support.made_tokenizers import write_gguf_vocabulary, write_tokenizer
from support.models import DEMO, PYSTD_1M, SHARED, plan_for, pystd_1m_gguf
from support.text_pairs import llama_tokenizer

from brim.chat.turns import common_length, locate
from brim.core.request import Message, Request, ToolCall
from brim.core.tokenizer import Tokenizer
from brim.worker.prepare import BuiltPrompt, PromptBuilder

SYSTEM = Message(role="system", content="You help with Python. Be brief.")

SHIPPED = [path for path in (DEMO, SHARED / "pystd-6m" / "pystd-6m-f16.gguf") if path.exists()]
"""Models with a template of their own, beside the one that tests convert."""

MANNERS = [
    ("llama3", HEADERS), ("llama3", TEXT_CALLS), ("llama3", PLAIN),
    ("qwen2", CHATML), ("qwen2", HERMES), ("qwen2", THINKING), ("qwen2", PARAMETERS),
    ("gemma", TURNS), ("gemma", PLAIN), ("mistral", INST), ("llama2", PLAIN), ("llama2", INST),
    ("unigram", PLAIN),
]  # fmt: skip
"""Tokenizer families with templates: with control tokens between turns and without."""

WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
TURN = st.one_of(
    WORDS, st.sampled_from(["def f(x):\n    return x", " ok\n\n", "<|im_end|>", "日本語"])
)


class Manner(NamedTuple):
    """A tokenizer's family with a template."""

    family: str
    template: str
    prompts: PromptBuilder

    def talk(self, messages: list[Message]) -> list[Message]:
        """Without the system prompt where the template refuses one."""
        return [m for m in messages if m.role != "system"] if self.template == TURNS else messages


def hf_tokenizer(directory: Path) -> Tokenizer:
    """The MLX engine's way of reading a tokenizer; skips where it is missing."""
    require_engine("mlx")
    from brim.engine.mlx.tokenizer import HfTokenizer

    return HfTokenizer.from_directory(directory)


def builder(tokenizer: Tokenizer, template: str | None) -> PromptBuilder:
    """For the model's own template where `template` is None."""
    plan = plan_for("mlx", context_tokens=8192)
    if template is not None:
        model = msgspec.structs.replace(plan.model, chat_template=template)
        plan = msgspec.structs.replace(plan, model=model)
    return PromptBuilder(plan, tokenizer)


def built(prompts: PromptBuilder, messages: list[Message], **fields: Any) -> BuiltPrompt:
    return prompts.build(Request(request_id="r", model="m", messages=tuple(messages), **fields))


def asked(text: str) -> Message:
    return Message(role="user", content=text)


def said(text: str, reasoning: str | None = None) -> Message:
    return Message(role="assistant", content=text, reasoning=reasoning)


def stepped(number: int, result: str) -> list[Message]:
    """A call that was thought about, and its result."""
    arguments = f'{{"path": "a.py", "line": {number}.50}}'
    call = ToolCall(id=f"call0000{number}", name="read", arguments=arguments)
    return [
        Message(role="assistant", content="", reasoning="Let me look.", tool_calls=(call,)),
        Message(role="tool", content=result, tool_call_id=f"call0000{number}", name="read"),
    ]


def agent_talk(texts: list[str], has_tools: bool) -> Iterator[list[Message]]:
    """The messages of each request of an agent's conversation, as long as there are texts."""
    messages = [SYSTEM]
    for number, text in enumerate(texts):
        messages = [*messages, asked(text)]
        yield messages
        if has_tools:
            messages = [*messages, *stepped(number, text)]
            yield messages
        messages = [*messages, said(text or "Done.", reasoning="Hm.")]


def check_growth(prompts: list[tuple[list[Message], BuiltPrompt]], keeps_thoughts: bool) -> None:
    """Every prompt begins with the last one's tokens, as far as each of its boundaries."""
    for (messages, before), (longer, after) in pairwise(prompts):
        boundaries = before.boundaries
        assert list(boundaries) == sorted(set(boundaries))
        assert boundaries[-1] <= len(before.tokens)
        if not keeps_thoughts and messages[-1].role == "tool" and longer[-1].role == "user":
            boundaries = boundaries[:1]  # the model's format drops what was thought before
        for boundary in boundaries:
            assert after.tokens[:boundary] == before.tokens[:boundary]


@pytest.fixture(scope="module", params=MANNERS, ids=lambda manner: manner[0])
def manner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Manner:
    """A tokenizer with a template of its family's manner, or of another."""
    family, template = request.param
    directory = write_tokenizer(tmp_path_factory.mktemp("made"), family)
    return Manner(family, template, builder(hf_tokenizer(directory), template))


@settings(max_examples=25, deadline=None)
@given(texts=st.lists(TURN, min_size=2, max_size=4))
def test_each_prompt_begins_as_the_last_one_did(manner: Manner, texts: list[str]) -> None:
    """Whatever is said, up to each boundary the tokens of the next prompt are the same."""
    has_tools = manner.template not in (INST, TURNS)
    talk = [manner.talk(messages) for messages in agent_talk(texts, has_tools)]
    found = [(messages, built(manner.prompts, messages)) for messages in talk]
    check_growth(found, keeps_thoughts=manner.template != THINKING)


def test_the_last_boundary_is_near_the_prompts_end(manner: Manner) -> None:
    """Only what opens the model's turn is behind it, and where it moves, what moves along."""
    talk = [asked("Explain a list."), said("It holds items."), asked("And a tuple?")]
    prompt = built(manner.prompts, manner.talk([SYSTEM, *talk]))
    longer = [*talk[:-1], asked("And a tuple? Please.")]
    if manner.template == INST:
        longer = [*talk[:-1], asked("Xyz")]
    other = built(manner.prompts, manner.talk([SYSTEM, *longer]))
    shared = common_length(prompt.tokens, other.tokens)
    if manner.template == INST:
        assert shared - 40 <= prompt.boundaries[-1] <= shared  # the system prompt is in between
    else:
        assert prompt.boundaries[-1] >= shared


def test_conversations_with_one_system_prompt_share_it(manner: Manner) -> None:
    """Whatever the user says, the first boundary is behind the same tokens, and not far off."""
    words = ["Explain a list.", "\n\nexplain", "Be", "日本語", ""]
    prompts = [built(manner.prompts, manner.talk([SYSTEM, asked(text)])) for text in words]
    first, second = prompts[:2]
    if manner.template not in (INST, TURNS):
        shared = common_length(first.tokens, second.tokens)
        assert shared - 20 <= first.boundaries[0] <= shared
    for prompt in prompts if manner.template != TURNS else ():
        boundary = prompt.boundaries[0]
        # Without control tokens a space before the user's words may be part of them.
        assert first.boundaries[0] - (manner.template == PLAIN) <= boundary <= first.boundaries[0]
        assert prompt.tokens[:boundary] == first.tokens[:boundary]


def test_turns_are_told_apart_in_the_tokens(manner: Manner) -> None:
    """A prompt that differs in one message diverges in that turn, not far from its beginning."""
    messages = manner.talk([SYSTEM, asked("first"), said("second"), asked("third")])
    prompt = built(manner.prompts, messages)
    if manner.family == "unigram":
        assert prompt.turn_starts == ()  # its unknown token stands for any text
        return
    assert len(prompt.turn_starts) == len(messages)
    for number, message in enumerate(messages):
        if manner.template == INST and message.role == "system":
            continue  # it is written into the last turn
        other = msgspec.structs.replace(message, content="Xyz")
        tokens = built(manner.prompts, [*messages[:number], other, *messages[number + 1 :]]).tokens
        token, turn = locate(common_length(prompt.tokens, tokens), prompt.turn_starts)
        assert turn == number + 1
        assert 1 <= token <= 40


@pytest.mark.parametrize("family", ["llama3", "qwen2", "llama2", "gemma"])
def test_both_engines_find_the_same_boundaries(tmp_path: Path, family: str) -> None:
    """llama.cpp's tokenizer and Hugging Face's split a conversation at the same tokens."""
    template = {"llama3": HEADERS, "qwen2": HERMES, "llama2": PLAIN, "gemma": PLAIN}[family]
    mlx = builder(hf_tokenizer(write_tokenizer(tmp_path, family)), template)
    talk = list(agent_talk(["Read it.", "naïve 日本語", "Go on."], has_tools=True))
    with llama_tokenizer(write_gguf_vocabulary(tmp_path / "v.gguf", family)) as tokenizer:
        llama = builder(tokenizer, template)
        prompts = [built(llama, messages) for messages in talk]
    check_growth(list(zip(talk, prompts, strict=True)), keeps_thoughts=True)
    assert prompts == [built(mlx, messages) for messages in talk]


@pytest.mark.parametrize("path", [None, *SHIPPED], ids=lambda path: path and path.stem)
@pytest.mark.parametrize("has_tools", [False, True])
def test_the_shipped_models_keep_what_was_read(path: Path | None, has_tools: bool) -> None:
    """Their own templates and vocabularies, with plain turns and with an agent's."""
    from brim.registry.describe import describe_gguf

    path = path or pystd_1m_gguf()
    talk = list(agent_talk(["What is a list?", "def f(", " \n x", "😀"], has_tools))
    with llama_tokenizer(path) as tokenizer:
        prompts = builder(tokenizer, describe_gguf(path).chat_template)
        found = [(messages, built(prompts, messages)) for messages in talk]
    check_growth(found, keeps_thoughts=True)
    assert all(len(prompt.turn_starts) == len(messages) for messages, prompt in found)


@pytest.fixture(scope="module")
def trained() -> PromptBuilder:
    """The trained model's tokenizer and template."""
    return builder(hf_tokenizer(PYSTD_1M), None)


def test_a_billing_line_costs_no_prefix(trained: PromptBuilder) -> None:
    """Two requests that differ in it alone are one prompt, and with the opt-out they are two."""
    line = "x-anthropic-billing-header: cc_version=2.1.177.01c; cc_entrypoint=cli; cch={};\n"
    talks = [
        [msgspec.structs.replace(SYSTEM, content=line.format(cch) + SYSTEM.content), asked("Hi")]
        for cch in ("36ee5", "0aaa9")
    ]
    first, second = (built(trained, talk) for talk in talks)
    assert first.tokens == second.tokens == built(trained, [SYSTEM, asked("Hi")]).tokens
    assert [moved.kind for moved in first.moved_lines] == ["claude-code billing"]
    first, second = (built(trained, talk, keep_volatile_lines=True) for talk in talks)
    assert first.moved_lines == ()
    assert first.tokens != second.tokens


def test_a_clock_costs_the_last_turn_alone(trained: PromptBuilder) -> None:
    """With every minute new, the prompts share all up to the front of the last user turn."""
    form = "Current date and time: Monday, March 9, 2026 at 06:00:{} PM PDT\nBe brief."
    talk = [asked("Hi"), said("Hello."), asked("Go on."), *stepped(1, "x = 1")]
    prompts = [
        built(trained, [Message(role="system", content=form.format(second)), *talk[:count]])
        for second, count in ((31, 1), (42, 3), (53, 5))
    ]
    for before, after in pairwise(prompts):
        shared = common_length(before.tokens, after.tokens)
        assert before.boundaries[-1] <= shared
        assert locate(shared, before.turn_starts)[1] == len(before.turn_starts)
    # In a loop of calls the last user turn stays, and the time in it is new.
    again = built(
        trained, [Message(role="system", content=form.format(59)), *talk, *stepped(2, "y")]
    )
    shared = common_length(prompts[-1].tokens, again.tokens)
    assert locate(shared, again.turn_starts)[1] == 4
    assert prompts[-1].boundaries[-1] <= shared


def test_a_turn_sent_twice_is_the_same_tokens(trained: PromptBuilder) -> None:
    """Nothing but the request decides: a second builder, and another order, change nothing."""
    talks = list(agent_talk(["a", "b", "c"], has_tools=True))
    first = [built(trained, messages) for messages in talks]
    other = builder(hf_tokenizer(PYSTD_1M), None)
    assert [built(other, messages) for messages in reversed(talks)] == first[::-1]
    parsed = [json.loads(msgspec.json.encode(messages)) for messages in talks]
    assert [built(trained, msgspec.convert(p, list[Message])) for p in parsed] == first
