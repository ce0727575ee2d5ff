"""The worker's way out: frames to the gateway, from two threads, over one socket."""

import socket
import threading

from brim.core.answer import Delta
from brim.worker import protocol
from brim.worker.deltas import DeltaBuffer


class Outbox:
    """Sends frames whole and in order.

    The loop's thread calls `post`, which never blocks: what the socket does not take is merged
    until it does.  `send` and `flush` wait for the gateway to read, and are for moments in which
    nothing decodes on the calling thread.

    Args:
        sock: A blocking stream socket; nobody else sends on it.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()
        # The part of frames already begun that the socket has not taken; guarded by the lock.
        self._unsent = bytearray()
        # Deltas of no frame yet; the loop's thread alone touches them.
        self._waiting = DeltaBuffer()
        self.num_frames = 0
        """Frames begun, for Stats."""

    def post(self, deltas: list[tuple[int, Delta]]) -> None:
        """Send one `Steps` frame, or keep the deltas where the last frame is still under way."""
        if not self._lock.acquire(blocking=False):
            self._waiting.add(deltas)
            return
        try:
            if self._unsent:
                num_sent = self._send_now(self._unsent)
                del self._unsent[:num_sent]
                if self._unsent:
                    self._waiting.add(deltas)
                    return
            if self._waiting:
                self._waiting.add(deltas)
                deltas = self._waiting.take()
            frame = protocol.encode(protocol.Steps(tuple(deltas)))
            self.num_frames += 1
            num_sent = self._send_now(frame)
            if num_sent < len(frame):
                self._unsent += memoryview(frame)[num_sent:]
        finally:
            self._lock.release()

    def flush(self) -> None:
        """Send everything that waits; the loop's thread calls it before it sleeps."""
        if not self._unsent and not self._waiting:
            return
        with self._lock:
            if self._waiting:
                self._append(protocol.Steps(tuple(self._waiting.take())))
            self._send_all()

    def send(self, frame: protocol.WorkerFrame) -> None:
        """Send one frame behind whatever is under way."""
        with self._lock:
            self._append(frame)
            self._send_all()

    def _append(self, frame: protocol.WorkerFrame) -> None:
        self._unsent += protocol.encode(frame)
        self.num_frames += 1

    def _send_all(self) -> None:
        self._sock.sendall(self._unsent)
        self._unsent.clear()

    def _send_now(self, data: bytes | bytearray) -> int:
        """Bytes that the socket took without waiting."""
        try:
            return self._sock.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
