"""Each policy on real prompts: the teaching engine's tokenizer, one token a byte."""

import itertools
from typing import Any

import msgspec
import pytest
from support.models import plan_for
from support.serving import CHATML

from brim.chat.overflow import summary_prompt
from brim.core.request import Message, OverflowPolicy, Request
from brim.engine.byte_tokenizer import ByteTokenizer
from brim.errors import ContextOverflow, Unsupported
from brim.worker.prepare import BuiltPrompt, PromptBuilder

WINDOW = 1000
SYSTEM = Message(role="system", content="You are a calm guide.")


def builder(
    *, window: int = WINDOW, template: str = CHATML, can_shift: bool = True
) -> PromptBuilder:
    plan = plan_for("toy", context_tokens=window)
    model = msgspec.structs.replace(plan.model, chat_template=template)
    plan = msgspec.structs.replace(plan, model=model)
    return PromptBuilder(plan, ByteTokenizer(), can_shift=can_shift)


def talk(num_turns: int, *, with_system: bool = True, chars: int = 40) -> tuple[Message, ...]:
    """A conversation that ends with the user's turn of that number."""
    messages = [SYSTEM] if with_system else []
    for number in range(1, num_turns + 1):
        messages.append(Message(role="user", content=f"question {number} ".ljust(chars, "q")))
        messages.append(Message(role="assistant", content=f"answer {number} ".ljust(chars, "a")))
    return tuple(messages[:-1])


def request(policy: str, messages: tuple[Message, ...] | None = None, **fields: Any) -> Request:
    return Request(
        request_id="r",
        model="toy",
        messages=messages,
        overflow=OverflowPolicy(policy),
        **fields,
    )


def text(built: BuiltPrompt) -> str:
    return b"".join(ByteTokenizer().piece(t, special=True) for t in built.tokens).decode()


def num_common(first: list[int], second: list[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


@pytest.mark.parametrize("policy", ["reject", "trim", "shift", "summarize"])
def test_a_prompt_that_fits_is_left_as_it_is(policy: str) -> None:
    """No policy touches it, and none reports."""
    prompts = builder()
    messages = talk(5)
    built = prompts.build(request(policy, messages))
    assert built.tokens == prompts.build(request("reject", messages)).tokens
    assert built.overflow is None
    assert built.to_summarize is None


def test_reject_leaves_an_over_long_prompt_to_admission() -> None:
    """Admission has the numbers for the client."""
    built = builder().build(request("reject", talk(20)))
    assert len(built.tokens) > WINDOW
    assert built.overflow is None


def test_trimming_starts_at_85_percent() -> None:
    """A prompt of 850 tokens of 1,000 stays; with 851 its oldest turns go."""
    prompts = builder()
    grown = len(prompts.build(request("reject", talk(8))).tokens)
    for num_tokens, is_trimmed in [(850, False), (851, True)]:
        *head, newest = talk(8)
        longer = msgspec.structs.replace(
            newest, content=newest.content + "x" * (num_tokens - grown)
        )
        built = prompts.build(request("trim", (*head, longer)))
        assert (built.overflow is not None) is is_trimmed


def test_trim_keeps_the_system_prompt_and_whole_pairs_of_the_newest_turns() -> None:
    """What is read is what the conversation of the kept turns alone would be."""
    prompts = builder()
    messages = talk(12)
    built = prompts.build(request("trim", messages))
    assert built.overflow is not None
    removed = [turn.index for turn in built.overflow.removed_turns]
    assert removed == list(range(1, removed[-1] + 1))
    assert messages[removed[-1] + 1].role == "user"
    kept = (SYSTEM, *messages[removed[-1] + 1 :])
    assert kept[-1] is messages[-1]
    alone = prompts.build(request("reject", kept))
    assert (built.tokens, built.turn_starts) == (alone.tokens, alone.turn_starts)
    assert len(built.tokens) <= 850


@pytest.mark.parametrize("with_system", [True, False])
def test_what_trim_removed_is_reported_token_by_token(with_system: bool) -> None:
    """Before, after and removed add up, and so do the turns; each is as long as it was."""
    prompts = builder()
    messages = talk(12, with_system=with_system)
    whole = prompts.build(request("reject", messages))
    report = prompts.build(request("trim", messages)).overflow
    assert report is not None
    assert report.policy is OverflowPolicy.TRIM
    assert report.num_tokens_before == len(whole.tokens)
    assert report.num_removed_tokens == report.num_tokens_before - report.num_tokens_after
    assert sum(turn.num_tokens for turn in report.removed_turns) == report.num_removed_tokens
    for turn in report.removed_turns:
        alone = f"<|im_start|>{turn.role}\n{messages[turn.index].content}<|im_end|>\n"
        num_tokens = len(ByteTokenizer().encode(alone, parse_special=True, add_special=False))
        assert turn.num_tokens == num_tokens


def test_the_cut_stays_while_a_conversation_grows() -> None:
    """Of consecutive requests most begin with all of the one before: the cache hits."""
    prompts = builder()
    built = [prompts.build(request("trim", talk(n))) for n in range(4, 29)]
    assert all(len(each.tokens) <= 850 for each in built)
    assert all(text(each).startswith(text(built[0])[:30]) for each in built)
    pairs = list(itertools.pairwise(built))
    opening = len("<|im_start|>assistant\n") - 11  # control words are one token
    extended = [
        num_common(first.tokens, second.tokens) >= len(first.tokens) - opening
        for first, second in pairs
    ]
    num_moved = extended.count(False)
    assert 4 <= num_moved <= 8, "about 110 tokens a turn, and 350 between two cuts"


def test_max_tokens_count_against_the_window() -> None:
    """A prompt that leaves too little for the answer that was asked for is trimmed to leave it."""
    prompts = builder()
    messages = talk(6)
    assert prompts.build(request("trim", messages)).overflow is None
    built = prompts.build(request("trim", messages, max_tokens=500))
    assert built.overflow is not None
    assert len(built.tokens) <= 500


@pytest.mark.parametrize("policy", ["trim", "summarize"])
def test_a_newest_turn_over_the_window_is_refused_with_the_numbers(policy: str) -> None:
    """Nothing of it is cut."""
    *head, newest = talk(6)
    longer = msgspec.structs.replace(newest, content="x" * 1000)
    with pytest.raises(ContextOverflow, match=r"are 1\d\d\d tokens and max_tokens 9, context"):
        builder().build(request(policy, (*head, longer), max_tokens=9))


@pytest.mark.parametrize(
    ("chars", "max_tokens", "way"),
    [
        (100, 1200, r"context is 1000; ask for at most 8\d\d max_tokens or load"),
        (900, 200, r"shorten them by 1\d\d, ask for at most \d\d max_tokens or load"),
        (1100, 9, r"context is 1000; shorten them by 1\d\d or load"),
        (1100, 1200, "context is 1000; shorten them and ask for fewer max_tokens or load"),
    ],
)
def test_a_refusal_says_what_would_do(chars: int, max_tokens: int, way: str) -> None:
    """Nobody is told to take more from a turn, or from `max_tokens`, than there is."""
    only = Message(role="user", content="x" * chars)
    with pytest.raises(ContextOverflow, match=way):
        builder().build(request("trim", (only,), max_tokens=max_tokens))


def test_a_newest_turn_over_85_percent_but_within_the_window_is_read() -> None:
    """With nothing left to drop, the window is what counts."""
    *head, newest = talk(6)
    longer = msgspec.structs.replace(newest, content="x" * 900)
    built = builder().build(request("trim", (*head, longer)))
    assert 900 < len(built.tokens) < WINDOW
    assert built.overflow is not None
    assert len(built.overflow.removed_turns) == len(head) - 1


@pytest.mark.parametrize("policy", ["trim", "summarize"])
def test_a_single_turn_over_85_percent_is_read_as_it_is(policy: str) -> None:
    """There is nothing to drop, and so nothing to report."""
    only = Message(role="user", content="x" * 900)
    built = builder().build(request(policy, (SYSTEM, only)))
    assert 850 < len(built.tokens) < WINDOW
    assert (built.overflow, built.to_summarize) == (None, None)


def test_what_a_template_writes_into_every_prompt_counts() -> None:
    """Its own system prompt stays when the first turn goes, and is within what a cut leaves."""
    template = "Preamble. " * 20 + CHATML
    built = builder(template=template).build(request("trim", talk(7, with_system=False)))
    assert built.overflow is not None
    assert 300 < len(built.tokens) <= 500


@pytest.mark.parametrize("policy", ["trim", "summarize"])
def test_a_plain_prompt_has_no_turns_to_drop(policy: str) -> None:
    """It is refused where that would be needed, and the sentence names what would do."""
    prompts = builder()
    assert len(prompts.build(request(policy, prompt="x" * 900)).tokens) == 901
    with pytest.raises(ContextOverflow, match=r'which a plain prompt has none of.*"shift"'):
        prompts.build(request(policy, prompt="x" * 1000))


def test_a_template_that_hides_its_turns_is_cut_all_the_same() -> None:
    """Without positions costs are estimated; what is reported still adds up."""
    template = "{% for m in messages %}[{{ m.content | upper }}]{% endfor %}A:"
    prompts = builder(template=template)
    messages = talk(30)
    assert prompts.build(request("reject", messages)).turn_starts == ()
    built = prompts.build(request("trim", messages))
    assert len(built.tokens) <= 850
    assert built.overflow is not None
    turns = built.overflow.removed_turns
    assert sum(turn.num_tokens for turn in turns) == built.overflow.num_removed_tokens


def test_costs_that_are_too_high_are_reported_as_what_went() -> None:
    """Where the oldest turn is shorter than what the estimates are off, the next ones take it."""
    template = "{% for m in messages %}[{{ m.content | trim | upper }}]{% endfor %}A:"
    padded = Message(role="assistant", content="yes".ljust(300))
    messages = (Message(role="user", content="a"), padded, *talk(30, with_system=False))
    built = builder(template=template).build(request("trim", messages))
    assert built.overflow is not None
    turns = built.overflow.removed_turns
    assert sum(turn.num_tokens for turn in turns) == built.overflow.num_removed_tokens
    assert turns[0].num_tokens == 0


def test_an_endless_conversation_is_refused_before_it_is_tokenised() -> None:
    """A hundred and twenty-eight bytes a token of the window are enough."""
    with pytest.raises(ContextOverflow, match="leave out its oldest part"):
        builder().build(request("trim", talk(200, chars=1000)))


def test_shift_keeps_the_system_prompt_and_the_newest_tokens() -> None:
    """Token by token: the beginning, then the end of the whole prompt."""
    prompts = builder()
    messages = talk(12)
    whole = prompts.build(request("reject", messages))
    built = prompts.build(request("shift", messages))
    report = built.overflow
    assert report is not None
    num_kept = built.shift_keep_tokens
    assert num_kept == whole.turn_starts[1]
    end = num_kept + report.num_removed_tokens
    assert built.tokens == whole.tokens[:num_kept] + whole.tokens[end:]
    assert report.num_tokens_before - report.num_removed_tokens == len(built.tokens) <= 850
    assert SYSTEM.content in text(built)
    assert built.boundaries[-1] == whole.boundaries[-1] - report.num_removed_tokens
    assert built.turn_starts[-1] == whole.turn_starts[-1] - report.num_removed_tokens
    starts = [*whole.turn_starts, len(whole.tokens)]
    assert [turn.index for turn in report.removed_turns] == [
        n for n in range(len(messages)) if num_kept <= starts[n] and starts[n + 1] <= end
    ]


def test_shift_drops_in_steps() -> None:
    """Consecutive prompts go on from the same token until a step has filled up."""
    prompts = builder()
    built = [prompts.build(request("shift", talk(n))) for n in range(10, 30, 2)]
    dropped = [each.overflow.num_removed_tokens for each in built if each.overflow is not None]
    assert len(dropped) > 8
    assert set(dropped) == set(range(min(dropped), max(dropped) + 1, 350))
    assert min(dropped) in (350, 700)


def test_shift_without_a_system_prompt_keeps_the_first_four_tokens() -> None:
    """Plain prompts and their tokens included."""
    prompts = builder()
    assert prompts.build(request("shift", talk(9, with_system=False))).shift_keep_tokens == 4
    tokens = tuple(range(256)) * 5
    built = prompts.build(request("shift", prompt_tokens=tokens))
    assert built.tokens == [*tokens[:4], *tokens[4 + 700 :]]
    assert built.overflow is not None
    assert built.overflow.removed_turns == ()


def test_an_answer_that_outgrows_the_window_needs_an_engine_that_shifts() -> None:
    """Elsewhere it is refused, and the sentence names the policies that would do."""
    asked = request("shift", talk(3), max_tokens=5000)
    assert builder().build(asked).shift_keep_tokens is not None
    with pytest.raises(Unsupported, match=r'cannot drop tokens.*"trim" or "summarize"'):
        builder(can_shift=False).build(asked)
    with pytest.raises(Unsupported, match="several choices"):
        builder().build(msgspec.structs.replace(asked, num_choices=2))
    modest = msgspec.structs.replace(asked, max_tokens=100)
    assert builder(can_shift=False).build(modest).shift_keep_tokens is None


def test_a_system_prompt_over_half_of_the_window_cannot_be_shifted_around() -> None:
    """There would be too little left of the rest."""
    head = Message(role="system", content="s" * 600)
    with pytest.raises(ContextOverflow, match=r"system prompt, which is 6\d\d tokens"):
        builder().build(request("shift", (head, *talk(6, with_system=False))))


def test_summarize_says_what_is_to_be_summarised() -> None:
    """In pieces that the model can read, oldest first, and everything that would be dropped."""
    messages = talk(40)
    built = builder(window=2000).build(request("summarize", messages))
    work = built.to_summarize
    assert work is not None
    assert work.system == (SYSTEM,)
    turns = [message for piece in work.pieces for message in piece]
    assert tuple(turns) == messages[1 : 1 + len(turns)]
    assert messages[1 + len(turns)].role == "user"
    assert len(work.pieces) > 1


def test_a_longer_conversation_has_the_same_first_pieces() -> None:
    """So their summary, once written, serves on."""
    prompts = builder(window=2000)
    works = [prompts.build(request("summarize", talk(n))).to_summarize for n in range(14, 50, 3)]
    found = [work for work in works if work is not None]
    assert len(found) > 8
    for first, second in itertools.pairwise(found):
        assert second.pieces[: len(first.pieces)] == first.pieces


def test_a_summary_takes_the_place_of_what_went() -> None:
    """Its tokens are counted apart: before = after - summary + removed."""
    prompts = builder(window=2000)
    asked = request("summarize", talk(30))
    built = prompts.build(asked, "They spoke of many things.")
    report = built.overflow
    assert report is not None
    assert built.to_summarize is None
    assert "You are a calm guide.\n\nSummary of the earlier" in text(built)
    assert "They spoke of many things.<|im_end|>" in text(built)
    removed = report.num_tokens_before - report.num_tokens_after + report.num_summary_tokens
    assert report.num_removed_tokens == removed
    assert report.num_tokens_after == len(built.tokens)
    assert sum(turn.num_tokens for turn in report.removed_turns) == removed
    note = "\n\nSummary of the earlier part of this conversation:\nThey spoke of many things."
    assert report.num_summary_tokens == len(note)


def test_a_summary_stays_within_its_bound() -> None:
    """Drawn as few tokens or not, as text it may be more: the end goes, the turns stay."""
    prompts = builder(window=2000)
    report = prompts.build(request("summarize", talk(30)), "word " * 200).overflow
    assert report is not None
    note = "\n\nSummary of the earlier part of this conversation:\n"
    assert 0 < report.num_summary_tokens - len(note) <= 125 + 8


STRICT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
) + CHATML
"""As Gemma's template: no system prompt, and user and model in turn."""


def test_a_strict_template_takes_everything_that_is_made_of_its_conversation() -> None:
    """What is kept, with a summary or without, and what asks for the summary of each piece."""
    prompts = builder(window=2000, template=STRICT)
    messages = talk(40, with_system=False)
    assert prompts.build(request("trim", messages)).overflow is not None
    asked = request("summarize", messages)
    work = prompts.build(asked).to_summarize
    assert work is not None
    assert len(work.pieces) > 1
    for piece in range(len(work.pieces)):
        built = prompts.build(request("reject", summary_prompt(work, piece, "They met.")))
        assert len(built.tokens) + work.max_tokens <= 2000
    assert "They met.\n\nquestion" in text(prompts.build(asked, "They met."))


def test_a_system_prompt_that_leaves_no_room_cannot_be_summarised_under() -> None:
    """The sentence names the policy that would do."""
    head = Message(role="system", content="s" * 710)
    with pytest.raises(ContextOverflow, match=r'leaves no room to summarize.*"trim"'):
        builder().build(request("summarize", (head, *talk(10, with_system=False))))


def test_turns_keep_their_numbers_where_a_line_was_moved_out_of_the_way() -> None:
    """A system message of nothing but a billing line is gone; the numbers are the client's."""
    line = Message(
        role="system", content="x-anthropic-billing-header: cc_version=2.1.0; cch=1a2b3;"
    )
    messages = (line, *talk(12))
    built = builder().build(request("trim", messages))
    assert built.moved_lines
    assert built.overflow is not None
    assert built.overflow.removed_turns[0].index == 2
    assert messages[2].content.startswith("question 1 ")
