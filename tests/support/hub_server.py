"""A hub that runs here: a real HTTP server with real bytes, on 127.0.0.1."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import huggingface_hub

from brim.registry.sources import DEMO_PATH

COMMIT = "c0ffee" + "0" * 34
DEMO = DEMO_PATH.read_bytes()


class FakeHub:
    """What the server has, how it misbehaves, and what it was asked."""

    def __init__(self) -> None:
        self.repository = "org/demo"
        """The only one that it has."""
        self.files: dict[str, bytes] = {"README.md": b"hello", "Demo-Q8_0.gguf": DEMO}
        self.published = dict(self.files)
        """What checksums are computed from; differs from `files` where damage is wanted."""
        self.requests: list[tuple[str, str, str | None]] = []
        self.queries: list[str] = []
        """What stood behind the '?' of each request."""
        self.answers: dict[str, tuple[int, dict[str, str], bytes]] = {}
        """Path prefix -> an answer instead of the true one."""
        self.cut_after: int | None = None
        """Bytes after which the next transfer is cut off."""
        self.hold: threading.Event | None = None
        """Where set, a transfer stops half-way until the event."""
        self.half_sent = threading.Event()
        self.ignores_ranges = False
        self.num_sent_bytes = 0
        self.endpoint = ""

    def sha256(self, name: str) -> str:
        return hashlib.sha256(self.published[name]).hexdigest()

    def transfers(self) -> list[str | None]:
        """The Range header of every transfer of bytes so far."""
        return [span for method, path, span in self.requests if path.startswith("/cdn/")]


class Handler(BaseHTTPRequestHandler):
    """The endpoints that huggingface_hub asks for: model info, resolve, and the bytes."""

    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing on stderr."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        self.hub.queries.append(query)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        for prefix, (status, headers, body) in self.hub.answers.items():
            if path.startswith(prefix):
                return self.answer(status, headers, body)
        parts = path.strip("/").split("/")
        if path == f"/api/models/{self.hub.repository}":
            return self.answer(200, {"Content-Type": "application/json"}, self.info())
        is_ours = "/".join(parts[:2]) == self.hub.repository
        if is_ours and parts[2:3] == ["resolve"] and "/".join(parts[4:]) in self.hub.files:
            return self.redirect("/".join(parts[4:]))
        for name in self.hub.files:
            if path == f"/cdn/{self.hub.sha256(name)}":
                return self.bytes_of(self.hub.files[name])
        code = "EntryNotFound" if is_ours else "RepoNotFound"
        return self.answer(404, {"X-Error-Code": code, "X-Repo-Commit": COMMIT}, b"")

    def info(self) -> bytes:
        siblings = []
        for name, data in self.hub.published.items():
            lfs = {"sha256": self.hub.sha256(name), "size": len(data), "pointerSize": 134}
            entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": "b" * 40}
            siblings.append(
                entry | ({"lfs": lfs} if name.endswith((".gguf", ".safetensors")) else {})
            )
        return json.dumps({"id": self.hub.repository, "sha": COMMIT, "siblings": siblings}).encode()

    def redirect(self, name: str) -> None:
        # As on the real hub the bytes are on another host than the metadata.
        storage = self.hub.endpoint.replace("127.0.0.1", "localhost")
        headers = {
            "Location": f"{storage}/cdn/{self.hub.sha256(name)}",
            "X-Repo-Commit": COMMIT,
            "X-Linked-Etag": f'"{self.hub.sha256(name)}"',
            "X-Linked-Size": str(len(self.hub.published[name])),
        }
        self.answer(302, headers, b"")

    def bytes_of(self, data: bytes) -> None:
        asked = None if self.hub.ignores_ranges else self.headers.get("Range")
        first, _, last = (asked or "bytes=0-")[6:].partition("-")
        start, end = int(first), min(int(last or len(data)) + 1, len(data))
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        rest = data[start:end]
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.hub.num_sent_bytes += len(rest)
        cut, self.hub.cut_after = self.hub.cut_after, None
        if cut is not None:
            self.wfile.write(rest[:cut])
            self.close_connection = True
        elif self.hub.hold is not None:
            self.wfile.write(rest[: len(rest) // 2])
            self.wfile.flush()
            self.hub.half_sent.set()
            self.hub.hold.wait(30)
            self.close_connection = True
        else:
            # Who wants a header only leaves early where ranges are ignored.
            with suppress(ConnectionError):
                self.wfile.write(rest)

    def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    """The running hub; it is stopped in the end, whatever it holds back."""
    fake = FakeHub()
    handler = type("BoundHandler", (Handler,), {"hub": fake})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        fake.endpoint = f"http://127.0.0.1:{http.server_address[1]}"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        huggingface_hub.close_session()
        yield fake
        huggingface_hub.close_session()
        if fake.hold is not None:
            fake.hold.set()
        http.shutdown()
        thread.join()
