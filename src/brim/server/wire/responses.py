"""Shapes of answers: OpenAI's to the letter, plus one `brim` object.

These structs are the published schema; `chunks.py` makes its templates from them, so that what is
streamed cannot drift from what is described.
"""

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

FinishWord = Literal["stop", "length"]


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """Where prompt tokens came from."""

    cached_tokens: int


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of one request; a prompt counts once, however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class BrimCache(msgspec.Struct, frozen=True, kw_only=True):
    """What a prompt found of what was computed before."""

    source: Literal["none", "memory", "disk"]
    """Where the last of the reused tokens came from."""
    cached_tokens: int
    """Prompt tokens that were not computed for it."""
    reason: str
    """Why there were no more, as `diverges at token 7 of turn 2`; empty where the rest is new."""
    restore_s: float
    """Spent on reading from disk."""


class BrimMovedLine(msgspec.Struct, frozen=True, kw_only=True):
    """A line that changes with every request, and would have kept its prefix from being found."""

    kind: str
    """Which of the lines that docs/prompts.md lists."""
    message_index: int
    """Where it stood in the request's `messages`, from 0."""
    moved_to: str
    """Where the model read it, or that it was left out."""


class BrimRemovedTurn(msgspec.Struct, frozen=True, kw_only=True):
    """A message of the request that the model did not get to see."""

    index: int
    """In the request's `messages`, from 0."""
    role: str
    num_tokens: int
    """That the prompt lost with it."""


class BrimOverflow(msgspec.Struct, frozen=True, kw_only=True):
    """What was done to a conversation that outgrew the window."""

    policy: Literal["reject", "trim", "shift", "summarize"]
    num_tokens_before: int
    """As the client sent it."""
    num_tokens_after: int
    num_removed_tokens: int
    """Before, less after, plus those of a summary."""
    num_summary_tokens: int
    """That the summary of what was removed adds to the prompt."""
    summary_s: float
    """That the request waited for it; next to none where it was written before."""
    num_summary_prompt_tokens: int
    """Read to write it; 0 where it was written before."""
    num_summary_cached_tokens: int
    """Of these: not computed."""
    num_summary_completion_tokens: int
    removed_turns: tuple[BrimRemovedTurn, ...]
    """Oldest first; with `shift` those of which no token is left."""


class BrimChoice(msgspec.Struct, frozen=True, kw_only=True):
    """Where one choice's time and tokens went."""

    index: int
    num_prompt_tokens: int
    num_cached_tokens: int
    """Prompt tokens that were not computed for this choice."""
    num_completion_tokens: int
    queue_s: float
    prefill_s: float
    decode_s: float
    seed: int | None
    """The seed that was used, drawn or given."""
    stop_string: str | None
    """The stop string that ended it, where one did."""


class BrimInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What brim says beyond OpenAI's shape.

    Counts are totals of the request; seconds, seed and stop string are those of choice 0.
    """

    model: str
    """The model that answered."""
    instead_of: str | None
    """The one that was asked for, where its smaller partner answered because power is short."""
    engine: str
    quant: str
    context_tokens: int
    """Longest prompt plus answer that the loaded model takes."""
    max_tokens: int
    """Bound of each choice, after the window and the server's answer bound."""
    kv_type: str
    """Of keys and values, as `q8_0`, or `q8_0/f16` where they differ."""
    num_prompt_tokens: int
    num_cached_tokens: int
    num_completion_tokens: int
    num_trimmed_tokens: int
    """Prompt tokens left out to fit the window; `overflow` says which."""
    num_shifted_tokens: int
    """Tokens that left the window while the answer grew, with the policy `shift`."""
    cache: BrimCache
    """Of the first prompt; `num_cached_tokens` is the sum over all."""
    overflow: BrimOverflow | None
    moved_lines: tuple[BrimMovedLine, ...]
    queue_place: int
    """Where the request stood in the queue when it came: 0 ran at once, 1 was the next."""
    queue_s: float
    prefill_s: float
    decode_s: float
    seed: int | None
    stop_string: str | None
    choices: tuple[BrimChoice, ...] | UnsetType = UNSET
    """Each choice's own figures, where there are several."""


class TopLogprob(msgspec.Struct, frozen=True):
    """One of the likeliest tokens at a position."""

    token: str
    """Text; bytes that are not UTF-8 by themselves are written `\\xNN`."""
    logprob: float
    bytes: list[int]


class ChatLogprob(msgspec.Struct, frozen=True):
    """One token of the answer."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """Tokens of a chat answer, in order."""

    content: list[ChatLogprob]
    refusal: None = None


class ChatAnswerMessage(msgspec.Struct, frozen=True, kw_only=True):
    """The model's turn."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One answer to a chat."""

    index: int
    message: ChatAnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishWord


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: tuple[ChatChoice, ...]
    usage: Usage
    brim: BrimInfo


class ChatDelta(msgspec.Struct, frozen=True, kw_only=True):
    """What a chunk adds to the model's turn."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    refusal: UnsetType | None = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One choice of a chunk."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishWord | None = None


class ChatCompletionChunk(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a streamed chat answer."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: tuple[ChatChunkChoice, ...]
    usage: Usage | UnsetType | None = UNSET
    """With `stream_options.include_usage`: null on every chunk but the last."""
    brim: BrimInfo | UnsetType = UNSET
    """On the last chunk."""


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """Tokens of a plain completion: four lists of equal length."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]
    """Where each token's text begins in the choice's text, in characters."""


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One completion, or what a chunk adds to it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishWord | None = None


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of `/v1/completions`, whole or as one event of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: tuple[CompletionChoice, ...]
    usage: Usage | UnsetType | None = UNSET
    brim: BrimInfo | UnsetType = UNSET


class ErrorDetail(msgspec.Struct, frozen=True, kw_only=True):
    """What went wrong, in OpenAI's shape."""

    message: str
    type: str
    param: str | None
    """The field at fault, where one is."""
    code: str


class ErrorBody(msgspec.Struct, frozen=True):
    """Every error response, and the event that ends a broken stream."""

    error: ErrorDetail


class ModelObject(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of `/v1/models`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["brim"] = "brim"


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of `/v1/models`."""

    object: Literal["list"] = "list"
    data: tuple[ModelObject, ...]


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of `/health`; 200 only with `ok`."""

    status: Literal["ok", "loading", "failed", "draining"]
    models: dict[str, str] | UnsetType = UNSET
    """The state of each model, where not all are ready."""


class AmountUsed(msgspec.Struct, frozen=True, kw_only=True):
    """One budget of a day; null is no bound."""

    used: float
    reserved: float = 0
    """That requests in work may still use, beside what they are known to."""
    budget: float | None
    left: float | None


class AppUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of `/brim/v1/usage`."""

    app: str
    day: str
    """In UTC, as 2026-11-22."""
    renews_in_s: float
    tokens: AmountUsed
    """Read and written."""
    energy_j: AmountUsed
    """Where the machine can tell."""
    ssd_write_bytes: AmountUsed
    """Of the prefix cache."""
    num_in_flight: int
    max_concurrent: int | None
    requests_per_minute: int | None
