"""One turn of one server at one workload: what is sent, and what may not be missing of answers.

A failed answer ends the turn, which then counts as failed as a whole: figures of a server that
answers some of the requests cannot be laid beside those of one that answers all.  The `load`
workload, which drives servers until they refuse, asks by `try_ask`.
"""

import asyncio
import time
from collections.abc import Coroutine, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec

from brim.bench.answers import Answered, text_times
from brim.bench.client import Connection
from brim.bench.serving.server import Server
from brim.bench.serving.sizes import Sizes
from brim.bench.serving.texts import Texts
from brim.bench.workload import RecordedRequest, Turn
from brim.errors import BrimError, EngineError

T = TypeVar("T")


class Figure(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One measured value; the unit stands in its name."""

    name: str
    value: float
    at: str = ""
    """Where a workload has several points: the rate, the depth or the variant."""


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What a turn's answers must have in common with the other servers'."""

    label: str
    num_prompt_tokens: int
    num_completion_tokens: int
    is_same_text: bool
    """Whether every server got this very text, rather than one with its own answers in it."""


class Session:
    """What a workload gets to work with.

    Args:
        server: Whose turn it is.
        texts: Of this workload and repetition.
        sizes: In tokens.
        takes_chat: Whether all servers answer chats; if not, all get plain completions.
    """

    def __init__(self, server: Server, texts: Texts, sizes: Sizes, *, takes_chat: bool) -> None:
        self.server = server
        self.texts = texts
        self.sizes = sizes
        self._takes_chat = takes_chat
        self.asked: list[Asked] = []

    def client(self) -> "Client":
        """A client with a connection of its own; use it as a context manager."""
        return Client(self)

    def request(self, label: str, turns: Sequence[Turn] | str, max_tokens: int) -> RecordedRequest:
        """A request for a conversation, or for the one message of its user."""
        messages = (Turn("user", turns),) if isinstance(turns, str) else tuple(turns)
        return self.shaped(RecordedRequest(id=label, max_tokens=max_tokens, messages=messages))

    def shaped(self, request: RecordedRequest) -> RecordedRequest:
        """The request in the form that all servers take."""
        return request if self._takes_chat else request.plain()

    def recorded(self, requests: Sequence[RecordedRequest]) -> list[RecordedRequest]:
        """Recorded requests with words in front that no other repetition has."""
        return [request.salted(f"Session {self.texts.salt}.") for request in requests]

    def count(self, answer: Answered, *, is_same_text: bool = True) -> None:
        """Keep what other servers' answers to the same request are compared with."""
        self.asked.append(
            Asked(
                label=answer.request_id,
                num_prompt_tokens=answer.num_prompt_tokens,
                num_completion_tokens=answer.num_completion_tokens,
                is_same_text=is_same_text,
            )
        )

    def check(self, answer: Answered, label: str) -> Answered:
        """The answer, if it is a whole one with text.

        Raises:
            EngineError: It is not; the message says why.
        """
        error = answer.error
        if error is None and answer.ttft_s is None:
            error = f"{answer.num_completion_tokens} tokens and no text came"
        if error is not None:
            raise EngineError(f"'{self.server.name}' failed at {label}: {error}")
        return answer


class Client:
    """A client of one server: one connection, one request at a time."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._connection = Connection(session.server.target.endpoint)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._connection.close()

    async def ask(
        self,
        label: str,
        turns: Sequence[Turn] | str,
        max_tokens: int,
        *,
        is_same_text: bool = True,
    ) -> Answered:
        """Ask and read the answer to its end.

        Args:
            label: What the request is called, equal for all servers.
            turns: The conversation, or the one message of its user.
            max_tokens: Length of the answer where the server takes `ignore_eos`.
            is_same_text: Whether every server gets this very text.

        Raises:
            EngineError: The answer is not a whole one.
        """
        request = self._session.request(label, turns, max_tokens)
        answer = self._session.check(await self.try_ask(request), label)
        self._session.count(answer, is_same_text=is_same_text)
        return answer

    async def try_ask(self, request: RecordedRequest) -> Answered:
        """Send a request as it is, and give whatever comes of it."""
        return await self._session.server.target.ask(self._connection, request)

    def text_times(self) -> list[float]:
        """When the last request's text came, also while it comes; by `time.perf_counter()`."""
        reply = self._connection.reply
        return text_times(reply) if reply is not None else []


def needed(value: float | None, what: str) -> float:
    """A figure that an answer of several tokens always has.

    Raises:
        EngineError: It has none: the answer was too short.
    """
    if value is None:
        raise EngineError(f"an answer was too short for its {what}; it needs two tokens or more")
    return value


def decode_rate(answer: Answered) -> float:
    """Tokens a second of an answer after its first token.

    Raises:
        EngineError: It is too short, or came at once.
    """
    time_s = needed(answer.time_per_token_s, "rate")
    if time_s <= 0:
        raise EngineError("an answer came in one piece, so it has no rate; make answers longer")
    return 1 / time_s


async def together(*tasks: Coroutine[Any, Any, T]) -> tuple[list[T], float]:
    """Run tasks at once; their results in order, and the wall time in seconds.

    Raises:
        BrimError: The first task's that failed, once all others are cancelled.
    """
    start_s = time.perf_counter()
    try:
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(task) for task in tasks]
    except* BrimError as failed:
        raise first_error(failed) from None
    return [task.result() for task in running], time.perf_counter() - start_s


def first_error(group: BaseExceptionGroup[BrimError]) -> BrimError:
    """The first error of a group and of the groups in it."""
    for error in group.exceptions:
        return first_error(error) if isinstance(error, BaseExceptionGroup) else error
    raise AssertionError("a group has an exception")
