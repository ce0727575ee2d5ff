"""Apps against a real server: keys that come and go while it runs, and budgets over its deaths."""

import http.client
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.server_process import ServerProcess
from support.serving import ENDLESS
from support.within_a_day import within_a_day

from brim.apps.usage import read_reserved

PROMPT = "one two three four five six seven eight"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path, "-m", "toy") as server:
        yield server


def add(server: ServerProcess, directory: Path, text: str, *words: str) -> str:
    """Adds or changes an app; its key where it is new."""
    path = directory / "manifest.toml"
    path.write_text(text)
    added = server.brim("apps", "add", str(path), "--json", *words)
    assert added.returncode == 0, added.stderr
    key = json.loads(added.stdout)["key"]
    return "" if key is None else str(key)


def open_request(
    server: ServerProcess, key: str, max_tokens: int, *, prompt: str = PROMPT, stream: bool = False
) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    body = {
        "model": "toy", "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True,
        "stream": stream, "brim": {"overflow": "shift"},
    }  # fmt: skip
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    return connection, connection.getresponse()


def complete(
    server: ServerProcess, key: str, max_tokens: int, prompt: str = PROMPT
) -> tuple[int, Any, str | None]:
    """Status, body and Retry-After of one completion."""
    connection, response = open_request(server, key, max_tokens, prompt=prompt)
    try:
        return response.status, json.loads(response.read()), response.getheader("Retry-After")
    finally:
        connection.close()


def used_tokens(server: ServerProcess, name: str) -> int:
    """What the command line says that an app has used today."""
    shown = server.brim("apps", "usage", name, "--json")
    assert shown.returncode == 0, shown.stderr
    return int(json.loads(shown.stdout)["today"][0]["used_tokens"])


def wait_for_status(server: ServerProcess, key: str, status: int) -> None:
    """Until the server has seen what a command changed; a second at most, and the test's limit."""
    server.wait_until(lambda: complete(server, key, 1)[0] == status)


@within_a_day
def test_an_app_is_stopped_at_its_last_token_over_restarts(
    server: ServerProcess, tmp_path: Path
) -> None:
    """Answers add up to the budget to the token; then 429, also after a restart and a kill."""
    key = add(server, tmp_path, 'name = "mail"\n[budgets]\ntokens_per_day = 200\n')
    wait_for_status(server, key, 200)
    total = used_tokens_soon(server, "mail")
    status, body, retry_after = complete(server, key, 30)
    while status == 200:
        total += body["usage"]["total_tokens"]
        last_tokens = body["usage"]["total_tokens"]
        status, body, retry_after = complete(server, key, 30)
    assert (status, body["error"]["type"]) == (429, "insufficient_quota")
    assert "of its 200 tokens of today" in body["error"]["message"]
    assert 0 < int(retry_after or 0) <= 86_400
    assert 200 - last_tokens < total <= 200
    # What is too little for that prompt is enough for a shorter one, and for no token more.
    if total < 200:
        status, body, _ = complete(server, key, 1000, prompt="a")
        assert status == 200, body
        assert body["choices"][0]["finish_reason"] == "length"
        total += body["usage"]["total_tokens"]
    assert total == 200
    assert complete(server, key, 1, prompt="a")[0] == 429
    server.wait_until(lambda: used_tokens(server, "mail") == 200)
    server.kill()
    with ServerProcess(tmp_path, "-m", "toy") as again:
        assert complete(again, key, 30)[0] == 429
        assert used_tokens(again, "mail") == 200
        larger = 'name = "mail"\n[budgets]\ntokens_per_day = 300\n'
        assert add(again, tmp_path, larger, "--replace") == ""
        wait_for_status(again, key, 200)
        assert complete(again, key, 1000)[1]["usage"]["total_tokens"] < 100


def used_tokens_soon(server: ServerProcess, name: str) -> int:
    """What an app has used, once the file has it."""
    server.wait_until(lambda: used_tokens(server, name) > 0)
    return used_tokens(server, name)


@within_a_day
def test_an_answer_that_a_kill_cut_counts_with_its_bound(
    server: ServerProcess, tmp_path: Path
) -> None:
    """The next server knows of it: a budget is not had twice by killing the first."""
    key = add(server, tmp_path, 'name = "mail"\n[budgets]\ntokens_per_day = 51000\n')
    wait_for_status(server, key, 200)
    before = used_tokens_soon(server, "mail")
    connection, response = open_request(server, key, ENDLESS, stream=True)
    assert response.status == 200
    server.wait_until(lambda: bool(read_reserved(tmp_path / "brim" / "usage.sqlite")))
    server.kill()
    connection.close()
    with ServerProcess(tmp_path, "-m", "toy") as again:
        status, body, _ = complete(again, key, 1)
        assert status == 200, body
        prompt_tokens = body["usage"]["prompt_tokens"]
        assert used_tokens(again, "mail") >= before + prompt_tokens + ENDLESS
        status, body, _ = complete(again, key, 4000)
        assert status == 200, body
        assert body["usage"]["completion_tokens"] < 1000
        assert complete(again, key, 1)[0] == 429


def test_keys_come_and_go_while_the_server_runs(server: ServerProcess, tmp_path: Path) -> None:
    """Added, rotated and removed keys count within a second, without a restart."""
    assert complete(server, "brim-" + "x" * 43, 1)[0] == 401
    old = add(server, tmp_path, 'name = "mail"\n')
    wait_for_status(server, old, 200)
    new = json.loads(server.brim("apps", "rotate", "mail", "--json").stdout)["key"]
    wait_for_status(server, new, 200)
    assert complete(server, old, 1)[0] == 401
    assert server.brim("apps", "remove", "mail").returncode == 0
    wait_for_status(server, new, 401)


def test_models_that_were_not_granted_are_refused(server: ServerProcess, tmp_path: Path) -> None:
    """Whatever the reason in words, it is not served."""
    key = add(server, tmp_path, 'name = "mail"\nmodels = ["other"]\n')
    server.wait_until(lambda: complete(server, key, 1)[0] != 401)
    assert complete(server, key, 1)[0] in {403, 404}


def test_a_kv_cache_below_the_apps_quality_is_refused(
    server: ServerProcess, tmp_path: Path
) -> None:
    """The app is told which type the model has, and the manifest that asks for less is served."""
    key = add(server, tmp_path, 'name = "mail"\nkv_quality = "f32"\n')
    wait_for_status(server, key, 400)
    message = complete(server, key, 1)[1]["error"]["message"]
    assert "accepts a KV cache of f32 or better, and 'toy' keeps its as f16" in message
    add(server, tmp_path, 'name = "mail"\nkv_quality = "f16"\n', "--replace")
    wait_for_status(server, key, 200)


def test_limits_hold(server: ServerProcess, tmp_path: Path) -> None:
    """One request at once and six a minute: the next ones get 429 with the time to wait."""
    text = 'name = "mail"\n[limits]\nmax_concurrent = 1\nrequests_per_minute = 6\n'
    key = add(server, tmp_path, text)
    wait_for_status(server, key, 200)
    connection, response = open_request(server, key, ENDLESS, stream=True)
    assert response.status == 200
    status, body, retry_after = complete(server, key, 1)
    assert (status, body["error"]["type"]) == (429, "rate_limit_error")
    assert "has 1 requests in work and may have 1" in body["error"]["message"]
    assert int(retry_after or 0) >= 1
    connection.close()
    server.wait_until(lambda: server.ps()[0]["num_running"] == 0)
    statuses = [complete(server, key, 1)[0] for _ in range(8)]
    assert statuses[:3] == [200] * 3
    assert statuses[-2:] == [429] * 2
    assert "in the last minute and may send 6" in complete(server, key, 1)[1]["error"]["message"]


@within_a_day
def test_many_at_once_stay_within_the_budget(server: ServerProcess, tmp_path: Path) -> None:
    """Clients of one app that race for the rest get all of it, and not a token more."""
    key = add(server, tmp_path, 'name = "mail"\n[budgets]\ntokens_per_day = 600\n')
    wait_for_status(server, key, 200)
    totals: list[int] = []

    def client() -> None:
        for _ in range(10):
            status, body, _ = complete(server, key, 40)
            if status == 200:
                totals.append(body["usage"]["total_tokens"])

    in_parallel(client, num_threads=6)
    server.wait_until(lambda: complete(server, key, 600)[0] in {200, 429})
    server.wait_until(lambda: used_tokens(server, "mail") >= 590)
    assert sum(totals) <= 600
    assert used_tokens(server, "mail") <= 600


def in_parallel(work: Callable[[], None], *, num_threads: int) -> None:
    threads = [threading.Thread(target=work) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_commands_need_no_server(tmp_path: Path, server: ServerProcess) -> None:
    """Bad usage is 2, a wrong manifest and an unknown app are 1, each one sentence on stderr."""
    assert server.brim("apps", "add").returncode == 2
    assert server.brim("apps", "usage", "--days", "0").returncode == 2
    wrong = tmp_path / "wrong.toml"
    wrong.write_text('name = "mail"\nthreads = 8\n')
    refused = server.brim("apps", "add", str(wrong))
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith(f"brim: {wrong}: an app cannot set 'threads'")
    assert server.brim("apps", "remove", "mail").returncode == 1
