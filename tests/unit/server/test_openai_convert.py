"""Request structs become core requests: every field lands where it acts, or is refused."""

from typing import Any

import msgspec
import pytest
from support.scripted import ScriptedRuntime, chat_body

from brim.core.request import Message, ToolCall
from brim.core.sampling import SamplingParams
from brim.errors import ContextOverflow, InvalidRequest, NotFound
from brim.runtime.api import ModelStatus
from brim.server.limits import MAX_PROMPTS
from brim.server.wire.convert import Call, chat_call, completion_call
from brim.server.wire.openai import ChatCompletionRequest, CompletionRequest


@pytest.fixture
def models(runtime: ScriptedRuntime) -> list[ModelStatus]:
    return runtime.models()


def chat(models: list[ModelStatus], **fields: Any) -> Call:
    return chat_call(msgspec.convert(chat_body(**fields), ChatCompletionRequest), models)


def plain(models: list[ModelStatus], prompt: object, **fields: Any) -> Call:
    body = {"model": "small", "prompt": prompt, **fields}
    return completion_call(msgspec.convert(body, CompletionRequest), models)


SAMPLING: dict[str, Any] = {
    "temperature": 0.5,
    "top_k": 7,
    "top_p": 0.25,
    "min_p": 0.125,
    "typical_p": 0.75,
    "repeat_penalty": 1.5,
    "presence_penalty": -1.0,
    "frequency_penalty": 0.5,
    "repeat_last_n": 9,
    "dry_multiplier": 2.0,
    "dry_base": 3.0,
    "dry_allowed_length": 4,
    "dry_penalty_last_n": 5,
    "dry_sequence_breakers": ["a", "b"],
    "xtc_probability": 0.5,
    "xtc_threshold": 0.25,
    "logit_bias": {"3": -100, "4095": 1.5},
    "seed": 42,
    "ignore_eos": True,
}


def test_every_sampling_field_reaches_the_sampling_parameters(models: list[ModelStatus]) -> None:
    """Each of the settings has its value in `SamplingParams`, and none is missing here."""
    sampling = chat(models, **SAMPLING).requests[0].sampling
    assert set(SAMPLING) == set(SamplingParams.__struct_fields__) - {"num_logprobs"}
    expected = SAMPLING | {
        "dry_sequence_breakers": ("a", "b"),
        "logit_bias": ((3, -100.0), (4095, 1.5)),
    }
    assert {name: getattr(sampling, name) for name in expected} == expected


def test_absent_fields_leave_the_defaults(models: list[ModelStatus]) -> None:
    """A bare request samples as core.sampling says, with one choice and no bound of its own."""
    call = chat(models)
    request = call.requests[0]
    assert request.sampling == SamplingParams()
    assert (request.num_choices, request.max_tokens, request.stop) == (1, None, ())
    assert (call.stream, call.include_usage, call.num_choices) == (False, False, 1)


def test_messages_become_roles_and_text(models: list[ModelStatus]) -> None:
    """Text parts are joined, `developer` is `system`, and tool results stay with their role."""
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "tool", "content": "42", "tool_call_id": "1", "name": "sum"},
    ]
    assert chat(models, messages=messages).requests[0].messages == (
        Message(role="system", content="be brief"),
        Message(role="user", content="ab"),
        Message(role="tool", content="42", name="sum", tool_call_id="1"),
    )


def test_turns_that_agents_send_back_keep_reasoning_and_calls(models: list[ModelStatus]) -> None:
    """A turn may consist of calls alone, and `reasoning` is another name."""
    function = {"name": "look", "arguments": '{"at": "sky"}'}
    messages = [
        {"role": "user", "content": "Go."},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "Hm.",
            "tool_calls": [{"id": "c1", "type": "function", "index": 0, "function": function}],
        },
        {"role": "assistant", "reasoning": "So.", "content": "Blue."},
    ]
    call = ToolCall(id="c1", name="look", arguments='{"at": "sky"}')
    assert chat(models, messages=messages).requests[0].messages == (
        Message(role="user", content="Go."),
        Message(role="assistant", content="", reasoning="Hm.", tool_calls=(call,)),
        Message(role="assistant", content="Blue.", reasoning="So."),
    )


@pytest.mark.parametrize(
    ("message", "name"),
    [
        ({"role": "user"}, "content"),
        ({"role": "user", "content": None}, "content"),
        ({"role": "assistant", "tool_calls": []}, "content"),
        ({"role": "user", "content": "", "reasoning": "Hm."}, "reasoning"),
        ({"role": "tool", "content": "", "tool_calls": []}, "tool_calls"),
    ],
)
def test_fields_that_do_not_suit_a_turn_are_refused(
    models: list[ModelStatus], message: dict[str, Any], name: str
) -> None:
    """Only a turn with calls has no content, and only the model reasons and calls."""
    with pytest.raises(InvalidRequest) as caught:
        chat(models, messages=[message])
    assert caught.value.param == f"messages[0].{name}"
    assert f"`messages[0].{name}`" in caught.value.message


def test_ids_tell_the_two_kinds_apart(models: list[ModelStatus]) -> None:
    """A chat's id begins with chatcmpl-, a completion's with cmpl-, and no two are equal."""
    ids = {chat(models).request_id, chat(models).request_id, plain(models, "x").request_id}
    assert sorted(name.split("-")[0] for name in ids) == ["chatcmpl", "chatcmpl", "cmpl"]
    assert chat(models).requests[0].request_id.startswith("chatcmpl-")


@pytest.mark.parametrize(
    ("fields", "bound"),
    [
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 6}, 6),
        ({"max_tokens": 5, "max_completion_tokens": 6}, 5),
    ],
)
def test_both_names_of_the_answer_bound_hold(
    models: list[ModelStatus], fields: dict[str, int], bound: int
) -> None:
    """`max_tokens` and `max_completion_tokens` are both upper bounds; the smaller one counts."""
    assert chat(models, **fields).requests[0].max_tokens == bound


@pytest.mark.parametrize(
    ("fields", "num_logprobs"),
    [
        ({}, None),
        ({"logprobs": False}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 3}, 3),
    ],
)
def test_logprobs_of_a_chat(
    models: list[ModelStatus], fields: dict[str, Any], num_logprobs: int | None
) -> None:
    """`logprobs` switches them on; `top_logprobs` says how many alternatives."""
    assert chat(models, **fields).requests[0].sampling.num_logprobs == num_logprobs


def test_logprobs_of_a_completion_are_a_number(models: list[ModelStatus]) -> None:
    """`logprobs: 2` asks for two alternatives, `0` for the chosen token alone."""
    assert plain(models, "x", logprobs=2).requests[0].sampling.num_logprobs == 2
    assert plain(models, "x", logprobs=0).requests[0].sampling.num_logprobs == 0


@pytest.mark.parametrize(("stop", "stops"), [("a", ("a",)), (["a", "b"], ("a", "b")), ([], ())])
def test_stop_is_one_string_or_several(
    models: list[ModelStatus], stop: object, stops: tuple[str, ...]
) -> None:
    """Both of OpenAI's forms give the same tuple."""
    assert chat(models, stop=stop).requests[0].stop == stops


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": 2, "logprobs": False}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"logit_bias": {"4096": 1}}, "logit_bias"),
        ({"chat_template_kwargs": {"a": 2**63}}, "chat_template_kwargs"),
    ],
)
def test_fields_that_contradict_each_other_or_the_model_are_refused(
    models: list[ModelStatus], fields: dict[str, Any], param: str
) -> None:
    """What only makes sense together, and what the model does not have, names its field."""
    with pytest.raises(InvalidRequest) as caught:
        chat(models, **fields)
    assert caught.value.param == param


def test_template_variables_are_handed_on_up_to_a_depth(models: list[ModelStatus]) -> None:
    """`chat_template_kwargs` reaches the request; nesting that could exhaust a stack does not."""
    variables = {"enable_thinking": False, "list": [1, {"a": None}]}
    assert chat(models, chat_template_kwargs=variables).requests[0].template_variables == variables
    deep: Any = 1
    for _ in range(20):
        deep = [deep]
    with pytest.raises(InvalidRequest, match="deeper than"):
        chat(models, chat_template_kwargs={"a": deep})


def test_an_unknown_model_is_not_found(models: list[ModelStatus]) -> None:
    """The message proposes the nearest name, or lists what is served."""
    with pytest.raises(NotFound, match="did you mean 'small'") as caught:
        chat(models, model="smallish")
    assert caught.value.param == "model"
    with pytest.raises(NotFound, match="served here: small"):
        chat(models, model="gpt")


@pytest.mark.parametrize(
    ("prompt", "texts", "tokens"),
    [
        ("a", ["a"], [None]),
        (["a", "b"], ["a", "b"], [None, None]),
        ([1, 2], [None], [(1, 2)]),
        ([[1], [2, 3]], [None, None], [(1,), (2, 3)]),
    ],
)
def test_the_four_forms_of_a_prompt(
    models: list[ModelStatus], prompt: object, texts: list[Any], tokens: list[Any]
) -> None:
    """Each prompt is a request of its own, as text or as tokens."""
    call = plain(models, prompt, n=2)
    assert [request.prompt for request in call.requests] == texts
    assert [request.prompt_tokens for request in call.requests] == tokens
    assert call.num_choices == 2 * len(texts)
    assert len({request.request_id for request in call.requests}) == len(texts)


class Untouchable(list[Any]):
    """A list whose first item and length may be asked for, and nothing else."""

    def __iter__(self) -> Any:
        raise AssertionError("the items were looked at")


@pytest.mark.parametrize("wrap", [lambda ids: ids, lambda ids: [ids, ids]])
def test_too_many_token_ids_are_refused_unseen(models: list[ModelStatus], wrap: Any) -> None:
    """A list longer than the window is an overflow with the numbers, before any item is read."""
    prompt = wrap(Untouchable([1] * 8193))
    body = CompletionRequest(model="small", prompt=prompt)
    with pytest.raises(ContextOverflow, match="8193 tokens, and 8192 are taken; shorten it by 1"):
        completion_call(body, models)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (["a", 1], "mixes"),
        ([1, [2]], "mixes"),
        ([[1], "a"], "mixes"),
        ([[]], "empty list"),
        ([-1], "outside 0 to 4095"),
        ([4096], "outside 0 to 4095"),
        ([[1], [10**30]], "outside 0 to 4095"),
        (["a"] * (MAX_PROMPTS + 1), f"at most {MAX_PROMPTS}"),
    ],
)
def test_prompts_that_are_none_of_them_are_refused(
    models: list[ModelStatus], prompt: object, words: str
) -> None:
    """Mixed forms, foreign ids and too many prompts name `prompt` and the bound."""
    with pytest.raises(InvalidRequest, match=words) as caught:
        plain(models, prompt)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    ("brim", "forced"),
    [(None, False), ({}, False), ({"force": False}, False), ({"force": True}, True)],
)
def test_force_is_handed_on(
    models: list[ModelStatus], brim: dict[str, bool] | None, forced: bool
) -> None:
    """`brim.force` of either route reaches the runtime, which asks whether it is allowed."""
    assert chat(models, brim=brim).requests[0].force is forced
    assert [each.force for each in plain(models, ["a", "b"], brim=brim).requests] == [forced] * 2
