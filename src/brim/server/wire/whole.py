"""Answers that are not streamed: everything is collected, then sent as one object."""

from collections.abc import Callable

from brim.core.answer import Delta, TokenLogprob
from brim.core.plan import Plan
from brim.server.wire.chunks import fingerprint
from brim.server.wire.convert import Call
from brim.server.wire.logprobs import CompletionOffsets, chat_logprobs
from brim.server.wire.responses import (
    ChatAnswerMessage,
    ChatChoice,
    ChatCompletion,
    Completion,
    CompletionChoice,
)
from brim.server.wire.tally import Tally


class Collected:
    """The text and tokens of each choice so far."""

    def __init__(self, num_choices: int) -> None:
        self._texts: list[list[str]] = [[] for _ in range(num_choices)]
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in range(num_choices)]

    def add(self, delta: Delta) -> None:
        """Append what one delta brought."""
        self._texts[delta.index].append(delta.text)
        self._logprobs[delta.index] += delta.logprobs

    def text(self, index: int) -> str:
        """All text of a choice."""
        return "".join(self._texts[index])

    def logprobs(self, index: int) -> list[TokenLogprob]:
        """All tokens of a choice, where logprobs were asked for."""
        return self._logprobs[index]


Whole = Callable[[Call, Plan, Collected, Tally], ChatCompletion | Completion]


def chat_completion(call: Call, plan: Plan, collected: Collected, tally: Tally) -> ChatCompletion:
    """The answer of `/v1/chat/completions`."""
    wants_logprobs = call.requests[0].sampling.num_logprobs is not None
    return ChatCompletion(
        id=call.request_id,
        created=call.created_unix_s,
        model=call.model,
        system_fingerprint=fingerprint(plan),
        choices=tuple(
            ChatChoice(
                index=index,
                message=ChatAnswerMessage(content=collected.text(index)),
                logprobs=chat_logprobs(collected.logprobs(index)) if wants_logprobs else None,
                finish_reason=tally.ending(index).reason,
            )
            for index in range(call.num_choices)
        ),
        usage=tally.usage(),
        brim=tally.info(),
    )


def completion(call: Call, plan: Plan, collected: Collected, tally: Tally) -> Completion:
    """The answer of `/v1/completions`."""
    num_logprobs = call.requests[0].sampling.num_logprobs
    return Completion(
        id=call.request_id,
        created=call.created_unix_s,
        model=call.model,
        system_fingerprint=fingerprint(plan),
        choices=tuple(
            CompletionChoice(
                index=index,
                text=collected.text(index),
                logprobs=None
                if num_logprobs is None
                else CompletionOffsets(has_top=num_logprobs > 0).logprobs(
                    collected.logprobs(index)
                ),
                finish_reason=tally.ending(index).reason,
            )
            for index in range(call.num_choices)
        ),
        usage=tally.usage(),
        brim=tally.info(),
    )
