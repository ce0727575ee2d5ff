"""Safety on the way in, at a real server: who reaches it, what it takes, and what it gives away."""

import contextlib
import http.client
import json
import os
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import require_engine
from support.models import DEMO
from support.server_process import ServerProcess

from brim.apps.registry import FILE_NAME, Registry
from brim.core.app import App

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
TEXT = b'{"model": "toy", "prompt": "Hi", "max_tokens": 2, "stream": true}'


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(
        tmp_path_factory.mktemp("server"),
        "-m",
        "toy",
        settings={"server.allowed_origins": "https://app.example"},
    ) as server:
        yield server


def ask(
    server: ServerProcess,
    method: str,
    path: str,
    body: bytes = b"",
    headers: Mapping[str, str] | None = None,
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        connection.request(method, path, body or None, headers or {})
        response = connection.getresponse()
        found = {name.lower(): value for name, value in response.getheaders()}
        return response.status, found, response.read()
    finally:
        connection.close()


def chat(**fields: Any) -> bytes:
    body = {"model": "toy", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    return json.dumps(body | fields).encode()


def test_it_listens_on_loopback_alone_by_default(server: ServerProcess) -> None:
    """No port of the server or its workers is open to another machine."""
    process = psutil.Process(server.process.pid)
    listening = {
        connection.laddr.ip
        for each in (process, *process.children(recursive=True))
        for connection in each.net_connections("inet")
    }
    assert listening == {"127.0.0.1"}


def test_an_exposed_address_needs_an_app_before_it_starts(tmp_path: Path) -> None:
    """`--host 0.0.0.0` without any app is refused with the command that adds one."""
    tmp_path.chmod(0o700)
    names = ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR", "XDG_STATE_HOME")
    done = subprocess.run(
        [sys.executable, "-m", "brim", "serve", "--host", "0.0.0.0", "--port", "0", "-m", "toy"],
        env={**os.environ, **{name: str(tmp_path) for name in names}},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "brim apps add" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_exposed_server_lets_in_keys_alone(tmp_path: Path) -> None:
    """With an app known it starts, and every route but /health is 401 without a key."""
    registry = Registry(tmp_path / FILE_NAME)
    key = registry.add(App(name="mail"), 'name = "mail"')
    registry.close()
    settings = {"server.state_directory": tmp_path, "server.host": "0.0.0.0"}
    with ServerProcess(tmp_path, "-m", "toy", settings=settings) as server:
        assert server.ask("GET", "/health") == (200, {"status": "ok"})
        for path in ("/v1/models", "/brim/ps", "/metrics", "/brim/events", "/openapi.json"):
            assert ask(server, "GET", path)[0] == 401
        bearer = {"Authorization": f"Bearer {key}"}
        assert ask(server, "POST", PLAIN, TEXT, headers=bearer)[0] == 200
        assert ask(server, "GET", "/brim/ps", headers=bearer)[0] == 403
        # A browser page that somebody pointed at it has no key, whatever it calls the server.
        assert ask(server, "GET", "/v1/models", headers={"Host": "evil.example"})[0] == 401
        assert "mail" not in json.dumps(server.ask("GET", "/v1/models")[1])
        # The operator's commands on the machine find their token.
        listed = server.brim("ps", "--json")
        assert listed.returncode == 0, listed.stderr
        assert "toy" in listed.stdout


def test_names_that_were_pointed_here_are_refused(server: ServerProcess) -> None:
    """A page whose name resolves to this machine gets 403, on every route."""
    for path in ("/health", "/v1/models", "/brim/ps"):
        assert ask(server, "GET", path, headers={"Host": "evil.example"})[0] == 403
    assert ask(server, "GET", "/health", headers={"Origin": "https://evil.example"})[0] == 403


def test_a_browser_page_that_is_allowed_can_use_it(server: ServerProcess) -> None:
    """Preflight and answer name the page's origin; another's get neither."""
    page = {"Origin": "https://app.example"}
    asked = {"Access-Control-Request-Method": "POST"}
    status, headers, _ = ask(server, "OPTIONS", CHAT, headers={**page, **asked})
    assert (status, headers["access-control-allow-origin"]) == (204, page["Origin"])
    status, headers, _ = ask(server, "POST", PLAIN, TEXT, headers=page)
    assert (status, headers["access-control-allow-origin"]) == (200, page["Origin"])
    status, headers, _ = ask(
        server, "OPTIONS", CHAT, headers={"Origin": "https://evil.example", **asked}
    )
    assert status == 403
    assert not [name for name in headers if name.startswith("access-control")]


TURN = {"role": "user", "content": "x"}
IMAGE = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (chat(messages=[TURN] * 10_001), 400, "messages"),
        (chat(messages=[TURN | {"content": [IMAGE]}]), 400, "only parts of type text"),
        (chat(messages=[TURN | {"content": [IMAGE] * 100_000}]), 400, "messages[0].content"),
        (chat(stop=["x"] * 17), 400, "stop"),
        (chat(stop="x" * 257), 400, "stop"),
        (b'{"model":' + b"[" * 500_000, 400, "expected string"),
        (b'{"chat_template_kwargs":' + b'{"a":' * 300_000, 400, "nested too deeply"),
        (chat(metadata={"a": "x" * 1_100_000}) + b"x", 400, "not JSON"),
        (b" " * (33 * 1024 * 1024), 413, "bytes"),
    ],
    ids=["messages", "image", "images", "stops", "stop", "deep", "deep variables", "tail", "size"],
)
def test_what_is_sent_is_bounded(
    server: ServerProcess, body: bytes, status: int, words: str
) -> None:
    """Each bound of docs/api.md is a plain refusal that names what is over it."""
    found, _, answer = ask(server, "POST", CHAT, body)
    assert found == status
    assert words in json.loads(answer)["error"]["message"]
    assert server.ask("GET", "/health")[0] == 200


@pytest.mark.parametrize("lines", [[b"x: y"] * 101, [b"x: " + b"y" * 70_000]], ids=["many", "long"])
def test_headers_are_bounded(server: ServerProcess, lines: list[bytes]) -> None:
    """More than a hundred headers, or 64 KiB of them, are 431."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as sock:
        sock.sendall(b"\r\n".join([b"GET /health HTTP/1.1", b"Host: localhost", *lines, b"", b""]))
        assert sock.makefile("rb").readline().startswith(b"HTTP/1.1 431")


@pytest.mark.parametrize(
    "name",
    [str(DEMO), f"demo={DEMO}", "../" * 12 + str(DEMO).lstrip("/"), "demo", "file://" + str(DEMO)],
)
def test_a_request_can_name_no_file(server: ServerProcess, name: str) -> None:
    """A path that exists, and a model that brim knows, are 404 unless the operator serves them."""
    status, answer = server.ask("POST", CHAT, json.loads(chat(model=name)))
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    assert [each["name"] for each in server.ps()] == ["toy"]


ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "text": "{% set ns = namespace(s='x') %}{% for a in range(99999) %}"
    "{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
    "macro": "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "python": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "number": "{{ 10 ** 10 ** 10 }}",
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_template_from_a_file_cannot_hold_or_leave_its_sandbox(tmp_path: Path, kind: str) -> None:
    """A model whose template never ends, grows or reaches for Python is refused; its worker lives.

    A body that needs no template is answered by that same worker afterwards.
    """
    require_engine("llamacpp")
    model = tmp_path / "bad.gguf"
    convert = [sys.executable, "-m", "gguf.scripts.gguf_new_metadata", "--chat-template"]
    subprocess.run(
        [*convert, ENDLESS[kind], str(DEMO), str(model)], check=True, capture_output=True
    )
    with ServerProcess(tmp_path, "-m", str(model)) as server:
        name = server.ps()[0]["name"]
        pid = server.ps()[0]["pid"]
        status, answer = server.ask("POST", CHAT, json.loads(chat(model=name)))
        assert status == 400
        assert "chat template" in answer["error"]["message"]
        plain = {"model": name, "prompt": "def f(x):", "max_tokens": 2}
        assert server.ask("POST", "/v1/completions", plain)[0] == 200
        assert server.ps()[0]["pid"] == pid


def files_below(directory: Path) -> set[Path]:
    return {path for path in directory.rglob("*") if path.is_file() and not path.is_symlink()}


def test_prompts_are_kept_below_the_caches_directory_alone(tmp_path: Path) -> None:
    """Namespaces that look like paths are refused, and no other file appears or changes."""
    require_engine("llamacpp")
    cache, home = tmp_path / "cache", tmp_path / "home"
    cache.mkdir(mode=0o700)
    home.mkdir(mode=0o700)
    settings = {"cache.directory": cache, "cache.min_tokens": 8, "cache.free_disk_floor_bytes": 0}
    with ServerProcess(home, "-m", "demo", settings=settings) as server:
        before = files_below(home)
        for namespace in ("../up", "/etc", "a/b", "..\\up", "\0", "."):
            body = chat(model="demo", brim={"cache": {"namespace": namespace}})
            status = server.ask("POST", CHAT, json.loads(body))[0]
            assert status == (200 if namespace == "." else 400)
        body = chat(model="demo", messages=[TURN | {"content": "sum a list " * 40}])
        for key in ("../../../up", "/etc/passwd", "..", "%2e%2e%2f"):
            headers = {"Authorization": f"Bearer {key}"}
            assert ask(server, "POST", CHAT, body, headers=headers)[0] == 200
        server.wait_until(lambda: any(cache.rglob("*.kv")) or len(files_below(cache)) > 2)
        assert files_below(cache)
        grown = {path for path in files_below(home) - before if path.suffix != ".tmp"}
        assert not [path for path in grown if "forecast" not in path.name], grown
        assert all(path.resolve().is_relative_to(cache) for path in cache.rglob("*"))


SECRET = "zqx7secretmarkerzqx7"


def readable(path: Path) -> bytes:
    """What a file says; of a database, every value that a reader would see, and its raw pages."""
    data = path.read_bytes()
    if data.startswith(b"SQLite format 3"):
        with contextlib.closing(sqlite3.connect(path)) as connection:
            data += "\n".join(connection.iterdump()).encode()
    return data


def test_no_prompt_or_key_is_in_a_log_or_a_state_file(tmp_path: Path) -> None:
    """What clients send is in stderr, events, usage and state nowhere, whatever goes wrong.

    The prefix cache is left out: keeping prompts is what it is for, and it can be turned off.
    """
    require_engine("llamacpp")
    registry = Registry(tmp_path / FILE_NAME)
    app_key = registry.add(App(name="mail"), 'name = "mail"')
    registry.close()
    settings = {
        "server.state_directory": tmp_path,
        "cache.enabled": False,
        "worker.restart_backoff_s": 0.01,
    }
    with ServerProcess(tmp_path, "-m", "demo", settings=settings) as server:
        turn = {"role": "user", "content": f"{SECRET} " * 20}
        sent = {"X-Secret": SECRET, "User-Agent": SECRET, "Cookie": SECRET}
        as_app = {"Authorization": f"Bearer {app_key}", **sent}
        as_stranger = {"Authorization": f"Bearer {SECRET}", **sent}
        unknown = {"Authorization": f"Bearer brim-{SECRET}", **sent}
        good = chat(model="demo", messages=[turn], user=SECRET, metadata={SECRET: SECRET})
        assert ask(server, "POST", CHAT, good, headers=as_app)[0] == 200
        assert ask(server, "POST", CHAT, good, headers=as_stranger)[0] == 200
        assert ask(server, "POST", CHAT, good, headers=unknown)[0] == 401
        wrong = [
            chat(model="demo", messages=[turn])[:-5],
            chat(model=SECRET),
            chat(model="demo", **{SECRET: SECRET}),
            chat(model="demo", temperature=SECRET),
            chat(model="demo", messages=[turn], max_tokens=10**9),
            chat(model="demo", messages=[turn | {"content": f"{SECRET} " * 60_000}]),
            chat(model="demo", messages=[turn], chat_template_kwargs={"messages": SECRET}),
            chat(model="demo", messages=[turn | {"content": f"{SECRET}\ud800"}]),
        ]
        for body in wrong:
            assert 400 <= ask(server, "POST", CHAT, body, headers=as_app)[0] < 500
        for path in (f"/{SECRET}", f"/v1/models/{SECRET}", f"/brim/events?since={SECRET}"):
            assert ask(server, "GET", path, headers=as_stranger)[0] in (400, 404)
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as sock:
            sock.sendall(f"NOT HTTP {SECRET}\r\n\r\n".encode())
            assert b"400" in sock.makefile("rb").readline()
        kill_the_worker_that_has(
            server, chat(model="demo", messages=[turn], max_tokens=900), as_app
        )
        events = ask(server, "GET", "/brim/events?follow=false")[2]
        assert SECRET.encode() not in events
        server.process.terminate()
        assert server.end() == 0
    assert "worker_died" in server.stderr  # so that there is something in the log to look at
    secrets = [SECRET, app_key, app_key[5:]]
    for secret in secrets:
        assert secret not in server.stderr
    kept = files_below(tmp_path)
    assert {path.name for path in kept} >= {FILE_NAME}
    for file in kept:
        assert not [secret for secret in secrets if secret.encode() in readable(file)], file


def kill_the_worker_that_has(server: ServerProcess, body: bytes, headers: dict[str, str]) -> None:
    """Have the worker die over a prompt, as a backend's abort would."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    asked = json.loads(body) | {"stream": True, "ignore_eos": True}
    connection.request("POST", CHAT, json.dumps(asked), headers)
    response = connection.getresponse()
    response.readline()
    psutil.Process(server.ps()[0]["pid"]).kill()
    assert b"error" in response.read()
    connection.close()


@pytest.mark.parametrize("name", [FILE_NAME, "server-*.json"])
def test_files_with_secrets_are_their_owners_alone(tmp_path: Path, name: str) -> None:
    """Hashes of keys and the operator's token cannot be read by another user of the machine."""
    registry = Registry(tmp_path / FILE_NAME)
    registry.add(App(name="mail"), 'name = "mail"')
    registry.close()
    with ServerProcess(tmp_path, "-m", "toy", settings={"server.state_directory": tmp_path}):
        found = list(tmp_path.rglob(name))
        assert found
        for path in found:
            assert path.stat().st_mode & 0o077 == 0
