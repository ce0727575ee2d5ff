"""Server-sent events of a streamed answer, from templates.

All of a chunk but its text is the same for every chunk of a choice, so it is encoded once; a
token then costs one JSON string and two concatenations.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from brim.core.answer import TokenLogprob
from brim.core.plan import Plan
from brim.server.wire.convert import Call
from brim.server.wire.logprobs import CompletionOffsets, chat_logprobs
from brim.server.wire.responses import (
    BrimInfo,
    ChatChunkChoice,
    ChatCompletionChunk,
    ChatDelta,
    Completion,
    CompletionChoice,
    FinishWord,
    Usage,
)
from brim.server.wire.tally import Tally

DONE = b"data: [DONE]\n\n"
"""OpenAI's end of a stream that is complete; a broken one ends without it."""

_MARK = "\ufdd0brim\ufdd0"
"""Stands for the text while a template is made; noncharacters, so no text contains it."""

_encode = msgspec.json.Encoder().encode

Choice = TypeVar("Choice", ChatChunkChoice, CompletionChoice)


def event(payload: bytes) -> bytes:
    """One server-sent event."""
    return b"data: " + payload + b"\n\n"


def fingerprint(plan: Plan) -> str:
    """OpenAI's `system_fingerprint`: changes when the model's file or the engine does."""
    return f"brim-{plan.engine}-{plan.model.fingerprint[:16]}"


class ChunkWriter(ABC, Generic[Choice]):
    """Makes the events of one call; `ChatChunks` and `CompletionChunks` know the two shapes."""

    chunk_type: ClassVar[type[Any]]
    """ChatCompletionChunk or Completion; which one goes with which Choice, mypy cannot say."""

    def __init__(self, call: Call, plan: Plan) -> None:
        self._call = call
        self._constant: dict[str, Any] = {
            "id": call.request_id,
            "created": call.created_unix_s,
            "model": call.model,
            "system_fingerprint": fingerprint(plan),
        }
        self._no_usage: UnsetType | None = None if call.include_usage else UNSET
        self._templates = [
            self._chunk((self.text_choice(index, _MARK),)).split(_encode(_MARK))
            for index in range(call.num_choices)
        ]

    def _chunk(
        self,
        choices: tuple[Choice, ...],
        usage: Usage | UnsetType | None = None,
        info: BrimInfo | UnsetType = UNSET,
    ) -> bytes:
        chunk = self.chunk_type(
            **self._constant, choices=choices, usage=usage or self._no_usage, brim=info
        )
        return event(_encode(chunk))

    def opening(self) -> bytes:
        """Events before the first text."""
        return b""

    def text(self, index: int, text: str) -> bytes:
        """The event that adds `text` to a choice."""
        before, after = self._templates[index]
        return before + _encode(text) + after

    def text_with_logprobs(self, index: int, text: str, logprobs: Sequence[TokenLogprob]) -> bytes:
        """The event that adds `text` and its tokens to a choice."""
        return self._chunk((self.text_choice(index, text, logprobs),))

    def ending(self, index: int, reason: FinishWord, tally: Tally) -> bytes:
        """The event that ends a choice; the last of them carries `brim` if no usage follows."""
        is_last = tally.is_complete and not self._call.include_usage
        info = tally.info() if is_last else UNSET
        return self._chunk((self.finish_choice(index, reason),), info=info)

    def closing(self, tally: Tally) -> bytes:
        """What follows the choices: the event without choices that `include_usage` asks for."""
        if not self._call.include_usage:
            return b""
        return self._chunk((), tally.usage(), tally.info())

    @abstractmethod
    def text_choice(self, index: int, text: str, logprobs: Sequence[TokenLogprob] = ()) -> Choice:
        """The `choices` entry that adds text."""

    @abstractmethod
    def finish_choice(self, index: int, reason: FinishWord) -> Choice:
        """The `choices` entry that ends a choice."""


class ChatChunks(ChunkWriter[ChatChunkChoice]):
    """Events of a chat: the role first, then text, then an empty delta with the reason."""

    chunk_type = ChatCompletionChunk

    def opening(self) -> bytes:
        """The role of every choice."""
        delta = ChatDelta(role="assistant", content="", refusal=None)
        return b"".join(
            self._chunk((ChatChunkChoice(index=index, delta=delta),))
            for index in range(self._call.num_choices)
        )

    def text_choice(
        self, index: int, text: str, logprobs: Sequence[TokenLogprob] = ()
    ) -> ChatChunkChoice:
        """An entry whose delta is content alone."""
        return ChatChunkChoice(
            index=index,
            delta=ChatDelta(content=text),
            logprobs=chat_logprobs(logprobs) if logprobs else None,
        )

    def finish_choice(self, index: int, reason: FinishWord) -> ChatChunkChoice:
        """An entry with an empty delta."""
        return ChatChunkChoice(index=index, delta=ChatDelta(), finish_reason=reason)


class CompletionChunks(ChunkWriter[CompletionChoice]):
    """Events of a plain completion: text, then empty text with the reason."""

    chunk_type = Completion

    def __init__(self, call: Call, plan: Plan) -> None:
        has_top = bool(call.requests[0].sampling.num_logprobs)
        self._offsets = [CompletionOffsets(has_top=has_top) for _ in range(call.num_choices)]
        super().__init__(call, plan)

    def text_choice(
        self, index: int, text: str, logprobs: Sequence[TokenLogprob] = ()
    ) -> CompletionChoice:
        """An entry with text."""
        return CompletionChoice(
            index=index,
            text=text,
            logprobs=self._offsets[index].logprobs(logprobs) if logprobs else None,
        )

    def finish_choice(self, index: int, reason: FinishWord) -> CompletionChoice:
        """An entry without text."""
        return CompletionChoice(index=index, text="", finish_reason=reason)


AnyWriter = ChatChunks | CompletionChunks
