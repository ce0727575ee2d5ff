"""The official `openai` client against a real `brim serve` on the demo model, unchanged."""

import asyncio
from collections.abc import Iterator

import openai
import pytest
from conftest import require_engine
from openai.types.chat import ChatCompletionMessageParam
from support.server_process import EXACT, ServerProcess

QUESTION: list[ChatCompletionMessageParam] = [
    {"role": "user", "content": "Return the sum of the items of a list."}
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    require_engine("llamacpp")
    with ServerProcess(tmp_path_factory.mktemp("server"), "-m", "demo", settings=EXACT) as server:
        yield server


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_chat_completion_has_openais_shape(client: openai.OpenAI) -> None:
    """Text, finish reason and usage are where the client expects them, and brim's own beside."""
    answer = client.chat.completions.create(
        model="demo", messages=QUESTION, max_tokens=12, temperature=0, seed=1
    )
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12
    assert answer.model_extra is not None
    assert answer.model_extra["brim"]["engine"] == "llamacpp"


def test_a_stream_joins_to_the_whole_answer(client: openai.OpenAI) -> None:
    """The chunks' text is the text of the same request without streaming; usage comes last.

    The second of the two prompts was read already, which the usage says and the text does not.
    """
    options = {"model": "demo", "messages": QUESTION, "max_tokens": 40, "temperature": 0}
    whole = client.chat.completions.create(**options)  # type: ignore[call-overload]
    chunks = list(
        client.chat.completions.create(
            **options,  # type: ignore[call-overload]
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    endings = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert [e for e in endings if e] == [whole.choices[0].finish_reason]
    assert chunks[-1].choices == []
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    usage = chunks[-1].usage
    assert [getattr(usage, name) for name in counts] == [
        getattr(whole.usage, name) for name in counts
    ]
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1


def test_the_async_client_streams_several_answers_at_once(server: ServerProcess) -> None:
    """Eight concurrent async streams give what each gives alone."""

    async def one(client: openai.AsyncOpenAI, number: int) -> str:
        stream = await client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": f"Return the number {number}."}],
            max_tokens=24,
            temperature=0,
            stream=True,
        )
        return "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])

    async def run() -> tuple[list[str], list[str]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            together = await asyncio.gather(*(one(client, number) for number in range(8)))
            return together, [await one(client, number) for number in range(8)]

    together, alone = asyncio.run(run())
    assert all(together)
    assert together == alone


def test_logprobs_of_a_chat(client: openai.OpenAI) -> None:
    """Every token has a logprob and its alternatives, and the bytes join to the text."""
    answer = client.chat.completions.create(
        model="demo",
        messages=QUESTION,
        max_tokens=10,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 10
    joined = b"".join(bytes(entry.bytes or []) for entry in logprobs.content)
    assert joined.decode() == answer.choices[0].message.content
    for entry in logprobs.content:
        assert entry.logprob <= 0
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob, abs=1e-4)


def test_logprobs_of_a_completion(client: openai.OpenAI) -> None:
    """The older shape: parallel lists of tokens, logprobs, alternatives and offsets."""
    answer = client.completions.create(
        model="demo", prompt="def mean(values):", max_tokens=6, temperature=0, logprobs=2
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or []) == answer.choices[0].text
    assert len(logprobs.token_logprobs or []) == 6
    assert all(len(top) == 2 for top in logprobs.top_logprobs or [{}])


def test_two_choices_are_two_answers(client: openai.OpenAI) -> None:
    """n=2 gives two choices that differ, with one prompt counted, streaming and not."""
    options = {"model": "demo", "messages": QUESTION, "max_tokens": 24, "seed": 3, "n": 2}
    answer = client.chat.completions.create(**options)  # type: ignore[call-overload]
    texts = [choice.message.content for choice in answer.choices]
    assert len(set(texts)) == 2
    streamed = ["", ""]
    for chunk in client.chat.completions.create(**options, stream=True):  # type: ignore[call-overload]
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_before_itself(client: openai.OpenAI, stream: bool) -> None:
    """The answer is the unstopped answer up to the stop string, which is not in it."""
    options = {"model": "demo", "prompt": "def f(x):\n", "max_tokens": 40, "temperature": 0}
    whole = client.completions.create(**options).choices[0].text  # type: ignore[call-overload]
    stop = whole[8:11]
    if stream:
        chunks = list(client.completions.create(**options, stop=[stop], stream=True))  # type: ignore[call-overload]
        text = "".join(chunk.choices[0].text for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        answer = client.completions.create(**options, stop=[stop])  # type: ignore[call-overload]
        text, reason = answer.choices[0].text, answer.choices[0].finish_reason
    assert text == whole[: whole.index(stop)]
    assert reason == "stop"


def test_a_logit_bias_is_honoured(client: openai.OpenAI) -> None:
    """A bias of 100 makes one token certain."""
    answer = client.completions.create(
        model="demo", prompt="x", max_tokens=3, logit_bias={"42": 100}, temperature=1
    )
    assert len(set(answer.choices[0].text)) == 1


def test_models_are_listed(client: openai.OpenAI) -> None:
    """The client's list of models holds the served one, and it can be fetched by name."""
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"


def test_errors_are_the_clients_exceptions(client: openai.OpenAI) -> None:
    """Wrong requests raise the client's own exception classes, with the field named."""
    with pytest.raises(openai.NotFoundError, match="demo"):
        client.completions.create(model="gpt-4o", prompt="x")
    with pytest.raises(openai.BadRequestError, match="8192"):
        client.completions.create(model="demo", prompt="x " * 9000)
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="demo", prompt="x", extra_body={"max_token": 3})
    assert caught.value.param == "max_token"
    assert "max_tokens" in caught.value.message


def test_a_client_that_leaves_frees_its_place(client: openai.OpenAI, server: ServerProcess) -> None:
    """Closing a stream cancels the sequence: nothing runs a moment later."""
    stream = client.completions.create(
        model="demo", prompt="x", max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    assert server.ps()[0]["num_running"] == 1
    stream.close()
    server.wait_until(lambda: server.ps()[0]["num_running"] == 0)
