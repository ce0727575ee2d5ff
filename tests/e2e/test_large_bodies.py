"""What large bodies took of a real server's memory is given back when they are answered."""

import http.client
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from support.server_process import ServerProcess

NUM_AT_ONCE = 6
BODY_BYTES = 1_400_000

MAX_KEPT_BYTES = 5 << 20
"""Three times what is kept.  When six threads decoded at once, each with a heap of its own, 9 to 20
MB were."""


def bodies() -> list[bytes]:
    """Of spaces, of text, and of token ids."""
    start = {"model": "toy", "max_tokens": 1}
    bodies = [
        json.dumps({**start, "prompt": "Hi"}).ljust(BODY_BYTES),
        json.dumps({**start, "prompt": "x" * BODY_BYTES}),
        json.dumps({**start, "prompt": list(range(BODY_BYTES // 7))}),
    ]
    return [body.encode() for body in bodies]


def test_large_bodies_leave_nothing_behind(tmp_path: Path) -> None:
    """Dozens of megabytes, six bodies at a time, and the gateway is hardly larger than before."""
    with ServerProcess(tmp_path, "-m", "toy", "--ctx", "256") as server:
        gateway = psutil.Process(server.process.pid)
        if not Path("/proc/self/statm").exists():
            pytest.skip("resident memory is read on Linux")

        def send(body: bytes) -> int:
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
            try:
                connection.request("POST", "/v1/completions", body)
                response = connection.getresponse()
                response.read()
                return response.status
            finally:
                connection.close()

        before_bytes = gateway.memory_info().rss
        with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
            statuses = set(pool.map(send, bodies() * NUM_AT_ONCE))
        kept_bytes = gateway.memory_info().rss - before_bytes
    assert statuses == {200, 400}
    assert kept_bytes < MAX_KEPT_BYTES
