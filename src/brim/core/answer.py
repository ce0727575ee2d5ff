"""What comes back: pieces of text as they are made, and one ending for each choice."""

from enum import StrEnum

import msgspec

from brim.core.cache import CacheReport
from brim.core.request import OverflowPolicy
from brim.errors import BrimError, all_error_classes


class FinishReason(StrEnum):
    """Why a choice ended; the first two are OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of one produced token, with the likeliest alternatives."""

    token_id: int
    piece: bytes
    """The token's bytes; one token may hold part of a UTF-8 character."""
    logprob: float
    top: tuple[tuple[int, bytes, float], ...] = ()
    """(token id, bytes, logprob), likeliest first."""


class RemovedTurn(msgspec.Struct, frozen=True, kw_only=True):
    """One message of the request that the model did not get to see."""

    index: int
    """Its place in the request's messages, from 0."""
    role: str
    num_tokens: int
    """That the prompt lost with it."""


class OverflowReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was done to a conversation that outgrew the window."""

    policy: OverflowPolicy
    num_tokens_before: int
    """Prompt tokens as the client sent them."""
    num_tokens_after: int
    num_removed_tokens: int
    """Before, less after, plus those of a summary."""
    num_summary_tokens: int = 0
    removed_turns: tuple[RemovedTurn, ...] = ()
    """Oldest first; where tokens were cut regardless of turns, those of which none is left."""
    summary_s: float = 0.0
    """Time that this request waited for its summary; next to none where it was written before."""
    num_summary_prompt_tokens: int = 0
    """Read, cached ones included, to write the summary; 0 where it was written before."""
    num_summary_cached_tokens: int = 0
    """Of these: not computed."""
    num_summary_completion_tokens: int = 0
    """Written for it, that of earlier pieces and of reasoning included."""


class LinePlace(StrEnum):
    """Where a volatile line of the prompt was put."""

    SYSTEM_END = "end of the system prompt"
    LAST_USER_TURN = "front of the last user turn"
    NOWHERE = "left out"


class MovedLine(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the request that would have kept its prefix from being found again."""

    kind: str
    """Which of the known lines it is; docs/prompts.md lists them."""
    message_index: int
    """Of the message that it stood in, from 0."""
    moved_to: LinePlace
    text: str


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """Where a choice's time went, in seconds, and how many tokens it was."""

    queue_s: float
    prefill_s: float
    decode_s: float
    num_prompt_tokens: int
    num_cached_tokens: int
    """Prompt tokens whose KV was already there (forked from another choice or restored)."""
    num_completion_tokens: int
    seed: int | None = None
    cache: CacheReport = CacheReport()
    num_shifted_tokens: int = 0
    """Tokens that left the window while the answer grew (policy `shift`)."""


class ErrorInfo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A BrimError as a value, so that it can cross the socket and come back as itself."""

    kind: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None

    @classmethod
    def of(cls, error: BrimError) -> "ErrorInfo":
        """The value that stands for `error`."""
        return cls(
            kind=type(error).__name__,
            message=error.message,
            param=error.param,
            retry_after_s=error.retry_after_s,
        )

    def exception(self) -> BrimError:
        """The error again, of the class it was; an unknown class becomes the root."""
        cls = all_error_classes().get(self.kind, BrimError)
        return cls(self.message, param=self.param, retry_after_s=self.retry_after_s)


class Delta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one step added to one choice: text, and at the end the reason and the timings.

    Text never splits a UTF-8 character and never holds the beginning of a stop string that may
    still complete.  The delta that carries `finish_reason` is the choice's last.
    """

    index: int = 0
    text: str = ""
    num_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_string: str | None = None
    """The stop string that ended it, where one did."""
    timings: Timings | None = None
    error: ErrorInfo | None = None
    """Set with FinishReason.ERROR."""
