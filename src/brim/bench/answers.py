"""Streamed answers as a reader sees them: when text came, how much, and how it ended."""

import contextlib
import itertools

import msgspec

from brim.bench.client import Reply


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None

    @property
    def piece(self) -> str:
        if self.delta is None:
            return self.text or ""
        return self.delta.content or self.delta.reasoning_content or ""


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: object = None


_event_decoder = msgspec.json.Decoder(_Event)


class Answered(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one streamed answer took; times in seconds from the moment the request was sent."""

    request_id: str
    duration_s: float
    ttft_s: float | None = None
    """To the first piece of text; None where none came."""
    time_per_token_s: float | None = None
    """Mean over the answer after its first token; None under two tokens."""
    longest_gap_s: float | None = None
    """Between two neighbouring pieces of text: a stall, as a reader sees it."""
    num_prompt_tokens: int = 0
    num_cached_tokens: int | None = None
    """Prompt tokens that the server says it did not compute; None where it says nothing."""
    num_completion_tokens: int = 0
    text: str = ""
    finish_reason: str | None = None
    error: str | None = None
    status: int = 200
    """HTTP status; 0 where no response came."""


def read_answer(request_id: str, reply: Reply) -> Answered:
    """Times, counts and text of a streamed reply; an incomplete or refused one has an `error`."""
    duration_s = reply.end_s - reply.start_s
    if reply.failure or reply.status != 200:
        detail = reply.failure or reply.body[:300].decode(errors="replace")
        return Answered(
            request_id=request_id,
            duration_s=duration_s,
            error=f"status {reply.status}: {detail}",
            status=reply.status,
        )
    try:
        events = reply.events()
        decoded = [(at_s, _event_decoder.decode(data)) for at_s, data in events if data[:1] == b"{"]
    except msgspec.DecodeError as exc:
        return Answered(
            request_id=request_id, duration_s=duration_s, error=f"an event is not JSON: {exc}"
        )
    is_done = bool(events) and events[-1][1] == b"[DONE]"
    return _timed(request_id, reply, decoded, is_done)


def text_times(reply: Reply) -> list[float]:
    """When each piece of text came, by `time.perf_counter()`; also of a reply that was cut short.

    What cannot be decoded is left out: a stream that is dropped may end within an event.
    """
    times = []
    for at_s, data in reply.events():
        with contextlib.suppress(msgspec.DecodeError):
            times += [at_s for choice in _event_decoder.decode(data).choices if choice.piece]
    return times


def _timed(
    request_id: str, reply: Reply, events: list[tuple[float, _Event]], is_done: bool
) -> Answered:
    pieces = [(at_s, choice.piece) for at_s, event in events for choice in event.choices]
    times = [at_s for at_s, piece in pieces if piece]
    reasons = [
        choice.finish_reason for _, event in events for choice in event.choices
        if choice.finish_reason
    ]  # fmt: skip
    usage = next((event.usage for _, event in reversed(events) if event.usage), None)
    num_tokens = usage.completion_tokens if usage else 0
    details = usage.prompt_tokens_details if usage else None
    return Answered(
        request_id=request_id,
        duration_s=reply.end_s - reply.start_s,
        ttft_s=times[0] - reply.start_s if times else None,
        time_per_token_s=(
            (times[-1] - times[0]) / (num_tokens - 1) if times and num_tokens > 1 else None
        ),
        longest_gap_s=max((b - a for a, b in itertools.pairwise(times)), default=None),
        num_prompt_tokens=usage.prompt_tokens if usage else 0,
        num_cached_tokens=details.cached_tokens if details else None,
        num_completion_tokens=num_tokens,
        text="".join(piece for _, piece in pieces),
        finish_reason=reasons[0] if reasons else None,
        error=_fault([event for _, event in events], reasons, usage, is_done),
    )


def _fault(
    events: list[_Event], reasons: list[str], usage: _Usage | None, is_done: bool
) -> str | None:
    """Why the stream does not count as an answer, or None."""
    told = next((event.error for event in events if event.error), None)
    if told is not None:
        return f"the server reported: {told}"
    if len(reasons) != 1 or not is_done:
        return f"the stream ended {len(reasons)} times; 'data: [DONE]' came: {is_done}"
    if usage is None:
        return "no usage came, so tokens cannot be counted"
    return None
