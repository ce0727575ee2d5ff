"""One model on both engines in one server: the official client, equal answers, deaths, endings.

`pystd` is the 1 M model's safetensors on MLX, `gguf` the same weights as F16 on llama.cpp.
"""

import asyncio
import http.client
import json
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from conftest import require_engine
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletionMessageParam
from support.models import PYSTD_1M, pystd_1m_gguf
from support.server_process import ServerProcess

BOTH = ("pystd", "gguf")
ENGINE_OF = {"pystd": "mlx", "gguf": "llamacpp"}
# Half-precision logits of two engines differ by up to 0.02, so that a gap below 0.04 is a tie which
# may go either way; along the answers to these the smallest gap is 0.047.
QUESTIONS = ("Return the sum of the items of a list.", "Add two.", "naïve 日本語 😀")
PROMPTS = ("def mean(values):\n", "for i in range(", "class Node:\n    def")

needs_maps = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    require_engine("mlx")
    require_engine("llamacpp")
    models = ("-m", f"pystd={PYSTD_1M}", "-m", f"gguf={pystd_1m_gguf('F16')}")
    # A slow machine may take longer for the tests of one model than another is kept idle.
    settings = {"governor.idle_unload_s": 0}
    with ServerProcess(tmp_path_factory.mktemp("server"), *models, settings=settings) as server:
        yield server


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(question: str) -> list[ChatCompletionMessageParam]:
    return [{"role": "user", "content": question}]


def counts(usage: CompletionUsage | None) -> tuple[int, int, int]:
    """Without the part of a prompt that was read already: that depends on what came before."""
    assert usage is not None
    return usage.prompt_tokens, usage.completion_tokens, usage.total_tokens


def status_of(server: ServerProcess, model: str) -> dict[str, Any]:
    (status,) = [each for each in server.ps() if each["name"] == model]
    return status


class TestBothEnginesAnswerAlike:
    @pytest.mark.parametrize("question", QUESTIONS)
    def test_chats(self, client: openai.OpenAI, question: str) -> None:
        """Text, finish reason and usage of a greedy chat are the same, and the engine is named."""
        mine, theirs = (
            client.chat.completions.create(
                model=model, messages=chat(question), max_tokens=24, temperature=0
            )
            for model in BOTH
        )
        assert mine.choices[0].message.content
        assert mine.choices == theirs.choices
        assert counts(mine.usage) == counts(theirs.usage)
        assert mine.model_extra is not None
        assert mine.model_extra["brim"]["engine"] == "mlx"

    @pytest.mark.parametrize("prompt", PROMPTS)
    @pytest.mark.parametrize("stop", [None, "\n", "self."])
    def test_completions_with_stop_strings(
        self, client: openai.OpenAI, prompt: str, stop: str | None
    ) -> None:
        """A stop string ends both answers in one place, streamed or not."""
        options: dict[str, Any] = {"prompt": prompt, "max_tokens": 32, "temperature": 0}
        options |= {} if stop is None else {"stop": [stop]}
        mine, theirs = (client.completions.create(model=model, **options) for model in BOTH)
        assert mine.choices == theirs.choices
        assert counts(mine.usage) == counts(theirs.usage)
        assert stop is None or stop not in mine.choices[0].text
        chunks = list(client.completions.create(model="pystd", stream=True, **options))
        assert "".join(chunk.choices[0].text for chunk in chunks) == mine.choices[0].text
        assert chunks[-1].choices[0].finish_reason == mine.choices[0].finish_reason

    def test_logprobs(self, client: openai.OpenAI) -> None:
        """Tokens and bytes are the same, logprobs equal to what F16 weights allow."""
        mine, theirs = (
            client.chat.completions.create(
                model=model, messages=chat(QUESTIONS[0]), max_tokens=10, temperature=0,
                logprobs=True, top_logprobs=3,
            ).choices[0].logprobs
            for model in BOTH
        )  # fmt: skip
        assert mine is not None and mine.content is not None
        assert theirs is not None and theirs.content is not None
        for one, other in zip(mine.content, theirs.content, strict=True):
            assert (one.token, one.bytes) == (other.token, other.bytes)
            assert one.logprob == pytest.approx(other.logprob, abs=0.05)
            assert one.top_logprobs[0].token == one.token
            assert [top.logprob for top in one.top_logprobs] == pytest.approx(
                [top.logprob for top in other.top_logprobs], abs=0.05
            )


class TestOpenaiClientOnMlx:
    def test_a_stream_joins_to_the_whole_answer(self, client: openai.OpenAI) -> None:
        """The chunks' text is the text of the same request without streaming; usage comes last."""
        options: dict[str, Any] = {
            "model": "pystd", "messages": chat(QUESTIONS[0]), "max_tokens": 40, "temperature": 0,
        }  # fmt: skip
        whole = client.chat.completions.create(**options)
        chunks = list(
            client.chat.completions.create(
                **options, stream=True, stream_options={"include_usage": True}
            )
        )
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == whole.choices[0].message.content
        assert counts(chunks[-1].usage) == counts(whole.usage)

    def test_async_streams_together_are_what_each_is_alone(self, server: ServerProcess) -> None:
        """Eight concurrent async streams give what each gives alone."""

        async def one(client: openai.AsyncOpenAI, number: int) -> str:
            stream = await client.chat.completions.create(
                model="pystd",
                messages=chat(f"Return the number {number}." * (1 + number % 3)),
                max_tokens=16,
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

    def test_two_choices_are_two_answers(self, client: openai.OpenAI) -> None:
        """n=2 gives two choices that differ, the same for a seed, with one prompt counted."""
        options: dict[str, Any] = {
            "model": "pystd", "messages": chat(QUESTIONS[0]), "max_tokens": 24, "seed": 3, "n": 2,
        }  # fmt: skip
        first, second = (client.chat.completions.create(**options) for _ in range(2))
        texts = [choice.message.content for choice in first.choices]
        assert len(set(texts)) == 2
        assert texts == [choice.message.content for choice in second.choices]
        assert first.usage is not None
        single = client.chat.completions.create(**options | {"n": 1})
        assert single.usage is not None
        assert first.usage.prompt_tokens == single.usage.prompt_tokens


class TestProcesses:
    @needs_maps
    def test_only_the_worker_of_an_mlx_model_has_mlx(self, server: ServerProcess) -> None:
        """MLX's library is mapped by its own worker, llama.cpp's by its own, neither elsewhere."""
        found = {
            "gateway": libraries_of(server.process.pid),
            **{each["name"]: libraries_of(each["pid"]) for each in server.ps()},
        }
        assert found == {"gateway": set(), "pystd": {"mlx"}, "gguf": {"llama"}}

    def test_the_status_says_which_engine_and_why(self, server: ServerProcess) -> None:
        """`brim ps` names each model's engine with the reason for it."""
        lines = server.brim("ps").stdout.splitlines()
        assert (
            "pystd runs on mlx: the model is in safetensors form, which this engine loads" in lines
        )
        assert "gguf runs on llamacpp: the model is in GGUF form, which this engine loads" in lines


def libraries_of(pid: int) -> set[str]:
    """Which engines' libraries a process has in its address space."""
    maps = Path(f"/proc/{pid}/maps").read_text()
    return {name for name in ("mlx", "llama") if re.search(rf"/lib{name}\.(so|dylib)", maps)}


class StreamingClient(threading.Thread):
    """Reads one long streamed completion to its end and keeps every event."""

    def __init__(self, port: int, number: int, max_tokens: int = 1500) -> None:
        super().__init__()
        self.events: list[Any] = []
        self.has_text = threading.Event()
        self._port = port
        self._body = json.dumps(
            {
                "model": "pystd", "prompt": f"def f{number}(x):", "max_tokens": max_tokens,
                "ignore_eos": True, "stream": True,
            }
        )  # fmt: skip

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        connection.request("POST", "/v1/completions", self._body)
        for line in connection.getresponse():
            if line.startswith(b"data: ") and b"[DONE]" not in line:
                self.events.append(json.loads(line[6:]))
                self.has_text.set()
        connection.close()


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[ServerProcess]:
    """A server that a test may end."""
    require_engine("mlx")
    with ServerProcess(tmp_path, "-m", f"pystd={PYSTD_1M}") as server:
        yield server


def test_a_worker_killed_mid_stream_is_told_and_replaced(own_server: ServerProcess) -> None:
    """Three streams end with one error event each, and the restarted model answers again."""
    clients = [StreamingClient(own_server.port, number) for number in range(3)]
    for client in clients:
        client.start()
    for client in clients:
        assert client.has_text.wait(60)
    first_pid = status_of(own_server, "pystd")["pid"]
    os.kill(first_pid, signal.SIGKILL)
    for client in clients:
        client.join(60)
        assert not client.is_alive()
        assert sum("error" in event for event in client.events) == 1
        assert "SIGKILL" in client.events[-1]["error"]["message"]
    body = {"model": "pystd", "prompt": "def f(x):", "max_tokens": 4}
    status, answer = own_server.ask("POST", "/v1/completions", body)
    assert status == 200, answer
    after = status_of(own_server, "pystd")
    assert (after["num_deaths"], after["state"]) == (1, "ready")
    assert after["pid"] != first_pid


def test_a_signal_drains_and_leaves_no_process(own_server: ServerProcess) -> None:
    """`brim stop` lets the running answer finish, and then the worker is gone with its memory."""
    worker = psutil.Process(status_of(own_server, "pystd")["pid"])
    client = StreamingClient(own_server.port, 0, max_tokens=600)
    client.start()
    assert client.has_text.wait(60)
    stopped = own_server.brim("stop")
    assert stopped.returncode == 0, stopped.stderr
    client.join(60)
    assert client.events[-1]["choices"][0]["finish_reason"] == "length"
    assert own_server.end() == 0
    assert not worker.is_running()


def test_run_answers_from_a_directory(tmp_path: Path) -> None:
    """`brim run -m DIR` answers on MLX, and on llama.cpp says how the model gets there."""
    require_engine("mlx")
    server = ServerProcess(tmp_path, "-m", "toy")  # for its private directories alone
    try:
        arguments = ("run", "-m", str(PYSTD_1M), "--temp", "0", "-n", "8", "Add two.")
        answered = server.brim(*arguments)
        refused = server.brim(*arguments, "--engine", "llamacpp")
    finally:
        server.kill()
    assert answered.returncode == 0, answered.stderr
    assert len(answered.stdout) > 3
    assert "pystd-1m (mlx): " in answered.stderr
    assert refused.returncode == 1
    assert f"brim convert {shlex.quote(str(PYSTD_1M))} pystd-1m.gguf" in refused.stderr
    assert refused.stderr.count("\n") == 1
