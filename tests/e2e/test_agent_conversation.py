"""An agent's conversation through HTTP: calls and results sent back, and a billing line that turns.

Its system prompt begins with a line that is new with every request, as Claude Code sends it.
"""

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import require_engine
from support.models import pystd_1m_gguf
from support.server_process import EXACT, ServerProcess

RULES = "You edit Python files. " * 40


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    require_engine("llamacpp")
    directory: Path = tmp_path_factory.mktemp("agent")
    arguments = ("-m", f"m={pystd_1m_gguf()}", "--ctx", "2048")
    with ServerProcess(directory, *arguments, settings=EXACT | {"cache.enabled": False}) as process:
        yield process


def ask(server: ServerProcess, messages: list[dict[str, Any]], **brim: Any) -> dict[str, Any]:
    body = {
        "model": "m", "messages": messages, "max_tokens": 8, "temperature": 0, "ignore_eos": True,
        "brim": brim,
    }  # fmt: skip
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        response = connection.getresponse()
        answer: dict[str, Any] = json.loads(response.read())
        assert response.status == 200, answer
        return answer
    finally:
        connection.close()


def talk(number: int, subject: str) -> list[dict[str, Any]]:
    """The messages of an agent's request after so many calls."""
    header = f"x-anthropic-billing-header: cc_version=2.1.177.01c; cch={number:05x};\n"
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": header + RULES},
        {"role": "user", "content": f"Fix the {subject}."},
    ]
    for step in range(number):
        function = {"name": "read", "arguments": f'{{"line": {step}.50}}'}
        call = {"id": f"c{step}", "type": "function", "function": function}
        messages += [
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": f"c{step}", "content": "return total / count"},
        ]
    return messages


def test_each_request_of_an_agent_reuses_all_of_the_last_one(server: ServerProcess) -> None:
    """From the second on, nothing but the newest exchange is computed."""
    answers = [ask(server, talk(number, "mean")) for number in range(4)]
    lengths = [answer["usage"]["prompt_tokens"] for answer in answers]
    cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
    assert lengths[0] > 200
    for before, reused in zip(lengths, cached[1:], strict=False):
        # All but the few tokens that open the model's turn, which here is not what it said.
        assert before - 8 <= reused <= before
    assert [line["kind"] for line in answers[3]["brim"]["moved_lines"]] == ["claude-code billing"]


def test_reuse_does_not_change_what_an_agent_reads(server: ServerProcess) -> None:
    """The answer to a conversation with calls is the same with what is held and without."""
    ask(server, talk(1, "sum"))
    with_cache = ask(server, talk(2, "sum"))
    without = ask(server, talk(2, "sum"), cache={"use": False})
    assert with_cache["usage"]["prompt_tokens_details"]["cached_tokens"] > 200
    assert without["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert with_cache["choices"][0]["message"] == without["choices"][0]["message"]


def test_a_line_that_stays_makes_each_request_a_new_prompt(server: ServerProcess) -> None:
    """With the opt-out the prompt diverges in its first turn, and the answer says so."""
    ask(server, talk(1, "max"), keep_volatile_lines=True)
    answer = ask(server, talk(2, "max"), keep_volatile_lines=True)
    assert answer["brim"]["moved_lines"] == []
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] < 100
    assert answer["brim"]["cache"]["reason"].startswith("diverges at token ")
    assert answer["brim"]["cache"]["reason"].endswith(" of turn 1")
