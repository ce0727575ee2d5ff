"""Schemas of `/v1/chat/completions` and `/v1/completions` requests.

A field that brim does not do is declared with the values that change nothing (`tools: []`,
`response_format: {"type": "text"}`), so that the published schema is true; any other value is
refused with the sentence in `UNSUPPORTED`.  Fields that are not here are unknown and refused too.
Defaults of sampling stand in core.sampling: None means "not given".

Checklist for a new field: here, `convert.py`, docs/api.md.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from brim.core.sampling import MAX_SEED
from brim.server import limits
from brim.server.wire.options import BrimOptions

Role = Literal["system", "developer", "user", "assistant", "tool"]
Stop = Annotated[str, Meta(min_length=1, max_length=limits.MAX_STOP_CHARS)]
Count = Annotated[int, Meta(ge=1, le=limits.MAX_TOKENS)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
History = Annotated[int, Meta(ge=0, le=limits.MAX_HISTORY_TOKENS)]
TopLogprobs = Annotated[int, Meta(ge=0, le=limits.MAX_TOP_LOGPROBS)]
Breaker = Annotated[str, Meta(min_length=1, max_length=limits.MAX_DRY_BREAKER_CHARS)]
TokenId = Annotated[str, Meta(pattern=rf"^(0|[1-9][0-9]{{0,9}}){limits.STRING_END}")]
Empty = Annotated[list[Any], Meta(max_length=0)]


class TextPart(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A piece of a message's text; several are joined as they are."""

    type: Literal["text"]
    text: str


class CalledFunction(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the model asked for."""

    name: Annotated[str, Meta(min_length=1)]
    arguments: str = ""
    """JSON of an object, as text."""


class HistoryToolCall(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A tool call of an earlier turn."""

    function: CalledFunction
    id: str | None = None
    type: Literal["function"] | None = None
    index: int | None = None
    """Left over from the stream that it came in."""


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One turn.

    The fields after `tool_calls` are what servers put into answers; clients send them back.
    """

    role: Role
    """`developer` is rendered as `system`, which is what templates know."""
    content: str | Annotated[list[TextPart], Meta(max_length=limits.MAX_PARTS)] | None = None
    """Only a turn with tool calls may go without."""
    name: str | None = None
    tool_call_id: str | None = None
    """Of the call that a tool's result answers."""
    reasoning_content: str | None = None
    """What the model thought, in an earlier turn of it; templates show or drop it."""
    reasoning: str | None = None
    """Other servers' name of the same; where both are given, `reasoning_content` counts."""
    tool_calls: Annotated[list[HistoryToolCall], Meta(max_length=limits.MAX_TOOL_CALLS)] | None = (
        None
    )
    """Of an earlier turn of the model."""
    refusal: None = None
    annotations: Empty | None = None
    audio: None = None
    function_call: None = None


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to stream."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class TextFormat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The only response format so far."""

    type: Literal["text"]


class _Common(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What chat and plain completions share."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=limits.MAX_CHOICES)] | None = None
    stop: Stop | Annotated[list[Stop], Meta(max_length=limits.MAX_STOPS)] | None = None
    max_tokens: Count | None = None

    # Sampling, with llama-server's names where OpenAI has none.
    seed: Annotated[int, Meta(ge=0, le=MAX_SEED)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=5)] | None = None
    top_p: Fraction | None = None
    top_k: Annotated[int, Meta(ge=0, le=limits.MAX_TOKENS)] | None = None
    min_p: Fraction | None = None
    typical_p: Fraction | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repeat_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    repeat_last_n: History | None = None
    dry_multiplier: Annotated[float, Meta(ge=0, le=100)] | None = None
    dry_base: Annotated[float, Meta(ge=1, le=10)] | None = None
    dry_allowed_length: History | None = None
    dry_penalty_last_n: History | None = None
    dry_sequence_breakers: (
        Annotated[list[Breaker], Meta(max_length=limits.MAX_DRY_BREAKERS)] | None
    ) = None
    xtc_probability: Fraction | None = None
    xtc_threshold: Fraction | None = None
    logit_bias: (
        Annotated[
            dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]],
            Meta(max_length=limits.MAX_LOGIT_BIAS),
        ]
        | None
    ) = None
    ignore_eos: bool | None = None

    brim: BrimOptions | None = None
    service_tier: Literal["auto", "default", "flex"] | None = None
    """`flex` is `brim.priority` background, where that is not given."""

    # Accepted without effect: they are about accounts and billing, not about the answer.
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    store: Literal[False] | None = None


class ChatCompletionRequest(_Common, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=limits.MAX_MESSAGES)]
    max_completion_tokens: Count | None = None
    """OpenAI's newer name of `max_tokens`; where both are given, both hold."""
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    modalities: Annotated[list[Literal["text"]], Meta(min_length=1, max_length=1)] | None = None
    response_format: TextFormat | None = None
    tools: Empty | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    functions: Empty | None = None
    function_call: Literal["none", "auto"] | None = None
    audio: None = None
    prediction: None = None
    reasoning_effort: None = None
    verbosity: None = None
    web_search_options: None = None


class CompletionRequest(_Common, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /v1/completions`."""

    prompt: str | Annotated[list[str | int | list[int]], Meta(min_length=1)]
    """Text, tokens, or a list of either: see `convert.prompts_of`."""
    logprobs: TopLogprobs | None = None
    best_of: Annotated[int, Meta(ge=1, le=1)] | None = None
    echo: Literal[False] | None = None
    suffix: Annotated[str, Meta(max_length=0)] | None = None


UNSUPPORTED: dict[str, str] = {
    "tools": "tool calling is not done yet; leave `tools` out",
    "tool_choice": 'tool calling is not done yet; `tool_choice` may be "none" or "auto"',
    "functions": "tool calling is not done yet; leave `functions` out",
    "function_call": "tool calling is not done yet; leave `function_call` out",
    "response_format": 'only {"type": "text"} is done so far; ask for the format in the messages',
    "modalities": 'only text is done; leave `modalities` out or send ["text"]',
    "audio": "only text is done; leave `audio` out",
    "prediction": "predicted outputs are not done; leave `prediction` out",
    "reasoning_effort": "how a template is told to think differs by model; use "
    "`chat_template_kwargs`, as in the model's card",
    "verbosity": "this is not done; ask for it in the messages",
    "web_search_options": "the web is not searched; leave `web_search_options` out",
    "store": "answers are not stored; leave `store` out",
    "service_tier": 'there is no such tier; leave `service_tier` out, or send "flex" for an answer '
    "that can wait",
    "include_obfuscation": "chunks are not padded; leave `include_obfuscation` out",
    "best_of": "choosing among answers is not done; leave `best_of` out",
    "echo": "the prompt is not repeated in the answer; leave `echo` out",
    "suffix": "filling in the middle is not done; leave `suffix` out",
}
"""Field -> why a value outside its schema is refused, for fields that exist but are not done."""

UNSUPPORTED_PARTS = frozenset({"image_url", "input_audio", "file", "refusal"})
"""OpenAI's content parts that are not text."""
