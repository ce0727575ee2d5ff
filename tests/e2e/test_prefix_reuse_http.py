"""Prompts that begin alike, through HTTP: what is reused, whose it is, and what the answer says."""

import http.client
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from conftest import require_engine
from support.models import pystd_1m_gguf
from support.server_process import EXACT, ServerProcess

WORDS = ("def", "return", "value", "for", "item", "in", "self", "if", "not", "import", "class")

SETTINGS = EXACT | {"cache.free_disk_floor_bytes": 0}
"""The disk that tests run on may have less left than people keep free."""


class Said(NamedTuple):
    """One whole answer."""

    text: str
    cached_tokens: int
    cache: dict[str, Any]
    headers: dict[str, str]


def prompt(number: int, num_words: int = 300) -> str:
    """Some text that shares its first half with every other number."""
    common, own = random.Random(0), random.Random(f"own {number}")
    words = [common.choice(WORDS) for _ in range(num_words // 2)]
    return " ".join(words + [own.choice(WORDS) for _ in range(num_words // 2)])


def ask(
    server: ServerProcess, text: str, key: str = "", cache: dict[str, Any] | None = None
) -> Said:
    """A greedy answer, and what it says of the cache."""
    body = {
        "model": "m", "prompt": text, "max_tokens": 12, "temperature": 0, "ignore_eos": True,
        "brim": {"cache": cache or {}},
    }  # fmt: skip
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        response = connection.getresponse()
        answer = json.loads(response.read())
        assert response.status == 200, answer
        return Said(
            answer["choices"][0]["text"],
            answer["usage"]["prompt_tokens_details"]["cached_tokens"],
            answer["brim"]["cache"],
            {name.lower(): value for name, value in response.getheaders()},
        )
    finally:
        connection.close()


def serve(directory: Path, *arguments: str, cache: Path | None = None) -> ServerProcess:
    require_engine("llamacpp")
    settings = SETTINGS if cache is None else SETTINGS | {"cache.directory": cache}
    words = ("-m", f"m={pystd_1m_gguf()}", "--ctx", "2048", *arguments)
    return ServerProcess(directory, *words, settings=settings)


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with serve(tmp_path_factory.mktemp("server"), "--no-cache") as server:
        yield server


def test_a_prompt_that_comes_again_is_not_read_again(server: ServerProcess) -> None:
    """All of it but the token that must be fed is reused, the text is the same, and all is said."""
    first, second = (ask(server, prompt(1)) for _ in range(2))
    assert first.text == second.text
    assert (first.cached_tokens, first.cache["source"]) == (0, "none")
    assert first.cache["reason"] == first.headers["x-brim-cache-reason"] == "no entry"
    assert first.headers["x-brim-cache"] == "miss"
    assert second.cached_tokens > 250
    assert second.cache == {
        "source": "memory", "cached_tokens": second.cached_tokens, "reason": "", "restore_s": 0.0,
    }  # fmt: skip
    assert second.headers["x-brim-cache"] == "hit"
    assert second.headers["x-brim-cached-tokens"] == str(second.cached_tokens)
    assert "x-brim-cache-reason" not in second.headers


def test_a_prompt_that_goes_another_way_reuses_what_is_common(server: ServerProcess) -> None:
    """The other half is read, and the reason says from which token on."""
    alone = ask(server, prompt(2), cache={"use": False})
    assert alone.cache["reason"] == "turned off"
    ask(server, prompt(1))
    beside = ask(server, prompt(2))
    assert beside.text == alone.text
    assert beside.headers["x-brim-cache"] == "partial"
    assert beside.cache["reason"] == f"diverges at token {beside.cached_tokens + 1}"


def test_keys_are_parted_unless_a_request_shares(server: ServerProcess) -> None:
    """Nobody learns what another key has sent; what is shared on purpose all may find."""
    ask(server, prompt(3), key="one")
    for stranger in (
        ask(server, prompt(3), key="two"),
        ask(server, prompt(3)),
        ask(server, prompt(3), key="one", cache={"namespace": "mail"}),
        ask(server, prompt(3), key="one", cache={"share": True}),
    ):
        assert stranger.cached_tokens == 0, stranger.cache
        assert stranger.cache["reason"] == "no entry"
    assert ask(server, prompt(3), key="one").cached_tokens > 250
    assert ask(server, prompt(3), key="two", cache={"share": True}).cached_tokens > 250


def test_what_was_reused_is_counted(server: ServerProcess) -> None:
    """`/metrics` and `brim ps` add up what the answers said."""
    said = [ask(server, prompt(4)) for _ in range(3)]
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("GET", "/metrics")
    page = connection.getresponse().read().decode()
    connection.close()
    reused = sum(each.cached_tokens for each in said)
    assert f'brim_cached_tokens_total{{model="m",source="memory"}} {reused}\n' in page
    assert 'brim_requests_total{model="m",outcome="length"} 3\n' in page
    assert 'brim_cache_misses_total{model="m",reason="no entry"} 1\n' in page
    head, row = server.brim("ps").stdout.splitlines()[:2]
    assert "cached" in head
    counts = server.ps()[0]["requests"]
    assert counts["cached_tokens"] == {"memory": reused}
    assert f"{100 * reused / counts['num_prompt_tokens']:.0f} %" in row


def killed_with_its_workers(server: ServerProcess) -> None:
    """`kill -9` of everything, and no process left that could still write."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    for process in (psutil.Process(server.process.pid), *children):
        os.kill(process.pid, 9)
    server.kill()
    psutil.wait_procs(children, timeout=30)


def test_a_prompt_survives_the_death_of_everything(tmp_path: Path) -> None:
    """After `kill -9` and a new start it comes from the disk, and the answer is the same."""
    with serve(tmp_path) as server:
        first = ask(server, prompt(5))

        def is_written() -> bool:
            stats = server.ps()[0]["worker_stats"]
            return bool(stats and stats["prefix"]["store"]["num_written"])

        server.wait_until(is_written)
        killed_with_its_workers(server)
    with serve(tmp_path) as server:
        second = ask(server, prompt(5))
        stranger = ask(server, prompt(5), key="other")
        mail = ask(server, prompt(5), cache={"namespace": "mail"})
    assert second.text == first.text == stranger.text
    assert second.cache["source"] == "disk"
    assert second.cached_tokens > 250
    assert second.cache["restore_s"] > 0
    assert (stranger.cached_tokens, stranger.cache["reason"]) == (0, "no entry")
    assert (mail.cached_tokens, mail.cache["reason"]) == (0, "not shareable")
    files = [path for path in (tmp_path / "brim" / "prefixes").rglob("*") if path.is_file()]
    assert files
    assert all(path.stat().st_mode & 0o077 == 0 for path in files)


def test_a_directory_that_cannot_be_used_costs_a_warning_alone(tmp_path: Path) -> None:
    """Requests are answered, and whoever reads the server's stderr is told what to change."""
    file = tmp_path / "file"
    file.touch()
    with serve(tmp_path, cache=file) as server:
        answers = [ask(server, prompt(6)) for _ in range(2)]
        server.process.terminate()
        assert server.end() == 0
    assert answers[0].text == answers[1].text
    assert answers[1].cache["source"] == "memory"
    [warning] = [line for line in server.stderr.splitlines() if "prefix_not_kept" in line]
    assert "name another one in cache.directory" in warning
