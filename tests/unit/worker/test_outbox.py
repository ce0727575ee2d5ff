"""The worker's way out, over a real socket whose other end reads when the test says so."""

import socket
from collections.abc import Iterator

import pytest

from brim.core.answer import Delta, FinishReason
from brim.worker import protocol
from brim.worker.outbox import Outbox


class Gateway:
    """The other end: reads what is there and nothing else."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._frames = protocol.worker_frames()

    def read(self) -> list[protocol.WorkerFrame]:
        found: list[protocol.WorkerFrame] = []
        while True:
            try:
                data = self._sock.recv(1 << 20, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return found
            found += self._frames.feed(data)


@pytest.fixture
def ends() -> Iterator[tuple[Outbox, Gateway]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        yield Outbox(ours), Gateway(theirs)


def fill(outbox: Outbox) -> int:
    """Post until a frame is stuck and a delta waits behind it; returns how many deltas."""
    num_posted, num_frames = 0, -1
    while outbox.num_frames > num_frames:
        num_frames = outbox.num_frames
        outbox.post([(1, Delta(text="x" * 1000, num_tokens=1))])
        num_posted += 1
    return num_posted


def deltas_of(frames: list[protocol.WorkerFrame]) -> list[tuple[int, Delta]]:
    found: list[tuple[int, Delta]] = []
    for frame in frames:
        assert isinstance(frame, protocol.Steps)
        found += frame.deltas
    return found


def test_each_post_is_a_frame_while_the_gateway_reads(ends: tuple[Outbox, Gateway]) -> None:
    """A step's deltas leave with the step."""
    outbox, gateway = ends
    for text in "abc":
        outbox.post([(1, Delta(text=text))])
        assert gateway.read() == [protocol.Steps(((1, Delta(text=text)),))]
    assert outbox.num_frames == 3


def test_a_slow_gateway_gets_one_merged_delta(ends: tuple[Outbox, Gateway]) -> None:
    """While a frame is stuck, a thousand further steps wait as one delta, and no text is lost."""
    outbox, gateway = ends
    num_posted = fill(outbox)
    num_frames = outbox.num_frames
    for _ in range(1000):
        outbox.post([(1, Delta(text="y", num_tokens=1))])
    assert outbox.num_frames == num_frames
    received = gateway.read()
    outbox.post([(1, Delta(text="!", num_tokens=1, finish_reason=FinishReason.STOP))])
    received += gateway.read()
    deltas = [delta for _, delta in deltas_of(received)]
    assert "".join(delta.text for delta in deltas) == "x" * 1000 * num_posted + "y" * 1000 + "!"
    assert sum(delta.num_tokens for delta in deltas) == num_posted + 1001
    assert outbox.num_frames == num_frames + 1
    assert deltas[-1].finish_reason is FinishReason.STOP


def test_a_frame_sent_behind_a_stuck_one_keeps_the_order(ends: tuple[Outbox, Gateway]) -> None:
    """Half a frame is never followed by another frame's bytes."""
    outbox, gateway = ends
    fill(outbox)
    received = gateway.read()
    outbox.send(protocol.Counted(2, 10))
    received += gateway.read()
    assert received[-1] == protocol.Counted(2, 10)
    assert all(isinstance(frame, protocol.Steps) for frame in received[:-1])


def test_flush_sends_what_was_merged(ends: tuple[Outbox, Gateway]) -> None:
    """Before the loop sleeps, everything has left."""
    outbox, gateway = ends
    fill(outbox)
    outbox.post([(2, Delta(text="late"))])
    received = gateway.read()
    outbox.flush()
    received += gateway.read()
    assert deltas_of(received)[-1] == (2, Delta(text="late"))
    outbox.flush()
    assert gateway.read() == []


def test_a_gateway_that_has_gone_is_a_connection_error(ends: tuple[Outbox, Gateway]) -> None:
    """The worker's main thread ends by it."""
    outbox, gateway = ends
    gateway._sock.close()
    with pytest.raises(ConnectionError):
        outbox.post([(1, Delta(text="a"))])
