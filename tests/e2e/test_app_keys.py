"""Apps and their keys at a real server, through the clients that people use."""

import http.client
import json
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from support.server_process import ServerProcess
from support.serving import ENDLESS
from support.within_a_day import within_a_day

from brim.apps.registry import FILE_NAME, Registry
from brim.core.app import App, Budgets, Limits

BUDGET_TOKENS = 60
SEEN_WITHIN_S = 60.0
"""For a server to see what another process did to its apps; it looks twice a second."""


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    registry = Registry(tmp_path / FILE_NAME)
    yield registry
    registry.close()


@pytest.fixture
def server(tmp_path: Path, registry: Registry) -> Iterator[ServerProcess]:
    """Two toys under two names, with the registry's apps."""
    with ServerProcess(
        tmp_path,
        "-m",
        "small=toy",
        "-m",
        "other=toy",
        "--ctx",
        "256",
        settings={"server.state_directory": tmp_path},
    ) as server:
        yield server


def client_of(server: ServerProcess, key: str, max_retries: int = 0) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=max_retries)


def complete(client: openai.OpenAI, model: str = "small", max_tokens: int = 8) -> int:
    """Tokens that an answer took, prompt included."""
    answer = client.completions.create(
        model=model, prompt="abcd", max_tokens=max_tokens, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    return answer.usage.total_tokens


def test_an_app_sees_and_uses_its_own_models_alone(
    server: ServerProcess, registry: Registry
) -> None:
    """A model that was not granted is not listed and is 404, an unknown key 401."""
    key = registry.add(App(name="mail", models=("small",)), "")
    until_known(server, key)
    with client_of(server, key) as client:
        assert [model.id for model in client.models.list()] == ["small"]
        assert complete(client) == 13
        with pytest.raises(openai.NotFoundError):
            complete(client, "other")
    with client_of(server, "none") as stranger:
        assert [model.id for model in stranger.models.list()] == ["small", "other"]
    with client_of(server, "brim-" + "x" * 43) as liar, pytest.raises(openai.AuthenticationError):
        liar.models.list()


def until_known(server: ServerProcess, key: str, *, is_known: bool = True) -> None:
    """Wait until the server has seen what was done to the key."""
    deadline_s = time.monotonic() + SEEN_WITHIN_S
    with client_of(server, key) as client:
        while True:
            try:
                client.models.list()
                found = True
            except openai.AuthenticationError:
                found = False
            if found is is_known:
                return
            assert time.monotonic() < deadline_s
            time.sleep(0.05)


def test_a_removed_app_is_out_at_once(server: ServerProcess, registry: Registry) -> None:
    """A key that another process takes away is 401 within a second or so, a rotated one too."""
    first = registry.add(App(name="mail"), "")
    until_known(server, first)
    second = registry.rotate("mail")
    until_known(server, second)
    until_known(server, first, is_known=False)
    registry.remove("mail")
    until_known(server, second, is_known=False)


@within_a_day
def test_an_app_stops_at_its_budget_and_is_told_so_in_openais_words(
    server: ServerProcess, registry: Registry
) -> None:
    """RateLimitError with insufficient_quota, which the client does not try again by itself.

    Until then answers are cut to what is left, usage says how much that is, and nobody else is
    stopped.
    """
    key = registry.add(App(name="mail", budgets=Budgets(tokens=BUDGET_TOKENS)), "")
    until_known(server, key)
    with client_of(server, key, max_retries=3) as client:
        num_used = 0
        with pytest.raises(openai.RateLimitError) as caught:
            while num_used <= BUDGET_TOKENS:
                num_used += complete(client, max_tokens=20)
        assert BUDGET_TOKENS - 5 <= num_used <= BUDGET_TOKENS
        assert caught.value.code == "insufficient_quota"
        assert caught.value.type == "insufficient_quota"
        assert 0 < int(caught.value.response.headers["retry-after"]) <= 86_400
        assert "00:00 UTC" in caught.value.message
    figures = usage_of(server, key)
    assert figures["tokens"] == {
        "used": num_used,
        "reserved": 0,
        "budget": BUDGET_TOKENS,
        "left": BUDGET_TOKENS - num_used,
    }
    with client_of(server, "none") as stranger:
        assert complete(stranger) == 13


def usage_of(server: ServerProcess, key: str) -> dict[str, object]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("GET", "/brim/v1/usage", headers={"Authorization": f"Bearer {key}"})
    found: dict[str, object] = json.loads(connection.getresponse().read())
    connection.close()
    return found


def test_more_at_once_than_the_limit_is_tried_again_by_the_client(
    server: ServerProcess, registry: Registry
) -> None:
    """The second of two at once gets rate_limit_exceeded and when to come again."""
    key = registry.add(App(name="mail", limits=Limits(max_concurrent=1)), "")
    until_known(server, key)
    with client_of(server, key) as client:
        stream = client.completions.create(
            model="small",
            prompt="abcd",
            max_tokens=ENDLESS,
            stream=True,
            extra_body={"ignore_eos": True, "brim": {"overflow": "shift"}},
        )
        next(iter(stream))
        try:
            with pytest.raises(openai.RateLimitError) as caught:
                complete(client)
            assert caught.value.code == "rate_limit_exceeded"
            assert float(caught.value.response.headers["retry-after"]) >= 1
        finally:
            stream.close()


def test_anthropics_header_is_a_key_as_well(server: ServerProcess, registry: Registry) -> None:
    """X-Api-Key names the app, and wins over an Authorization that is not brim's."""
    key = registry.add(App(name="mail", models=("small",)), "")
    until_known(server, key)
    with client_of(server, "sk-none") as client:
        reply = client.with_options(default_headers={"X-Api-Key": key}).models.list()
    assert [model.id for model in reply] == ["small"]
