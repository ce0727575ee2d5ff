"""A flood of clients against a bounded queue: each is answered once, and memory stays granted."""

import asyncio
import contextlib
import http.client
import json
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from conftest import require_engine
from support.meters import RecordingMeter
from support.models import pystd_1m_gguf
from support.server_process import ServerProcess
from support.serving import ENDLESS, ask, collect, endless_plan, request, serving

from brim.core.answer import FinishReason
from brim.core.request import Priority

MIB = 1024 * 1024

NUM_SEQUENCES = 4
MAX_QUEUED = 100
NUM_CLIENTS = 500

SHORT_TOKENS = 24
LONG_TOKENS = 1900
"""Of the answers that are begun first: they take seconds, in which 500 clients come, and all of
them fit the pool."""

CONNECTION_BYTES = 96 * 1024
"""Most that one connection and its request may cost the gateway; measured 24 KiB."""

RECEIVE_BYTES = 4096
"""A receive buffer that an unread stream fills after a few events."""


class Client(msgspec.Struct):
    """What one client sent, and every byte that came back."""

    max_tokens: int
    is_stream: bool
    data: bytes = b""

    @property
    def status(self) -> int:
        return int(self.data.split(b" ", 2)[1])

    @property
    def headers(self) -> dict[str, str]:
        lines = self.data.partition(b"\r\n\r\n")[0].decode().split("\r\n")[1:]
        return {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}

    def events(self) -> list[bytes]:
        return [line[6:] for line in self.data.splitlines() if line.startswith(b"data: ")]

    def usage(self) -> dict[str, Any]:
        """Of a whole answer, or the last event of a stream; fails where there is none."""
        if not self.is_stream:
            [body] = [line for line in self.data.splitlines() if line.startswith(b'{"id"')]
            return dict(json.loads(body)["usage"])
        events = self.events()
        assert events.count(b"[DONE]") == 1
        assert events[-1] == b"[DONE]"
        return dict(json.loads(events[-2])["usage"])


class Flood(msgspec.Struct):
    """What 500 clients at once got, and what it cost."""

    readers: list[Client]
    sleepers: list[Client]
    """Those that were there first, and read nothing until all others were answered."""
    status: dict[str, Any]
    """What `/brim/ps` says afterwards."""
    planned_bytes: int
    worker_peak_bytes: int
    gateway_growth_bytes: int

    @property
    def answered(self) -> list[Client]:
        return [client for client in self.readers if client.status == 200]


async def connected(port: int, client: Client, number: int) -> socket.socket:
    """A connection on which the client's request was sent."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, ("127.0.0.1", port))
    body = {
        "model": "m", "prompt": f"def function_{number}(items):\n", "max_tokens": client.max_tokens,
        "ignore_eos": True, "stream": client.is_stream,
        **({"stream_options": {"include_usage": True}} if client.is_stream else {}),
    }  # fmt: skip
    data = json.dumps(body)
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n"
        f"content-length: {len(data)}\r\n\r\n"
    )
    await loop.sock_sendall(sock, (head + data).encode())
    return sock


async def read(client: Client, sock: socket.socket) -> None:
    """Take all that comes until the server closes the connection."""
    with sock:
        while part := await asyncio.get_running_loop().sock_recv(sock, 65536):
            client.data += part


def pss(pid: int) -> int:
    """Bytes that the process holds, shared pages in proportion, by smaps."""
    return int(psutil.Process(pid).memory_full_info().pss)


async def flood(server: ServerProcess, sockets: contextlib.ExitStack) -> Flood:
    before = server.ps()[0]
    gateway_pid, worker_pid = server.process.pid, before["pid"]
    gateway_bytes = gateway_peak = pss(gateway_pid)
    worker_peak = 0
    sleepers = [Client(LONG_TOKENS, True) for _ in range(NUM_SEQUENCES)]
    sleeping = [await connected(server.port, c, number) for number, c in enumerate(sleepers)]
    for sock in sleeping:
        sockets.enter_context(sock)
    server.wait_until(lambda: server.ps()[0]["num_running"] == NUM_SEQUENCES)
    assert server.ps()[0]["num_waiting"] == 0

    async def converse(client: Client, number: int) -> None:
        await read(client, await connected(server.port, client, number))

    readers = [Client(SHORT_TOKENS, number % 2 == 0) for number in range(NUM_CLIENTS)]
    pending = {
        asyncio.create_task(converse(client, NUM_SEQUENCES + number))
        for number, client in enumerate(readers)
    }
    while pending:
        done, pending = await asyncio.wait(pending, timeout=0.2)
        for task in done:
            task.result()
        gateway_peak = max(gateway_peak, pss(gateway_pid))
        worker_peak = max(worker_peak, pss(worker_pid))
    server.wait_until(lambda: server.ps()[0]["num_running"] == 0)
    gateway_peak = max(gateway_peak, pss(gateway_pid))
    await asyncio.gather(*(read(c, sock) for c, sock in zip(sleepers, sleeping, strict=True)))
    return Flood(
        readers=readers,
        sleepers=sleepers,
        status=server.ps()[0],
        planned_bytes=before["entry"]["planned_bytes"],
        worker_peak_bytes=worker_peak,
        gateway_growth_bytes=gateway_peak - gateway_bytes,
    )


@pytest.fixture(scope="module")
def flooded(tmp_path_factory: pytest.TempPathFactory) -> Flood:
    """500 clients at once against a queue of 100, while four others have all sequences."""
    require_engine("llamacpp")
    settings = {"models.max_queued_requests": MAX_QUEUED, "models.max_sequences": NUM_SEQUENCES}
    server = ServerProcess(
        tmp_path_factory.mktemp("flood"), "-m", f"m={pystd_1m_gguf()}", "--ctx", "8192",
        "--no-cache", settings=settings,
    )  # fmt: skip
    with server, contextlib.ExitStack() as sockets:
        return asyncio.run(asyncio.wait_for(flood(server, sockets), 240))


def test_of_500_clients_each_gets_an_answer_or_is_told_when_to_come_again(flooded: Flood) -> None:
    """As many as the queue takes are answered in full; the others get 503 with Retry-After."""
    assert Counter(client.status for client in flooded.readers).keys() == {200, 503}
    assert len(flooded.answered) >= MAX_QUEUED
    for client in flooded.readers:
        if client.status == 200:
            assert client.usage()["completion_tokens"] == SHORT_TOKENS
            assert 0 <= int(client.headers["x-brim-queue-place"]) <= MAX_QUEUED
        else:
            assert 1 <= int(client.headers["retry-after"]) <= 60
            assert b" in the queue); try again in " in client.data


def test_no_request_is_lost_or_answered_twice(flooded: Flood) -> None:
    """The server's own count of ends and refusals is what clients saw, and nothing is left."""
    num_answered = len(flooded.answered) + len(flooded.sleepers)
    counts = flooded.status["requests"]
    assert counts["outcomes"] == {"length": num_answered}
    assert counts["refusals"] == {"Busy": NUM_CLIENTS - len(flooded.answered)}
    assert counts["num_busy"] == NUM_CLIENTS - len(flooded.answered)
    num_tokens = sum(client.usage()["completion_tokens"] for client in flooded.answered)
    assert counts["num_completion_tokens"] == num_tokens + LONG_TOKENS * NUM_SEQUENCES
    assert (flooded.status["num_running"], flooded.status["num_waiting"]) == (0, 0)


def test_clients_that_do_not_read_hold_nobody_up_and_lose_nothing(flooded: Flood) -> None:
    """Their answers ended while they slept; what waited for them is whole."""
    for client in flooded.sleepers:
        assert client.status == 200
        assert client.usage()["completion_tokens"] == LONG_TOKENS


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="it has no smaps")
def test_memory_stays_within_what_was_granted(flooded: Flood) -> None:
    """The worker stays inside its entry; the gateway grows by its connections, bounded for each."""
    assert flooded.worker_peak_bytes <= flooded.planned_bytes
    num_connections = NUM_CLIENTS + NUM_SEQUENCES
    assert flooded.gateway_growth_bytes <= num_connections * CONNECTION_BYTES


@pytest.fixture
def narrow(tmp_path: Path) -> Iterator[ServerProcess]:
    """One sequence for everybody."""
    settings = {"models.max_sequences": 1}
    with ServerProcess(tmp_path, "-m", "toy", "--no-cache", settings=settings) as server:
        yield server


def test_clients_that_leave_are_cancelled_wherever_they_stand(narrow: ServerProcess) -> None:
    """One whose answer runs and two that wait close their connections; the next is served."""
    endless = {
        "model": "toy", "prompt": "a", "max_tokens": ENDLESS, "ignore_eos": True,
        "brim": {"overflow": "shift"},
    }  # fmt: skip
    body = json.dumps(endless)
    with contextlib.ExitStack() as stack:
        for number in range(3):
            connection = http.client.HTTPConnection("127.0.0.1", narrow.port, timeout=60)
            stack.callback(connection.close)
            connection.request("POST", "/v1/completions", body)
            narrow.wait_until(lambda n=number: narrow.ps()[0]["num_waiting"] == n)  # type: ignore[misc]
            narrow.wait_until(lambda: narrow.ps()[0]["num_running"] == 1)
    narrow.wait_until(lambda: narrow.ps()[0]["requests"]["outcomes"] == {"cancelled": 3})
    short = {"model": "toy", "prompt": "a", "max_tokens": 3}
    assert narrow.ask("POST", "/v1/completions", short)[0] == 200
    assert (narrow.ps()[0]["num_running"], narrow.ps()[0]["num_waiting"]) == (0, 0)


@pytest.mark.anyio
@pytest.mark.usefixtures("no_blocking")
async def test_a_cancelled_request_has_left_the_worker_by_its_next_step() -> None:
    """Whoever asks after the cancellation finds neither the one that ran nor the one that waited.

    Counters are taken between two steps, and frames are taken in order: were the two still there
    after a step, these would say so.
    """
    async with serving(endless_plan(max_sequences=1)) as gateway:
        running = await gateway.submit(request(max_tokens=ENDLESS))
        stream = aiter(running)
        await anext(stream)  # it has been begun
        queued = await gateway.submit(request(max_tokens=400))
        assert (running.queue_place, queued.queue_place) == (0, 1)
        assert (await gateway.worker_stats("toy")).num_waiting == 1
        queued.cancel()
        assert (await gateway.worker_stats("toy")).num_waiting == 0
        running.cancel()
        stats = await gateway.worker_stats("toy")
        assert (stats.num_prepared, stats.num_waiting) == (0, 0)
        lasts = [[delta async for deltas in stream for delta in deltas][-1]]
        lasts.append((await collect(queued))[0][-1])
        assert [last.finish_reason for last in lasts] == [FinishReason.CANCELLED] * 2
        assert await ask(gateway, request(max_tokens=400))


@pytest.mark.anyio
@pytest.mark.usefixtures("no_blocking")
async def test_interactive_requests_pass_background_ones() -> None:
    """Of three that wait for one sequence, the one that came last and is interactive is first."""
    meter = RecordingMeter()
    async with serving(endless_plan(max_sequences=1), meter=meter) as gateway:
        running = await gateway.submit(request(max_tokens=ENDLESS))
        stream = aiter(running)
        await anext(stream)  # it has been begun
        asked, answers = [], []
        for place, priority in enumerate(
            (Priority.BACKGROUND, Priority.BACKGROUND, Priority.INTERACTIVE), 1
        ):
            asked.append(request(priority=priority, max_tokens=100))
            answers.append(await gateway.submit(asked[-1]))
            assert answers[-1].queue_place == place
        running.cancel()
        for answer in answers:
            await collect(answer)
    first, second, interactive = (each.request_id for each in asked)
    assert list(meter.ended)[1:] == [interactive, first, second]
