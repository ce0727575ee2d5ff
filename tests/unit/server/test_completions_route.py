"""Answers of the two completion routes: OpenAI's shapes, and the `brim` object."""

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.scripted import Client, ScriptedRuntime, make_plan

from brim.core.answer import FinishReason, LinePlace, MovedLine, OverflowReport, RemovedTurn
from brim.core.cache import CacheReport, CacheSource, MissReason
from brim.core.request import OverflowPolicy, Request
from brim.server.wire.chunks import ChatChunks, CompletionChunks
from brim.server.wire.convert import Call
from brim.server.wire.responses import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
)

pytestmark = pytest.mark.anyio

TEXT = "Hello wörld!\n"


async def test_a_whole_chat_answer_has_openais_shape(client: Client) -> None:
    """Every field of a chat.completion is there, with the text in one message."""
    reply = await client.chat()
    assert reply.status == 200
    assert reply.headers["content-type"] == "application/json"
    answer = reply.json()
    assert {key: answer[key] for key in ("object", "model", "choices", "usage")} == {
        "object": "chat.completion",
        "model": "small",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": TEXT, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 11,
            "completion_tokens": 4,
            "total_tokens": 15,
            "prompt_tokens_details": {"cached_tokens": 3},
        },
    }
    assert answer["id"].startswith("chatcmpl-")
    assert answer["system_fingerprint"] == "brim-llamacpp-0123456789abcdef"
    assert answer["created"] > 1_600_000_000


async def test_the_brim_object_says_what_the_answer_cost(client: Client) -> None:
    """Model, window, cached tokens, times (in whole microseconds), KV type and seed are there."""
    answer = (await client.chat(max_tokens=9)).json()
    assert answer["brim"] == {
        "model": "small",
        "instead_of": None,
        "engine": "llamacpp",
        "quant": "F16",
        "context_tokens": 8192,
        "max_tokens": 9,
        "kv_type": "q8_0/f16",
        "num_prompt_tokens": 11,
        "num_cached_tokens": 3,
        "num_completion_tokens": 4,
        "num_trimmed_tokens": 0,
        "num_shifted_tokens": 0,
        "cache": {"source": "memory", "cached_tokens": 3, "reason": "", "restore_s": 0.0},
        "overflow": None,
        "moved_lines": [],
        "queue_place": 0,
        "queue_s": 0.001,
        "prefill_s": 0.02,
        "decode_s": 0.3,
        "seed": 100,
        "stop_string": None,
    }


async def test_headers_say_what_is_known_before_the_first_byte(client: Client) -> None:
    """`x-brim-*` names request, model, engine and window, streamed or not."""
    for stream in (False, True):
        headers = (await client.chat(stream=stream)).headers
        assert headers["x-brim-request-id"].startswith("chatcmpl-")
        assert headers["x-request-id"] == headers["x-brim-request-id"]
        known = ("x-brim-model", "x-brim-engine", "x-brim-quant", "x-brim-context-tokens")
        assert [headers[name] for name in known] == ["small", "llamacpp", "F16", "8192"]


@pytest.mark.parametrize(
    ("report", "headers"),
    [
        (CacheReport(), {"x-brim-cache": "miss", "x-brim-cached-tokens": "0"}),
        (
            CacheReport(source=CacheSource.DISK),
            {"x-brim-cache": "hit", "x-brim-cached-tokens": "3"},
        ),
        (
            CacheReport(
                source=CacheSource.MEMORY,
                miss=MissReason.DIVERGES,
                diverges_at_token=7,
                diverges_in_turn=2,
            ),
            {
                "x-brim-cache": "partial",
                "x-brim-cached-tokens": "3",
                "x-brim-cache-reason": "diverges at token 7 of turn 2",
            },
        ),
    ],
)
async def test_what_was_reused_and_why_no_more_is_in_the_answer(
    client: Client, runtime: ScriptedRuntime, report: CacheReport, headers: dict[str, str]
) -> None:
    """Source, tokens and reason are in headers and object of a whole answer, and end a stream."""
    runtime.cache, runtime.num_cached_tokens = report, 0 if report == CacheReport() else 3
    reply = await client.chat()
    said = {name: text for name, text in reply.headers.items() if name.startswith("x-brim-cache")}
    assert said == headers
    object_ = reply.json()["brim"]["cache"]
    assert object_["source"] == report.source.value
    assert object_["reason"] == headers.get("x-brim-cache-reason", "")
    assert object_["cached_tokens"] == int(headers["x-brim-cached-tokens"])
    usage = reply.json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": object_["cached_tokens"]}
    streamed = (await client.chat(stream=True)).events()
    assert streamed[-2]["brim"]["cache"] == object_


@pytest.mark.parametrize("stream", [False, True])
async def test_a_smaller_model_that_answered_is_named(
    runtime: ScriptedRuntime, client: Client, stream: bool
) -> None:
    """Where power is short and the draft answers, headers and `brim` say so."""
    runtime.instead_of = "small"
    runtime.plan = make_plan("tiny")
    reply = await client.chat(stream=stream)
    brim = reply.events()[-2]["brim"] if stream else reply.json()["brim"]
    assert (brim["model"], brim["instead_of"]) == ("tiny", "small")
    assert reply.headers["x-brim-model"] == "tiny"
    assert reply.headers["x-brim-instead-of"] == "small"


async def test_what_was_left_out_or_moved_is_in_the_answer(
    client: Client, runtime: ScriptedRuntime
) -> None:
    """Nothing is cut or moved without a word: headers before the text, the object with it."""
    runtime.overflow = OverflowReport(
        policy=OverflowPolicy.TRIM,
        num_tokens_before=100,
        num_tokens_after=60,
        num_removed_tokens=40,
        removed_turns=(RemovedTurn(index=1, role="user", num_tokens=40),),
    )
    line = MovedLine(kind="date", message_index=0, moved_to=LinePlace.SYSTEM_END, text="Today ...")
    runtime.moved_lines, runtime.queue_place = (line,), 3
    for stream in (False, True):
        reply = await client.chat(stream=stream)
        assert reply.headers["x-brim-trimmed-tokens"] == "40"
        assert reply.headers["x-brim-queue-place"] == "3"
        info = (reply.events()[-2] if stream else reply.json())["brim"]
        assert (info["num_trimmed_tokens"], info["queue_place"]) == (40, 3)
        assert info["overflow"] == {
            "policy": "trim",
            "num_tokens_before": 100,
            "num_tokens_after": 60,
            "num_removed_tokens": 40,
            "num_summary_tokens": 0,
            "summary_s": 0.0,
            "num_summary_prompt_tokens": 0,
            "num_summary_cached_tokens": 0,
            "num_summary_completion_tokens": 0,
            "removed_turns": [{"index": 1, "role": "user", "num_tokens": 40}],
        }
        assert info["moved_lines"] == [
            {"kind": "date", "message_index": 0, "moved_to": "end of the system prompt"}
        ]


async def test_what_was_left_out_of_several_prompts_is_added_up(
    client: Client, runtime: ScriptedRuntime
) -> None:
    """Two prompts that were cut have lost the tokens of both."""
    runtime.overflow = OverflowReport(
        policy=OverflowPolicy.SHIFT,
        num_tokens_before=100,
        num_tokens_after=60,
        num_removed_tokens=40,
    )
    answer = (await client.complete(prompt=["a", "b"])).json()
    assert answer["brim"]["num_trimmed_tokens"] == 80
    assert answer["brim"]["overflow"]["num_tokens_before"] == 200


async def test_several_choices_are_numbered_and_count_their_prompt_once(client: Client) -> None:
    """With n=2 usage counts one prompt, and `brim.choices` tells the choices apart."""
    answer = (await client.chat(n=2)).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert [choice["message"]["content"] for choice in answer["choices"]] == [TEXT, TEXT]
    assert answer["usage"]["prompt_tokens"] == 11
    assert answer["usage"]["completion_tokens"] == 8
    assert [choice["seed"] for choice in answer["brim"]["choices"]] == [100, 101]
    assert [choice["num_cached_tokens"] for choice in answer["brim"]["choices"]] == [3, 11]


@pytest.mark.parametrize("reason", [FinishReason.STOP, FinishReason.LENGTH])
async def test_finish_reasons_are_openais_words(
    client: Client, runtime: ScriptedRuntime, reason: FinishReason
) -> None:
    """`stop` and `length` come out as they are; the stop string is named in `brim`."""
    runtime.finish_reason = reason
    answer = (await client.chat(stop="END")).json()
    assert answer["choices"][0]["finish_reason"] == reason.value
    assert answer["brim"]["stop_string"] == "END"


async def test_a_whole_completion_has_openais_shape(client: Client) -> None:
    """A text_completion has `text`, and null logprobs unless asked for."""
    answer = (await client.complete()).json()
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["choices"] == [
        {"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "stop"}
    ]
    assert answer["brim"]["engine"] == "llamacpp"


async def test_several_prompts_are_several_requests(
    client: Client, runtime: ScriptedRuntime
) -> None:
    """Choices are numbered prompt by prompt, and usage adds the prompts up."""
    answer = (await client.complete(prompt=["a", "b"], n=2)).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [scripted.request.prompt for scripted in runtime.answers] == ["a", "b"]
    assert answer["usage"]["prompt_tokens"] == 22
    assert answer["usage"]["completion_tokens"] == 16


async def test_chat_logprobs_carry_tokens_bytes_and_alternatives(
    client: Client, runtime: ScriptedRuntime
) -> None:
    """Each token has its text, bytes and likeliest alternatives; half a character is escaped."""
    runtime.pieces = [b"a", b"\xf0\x9f", b"\x98\x80"]
    answer = (await client.chat(logprobs=True, top_logprobs=1)).json()
    content = answer["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == ["a", "\\xf0\\x9f", "\\x98\\x80"]
    assert content[0] == {
        "token": "a",
        "logprob": -0.25,
        "bytes": [97],
        "top_logprobs": [{"token": "t0", "logprob": 0.0, "bytes": [116, 48]}],
    }
    assert answer["choices"][0]["logprobs"]["refusal"] is None


async def test_completion_logprobs_are_lists_with_offsets(client: Client) -> None:
    """The four lists have one entry a token; offsets count characters of the text."""
    for stream in (False, True):
        reply = await client.complete(logprobs=1, stream=stream)
        if stream:
            parts = [event["choices"][0]["logprobs"] for event in reply.events()[:-1]]
            found = [part for part in parts if part is not None]
        else:
            found = [reply.json()["choices"][0]["logprobs"]]
        assert [text for part in found for text in part["tokens"]] == ["Hello", " ", "wörld", "!\n"]
        assert [offset for part in found for offset in part["text_offset"]] == [0, 5, 6, 11]
        assert found[0]["top_logprobs"][0] == {"t0": 0.0}


async def test_impossible_logprobs_are_a_number(client: Client, runtime: ScriptedRuntime) -> None:
    """JSON has no -Infinity: OpenAI's -9999 stands for it."""
    runtime.logprob = float("-inf")
    answer = (await client.chat(logprobs=True)).json()
    assert answer["choices"][0]["logprobs"]["content"][0]["logprob"] == -9999.0


async def test_a_streamed_chat_begins_with_the_role_and_ends_with_done(client: Client) -> None:
    """Role, text, reason, `[DONE]`: the deltas join to the text of the whole answer."""
    reply = await client.chat(stream=True)
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    *chunks, done = reply.events()
    assert done == "[DONE]"
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": "", "refusal": None}
    assert "".join(delta.get("content", "") for delta in deltas) == TEXT
    assert deltas[-1] == {}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-2:] == [None, "stop"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1


async def test_brim_stands_on_the_last_chunk_only(client: Client) -> None:
    """Without usage the last choice's ending carries `brim`, and no chunk has `usage`."""
    *chunks, _ = (await client.chat(stream=True, n=2)).events()
    assert ["brim" in chunk for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert not any("usage" in chunk for chunk in chunks)
    assert chunks[-1]["brim"]["num_completion_tokens"] == 8


async def test_usage_is_a_chunk_of_its_own_when_asked_for(client: Client) -> None:
    """With include_usage the last chunk has no choices, and every other has `usage: null`."""
    *chunks, _ = (await client.chat(stream=True, stream_options={"include_usage": True})).events()
    *others, last = chunks
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == 15
    assert last["brim"]["seed"] == 100
    assert all(chunk["usage"] is None and "brim" not in chunk for chunk in others)


async def test_a_streamed_completion_joins_to_the_whole(client: Client) -> None:
    """Text chunks of /v1/completions join to the text; the last has the reason and no text."""
    *chunks, done = (await client.complete(stream=True)).events()
    assert done == "[DONE]"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == TEXT
    assert chunks[-1]["choices"][0] == {
        "index": 0,
        "text": "",
        "logprobs": None,
        "finish_reason": "stop",
    }


async def test_a_batch_of_one_choice_is_one_chunk_and_keeps_every_logprob(
    client: Client, runtime: ScriptedRuntime
) -> None:
    """What the runtime coalesced is sent as one chunk, with one logprob entry for each token."""
    runtime.batch_size = 4
    *chunks, _ = (await client.chat(stream=True, logprobs=True)).events()
    texts = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["logprobs"]]
    assert [choice["delta"]["content"] for choice in texts] == [TEXT]
    assert len(texts[0]["logprobs"]["content"]) == 4


async def test_an_answer_without_text_is_still_complete(
    client: Client, runtime: ScriptedRuntime
) -> None:
    """A stop string at once gives role, reason and `[DONE]`, and an empty message when whole."""
    runtime.pieces = []
    *chunks, done = (await client.chat(stream=True)).events()
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, "stop"]
    assert done == "[DONE]"
    assert (await client.chat()).json()["choices"][0]["message"]["content"] == ""


async def test_answers_fit_their_published_schema(client: Client) -> None:
    """Every body and chunk decodes to the struct that OpenAPI describes, with nothing left over."""
    for reply, kind in (
        (await client.chat(n=2, logprobs=True, top_logprobs=2), ChatCompletion),
        (await client.complete(logprobs=2), Completion),
    ):
        value = msgspec.json.decode(reply.body, type=kind)
        assert msgspec.json.decode(msgspec.json.encode(value)) == reply.json()
    options = {"include_usage": True}
    for reply, chunk_kind in (
        (await client.chat(stream=True, stream_options=options), ChatCompletionChunk),
        (await client.complete(stream=True, stream_options=options), Completion),
    ):
        for event in reply.events()[:-1]:
            value = msgspec.convert(event, chunk_kind)
            assert msgspec.json.decode(msgspec.json.encode(value)) == event


async def test_every_answer_is_released(client: Client, runtime: ScriptedRuntime) -> None:
    """After a response each answer was read to its end or cancelled."""
    await client.chat()
    await client.chat(stream=True)
    await client.complete(prompt=["a", "b"], stream=True)
    assert len(runtime.answers) == 4
    assert all(answer.is_finished for answer in runtime.answers)


def call_for(model: str, num_choices: int) -> Call:
    return Call(
        request_id='id"\\',
        created_unix_s=1,
        model=model,
        requests=(Request(request_id="r", model=model, num_choices=num_choices),),
        stream=True,
        include_usage=False,
    )


@settings(deadline=None, max_examples=50)
@given(text=st.text(), model=st.text(), index=st.integers(0, 2))
def test_templates_make_what_encoding_the_whole_chunk_makes(
    text: str, model: str, index: int
) -> None:
    """For any text and model name, the quick way gives the bytes of the slow way."""
    plan = make_plan()
    call = call_for(model, 3)
    for writer in (ChatChunks(call, plan), CompletionChunks(call, plan)):
        quick = writer.text(index, text)
        assert quick == writer.text_with_logprobs(index, text, ())
        data: Any = msgspec.json.decode(quick.removeprefix(b"data: ").removesuffix(b"\n\n"))
        choice = data["choices"][0]
        assert (choice.get("text") or choice.get("delta", {}).get("content", "")) == text
        assert choice["index"] == index
        assert data["model"] == model
        assert b"\n" not in quick.removesuffix(b"\n\n")
