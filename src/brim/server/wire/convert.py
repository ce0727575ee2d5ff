"""Request structs -> `core.request.Request`, with the checks that a schema cannot say."""

import difflib
import secrets
import time
from collections.abc import Sequence
from typing import Any, cast

import msgspec

from brim.core.request import Message, Request, ToolCall
from brim.core.sampling import SamplingParams
from brim.errors import ContextOverflow, InvalidRequest, NotFound
from brim.runtime.api import ModelStatus
from brim.server import limits
from brim.server.caller import NOBODY, Caller
from brim.server.wire.openai import ChatCompletionRequest, ChatMessage, CompletionRequest
from brim.server.wire.options import request_fields

Body = ChatCompletionRequest | CompletionRequest

_SAMPLING_NAMES = tuple(
    sorted(set(SamplingParams.__struct_fields__) & set(CompletionRequest.__struct_fields__))
)
"""Sampling settings that are handed on under the same name."""


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """One HTTP request, understood: what to ask of the runtime and how to answer."""

    request_id: str
    """Also the `id` of the answer."""
    created_unix_s: int
    model: str
    requests: tuple[Request, ...]
    """One for each prompt; all have the same number of choices."""
    stream: bool
    include_usage: bool

    @property
    def num_choices(self) -> int:
        """Choices over all prompts."""
        return len(self.requests) * self.requests[0].num_choices


def find_model(name: str, models: Sequence[ModelStatus]) -> ModelStatus:
    """The served model of that name.

    Raises:
        NotFound: There is none; the message names those that there are.
    """
    for status in models:
        if status.name == name:
            return status
    names = [status.name for status in models]
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"served here: {', '.join(names) or 'none'}"
    raise NotFound(f"there is no model '{name[:100]}'; {hint}", param="model")


def chat_call(
    body: ChatCompletionRequest, models: Sequence[ModelStatus], caller: Caller = NOBODY
) -> Call:
    """The call behind `/v1/chat/completions`.

    Args:
        body: The request.
        models: What is served to the caller.
        caller: Who sent it.

    Raises:
        InvalidRequest: Two fields contradict each other, or a value does not suit the model.
        NotFound: No such model.
    """
    status = find_model(body.model, models)
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("`top_logprobs` needs `logprobs`: true", param="top_logprobs")
    variables = body.chat_template_kwargs or {}
    _check_variables(variables, depth=1)
    bounds = [n for n in (body.max_tokens, body.max_completion_tokens) if n is not None]
    request_id = f"chatcmpl-{secrets.token_hex(12)}"
    request = Request(
        request_id=request_id,
        model=body.model,
        messages=tuple(_message(message, number) for number, message in enumerate(body.messages)),
        max_tokens=min(bounds, default=None),
        num_choices=body.n or 1,
        stop=_stops(body),
        sampling=_sampling(body, status, (body.top_logprobs or 0) if body.logprobs else None),
        template_variables=variables,
        **_options(body, status, caller),
    )
    return _call(body, request_id, (request,))


def completion_call(
    body: CompletionRequest, models: Sequence[ModelStatus], caller: Caller = NOBODY
) -> Call:
    """The call behind `/v1/completions`.

    Args:
        body: The request.
        models: What is served to the caller.
        caller: Who sent it.

    Raises:
        InvalidRequest: The prompt is none of the four forms, a value does not suit the model, or
            there are more prompts than the app may have requests.
        ContextOverflow: A prompt has more token ids than the window.
        NotFound: No such model.
    """
    status = find_model(body.model, models)
    request_id = f"cmpl-{secrets.token_hex(12)}"
    first = Request(
        request_id=request_id,
        model=body.model,
        max_tokens=body.max_tokens,
        num_choices=body.n or 1,
        stop=_stops(body),
        sampling=_sampling(body, status, body.logprobs),
        **_options(body, status, caller),
    )
    plan = status.plan
    window = min(plan.context_tokens, first.max_context_tokens or plan.context_tokens)
    prompts = prompts_of(body.prompt, plan.model.vocab_size, window)
    _check_allowed(caller, len(prompts))
    requests = tuple(
        msgspec.structs.replace(
            first,
            request_id=f"{request_id}-{number}" if number else request_id,
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_tokens=prompt if isinstance(prompt, tuple) else None,
        )
        for number, prompt in enumerate(prompts)
    )
    return _call(body, request_id, requests)


def prompts_of(
    prompt: str | list[str | int | list[int]], vocab_size: int, context_tokens: int
) -> list[str | tuple[int, ...]]:
    """Each prompt as text or token ids: one text, several, one list of ids, or several.

    Lengths are checked before contents: a list may have millions of items.

    Raises:
        InvalidRequest: The forms are mixed, there are too many, or an id is not the model's.
        ContextOverflow: A list of ids is longer than the window.

    Example:
        >>> prompts_of([1, 2], 8, 4), prompts_of([[1], [2]], 8, 4), prompts_of(["a", "b"], 8, 4)
        ([(1, 2)], [(1,), (2,)], ['a', 'b'])
    """
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):  # the schema takes no empty list
        return [_tokens(prompt, vocab_size, context_tokens)]
    if len(prompt) > limits.MAX_PROMPTS:
        raise InvalidRequest(
            f"`prompt` holds {len(prompt)} prompts; send at most {limits.MAX_PROMPTS} a request",
            param="prompt",
        )
    if len(set(map(type, prompt))) > 1:
        raise _mixed()
    return [
        item
        if isinstance(item, str)
        else _tokens(cast("list[int]", item), vocab_size, context_tokens)
        for item in prompt
    ]


def _check_allowed(caller: Caller, num_prompts: int) -> None:
    """Refuse what an app's limits never let through: each prompt is a request of its own.

    Raises:
        InvalidRequest: There are more prompts than it may have requests.
    """
    if caller.app is None:
        return
    given = caller.app.limits
    bounds = [n for n in (given.max_concurrent, given.requests_per_minute) if n is not None]
    if num_prompts > min(bounds, default=num_prompts):
        raise InvalidRequest(
            f"`prompt` holds {num_prompts} prompts, each a request of its own, and app "
            f"'{caller.app.name}' may send {min(bounds)} together; send the others later",
            param="prompt",
        )


def _tokens(items: Sequence[object], vocab_size: int, context_tokens: int) -> tuple[int, ...]:
    if not items:
        raise InvalidRequest("`prompt` has an empty list of token ids", param="prompt")
    check_length(len(items), context_tokens)
    if set(map(type, items)) != {int}:
        raise _mixed()
    tokens = cast("tuple[int, ...]", tuple(items))
    if min(tokens) < 0 or max(tokens) >= vocab_size:
        raise InvalidRequest(
            f"`prompt` has a token id outside 0 to {vocab_size - 1}, this model's range",
            param="prompt",
        )
    return tokens


def check_length(num_tokens: int, max_tokens: int) -> None:
    """Refuse more token ids than a window takes, or than all prompts of a request may have.

    Raises:
        ContextOverflow: There are more.
    """
    if num_tokens > max_tokens:
        raise ContextOverflow(
            f"prompt is {num_tokens} tokens, and {max_tokens} are taken; shorten it by "
            f"{num_tokens - max_tokens} or load the model with a larger --context",
            param="prompt",
        )


def _mixed() -> InvalidRequest:
    return InvalidRequest(
        "`prompt` mixes texts, token ids and lists; send one kind", param="prompt"
    )


def _call(body: Body, request_id: str, requests: tuple[Request, ...]) -> Call:
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("`stream_options` needs `stream`: true", param="stream_options")
    return Call(
        request_id=request_id,
        created_unix_s=int(time.time()),
        model=body.model,
        requests=requests,
        stream=bool(body.stream),
        include_usage=body.stream_options is not None and bool(body.stream_options.include_usage),
    )


_OF_THE_MODEL = ("reasoning_content", "reasoning", "tool_calls")
"""Fields of a message that only the model's own turns have."""


def _message(message: ChatMessage, number: int) -> Message:
    content = message.content
    if content is None and not message.tool_calls:
        raise InvalidRequest(
            f"`messages[{number}].content` is missing or null; only a turn with `tool_calls` may "
            "go without",
            param=f"messages[{number}].content",
        )
    for name in _OF_THE_MODEL if message.role != "assistant" else ():
        if getattr(message, name) is not None:
            raise InvalidRequest(
                f"`messages[{number}].{name}` is for turns of the role assistant; leave it out",
                param=f"messages[{number}].{name}",
            )
    reasoning = message.reasoning_content
    return Message(
        role="system" if message.role == "developer" else message.role,
        content=content
        if isinstance(content, str)
        else "".join(part.text for part in content or ()),
        name=message.name,
        reasoning=message.reasoning if reasoning is None else reasoning,
        tool_calls=tuple(
            ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments)
            for call in message.tool_calls or ()
        ),
        tool_call_id=message.tool_call_id,
    )


def _options(body: Body, status: ModelStatus, caller: Caller) -> dict[str, Any]:
    return request_fields(
        body.brim,
        caller=caller,
        overflow=status.overflow,
        pair=status.pair,
        is_flexible=body.service_tier == "flex",
    )


def _stops(body: Body) -> tuple[str, ...]:
    stop = body.stop
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


def _sampling(body: Body, status: ModelStatus, num_logprobs: int | None) -> SamplingParams:
    given: dict[str, Any] = {
        name: value for name in _SAMPLING_NAMES if (value := getattr(body, name)) is not None
    }
    if "logit_bias" in given:
        given["logit_bias"] = _logit_bias(given["logit_bias"], status.plan.model.vocab_size)
    if "dry_sequence_breakers" in given:
        given["dry_sequence_breakers"] = tuple(given["dry_sequence_breakers"])
    return SamplingParams(**given, num_logprobs=num_logprobs)


def _logit_bias(bias: dict[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    pairs = {int(token): value for token, value in bias.items()}
    if pairs and max(pairs) >= vocab_size:
        raise InvalidRequest(
            f"`logit_bias` names token {max(pairs)}; this model's ids end at {vocab_size - 1}",
            param="logit_bias",
        )
    return tuple(pairs.items())


def _check_variables(value: Any, depth: int) -> None:
    """Keep what cannot be sent on to a worker out: bottomless nesting, integers over 64 bits."""
    if depth > limits.MAX_VARIABLE_DEPTH:
        raise InvalidRequest(
            f"`chat_template_kwargs` is nested deeper than {limits.MAX_VARIABLE_DEPTH} levels",
            param="chat_template_kwargs",
        )
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise InvalidRequest(
            "`chat_template_kwargs` has an integer wider than 64 bits; send it as a string",
            param="chat_template_kwargs",
        )
    if isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            _check_variables(item, depth + 1)
