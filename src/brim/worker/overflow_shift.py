"""The policy `shift`: the first tokens of a prompt and its newest ones, whatever turns they are of.

While the answer grows it is the scheduler that drops tokens, where `shift_keep_tokens` lets it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from brim.chat.overflow import START_PART, TARGET_PART, Conversation
from brim.core.answer import OverflowReport, RemovedTurn
from brim.core.request import Message, OverflowPolicy, Request
from brim.errors import ContextOverflow, Unsupported

if TYPE_CHECKING:
    from brim.worker.prepare import BuiltPrompt

SHIFT_PART = START_PART - TARGET_PART
"""Of the window: tokens are dropped in multiples of this, for the same reason."""

SHIFT_KEEP_TOKENS = 4
"""Kept at the beginning where there is no system prompt: models pay attention to the first few
tokens whatever they are, and fall apart without them.
Source: Xiao et al., Efficient Streaming Language Models with Attention Sinks, 2023, section 3.1."""


def shifted(
    request: Request, whole: BuiltPrompt, context_tokens: int, *, can_shift: bool
) -> BuiltPrompt:
    """The first tokens and the newest ones; the answer may go on past the window's end.

    Args:
        request: Its messages and `max_tokens`.
        whole: Its prompt, nothing left out.
        context_tokens: The window.
        can_shift: Whether the engine drops tokens while it answers.

    Raises:
        ContextOverflow: The prompt is over the window, and its system prompt too long to stay.
        Unsupported: The answer may outgrow the window where nothing can be dropped.
    """
    num_kept = _num_kept(request, whole)
    built = whole
    if len(whole.tokens) >= context_tokens:
        built = _without_middle(request, whole, num_kept, context_tokens)
    can_drop = num_kept is not None and num_kept <= context_tokens * START_PART
    if can_shift and can_drop and request.num_choices == 1:
        return msgspec.structs.replace(built, shift_keep_tokens=num_kept)
    room = context_tokens - len(built.tokens)
    if request.max_tokens is not None and request.max_tokens > room:
        if not can_shift:
            why = "this model cannot drop tokens while it answers"
        elif not can_drop:
            why = "the system prompt leaves too few tokens that can be dropped"
        else:
            why = "several choices share the tokens that would be dropped"
        raise Unsupported(
            f"the answer may outgrow the window, and {why}; ask for at most {room} max_tokens, "
            'or use the overflow policy "trim" or "summarize"',
            param="max_tokens",
        )
    return built


def _without_middle(
    request: Request, whole: BuiltPrompt, num_kept: int | None, context_tokens: int
) -> BuiltPrompt:
    if num_kept is None or num_kept > context_tokens * TARGET_PART:
        what = "cannot be told from the rest" if num_kept is None else f"is {num_kept} tokens"
        raise ContextOverflow(
            f"prompt is {len(whole.tokens)} tokens, context is {context_tokens}; the policy "
            f'"shift" keeps the system prompt, which {what}, and may take half of the context; '
            'shorten it, or use the policy "trim" or "summarize"',
            param="messages",
        )
    num_over = len(whole.tokens) - int(context_tokens * START_PART)
    # In steps, and so a function of the length alone: the rest begins at the same token until the
    # conversation has grown by a step.
    step = int(context_tokens * SHIFT_PART)
    gone = range(num_kept, num_kept + step * -(-num_over // step))
    tokens = whole.tokens[: gone.start] + whole.tokens[gone.stop :]
    report = OverflowReport(
        policy=OverflowPolicy.SHIFT,
        num_tokens_before=len(whole.tokens),
        num_tokens_after=len(tokens),
        num_removed_tokens=len(gone),
        removed_turns=_turns_within(request.messages or (), whole, gone),
    )
    return msgspec.structs.replace(
        whole,
        tokens=tokens,
        turn_starts=_moved(whole.turn_starts, gone),
        boundaries=_moved(whole.boundaries, gone),
        overflow=report,
    )


def _num_kept(request: Request, whole: BuiltPrompt) -> int | None:
    """Tokens at the beginning that a shift leaves; None where the system prompt's end is unknown.

    Without a system prompt the first few.
    """
    messages = request.messages or ()
    num_system = Conversation(messages, ()).num_system
    if not num_system:
        return min(SHIFT_KEEP_TOKENS, len(whole.tokens) - 1)
    if num_system < len(whole.turn_starts) == len(messages):
        return whole.turn_starts[num_system]
    return whole.boundaries[0] if whole.boundaries else None


def _turns_within(
    messages: Sequence[Message], whole: BuiltPrompt, gone: range
) -> tuple[RemovedTurn, ...]:
    """Turns of which no token is left."""
    if len(whole.turn_starts) != len(messages):
        return ()
    starts = [*whole.turn_starts, len(whole.tokens)]
    return tuple(
        RemovedTurn(index=index, role=message.role, num_tokens=end - start)
        for index, (message, (start, end)) in enumerate(
            zip(messages, itertools.pairwise(starts), strict=True)
        )
        if gone.start <= start and end <= gone.stop
    )


def _moved(positions: Sequence[int], gone: range) -> tuple[int, ...]:
    """Positions of what is left, where it is then."""
    before = [position for position in positions if position <= gone.start]
    behind = [position - len(gone) for position in positions if position > gone.stop]
    return (*before, *behind)
