"""Frames between gateway and worker: length-prefixed msgpack on a Unix socket.

A frame is a little-endian u32 length and that many bytes of msgpack.  The worker sends `Hello`
first, with the protocol's version; anything else, a frame over `MAX_FRAME_BYTES`, or bytes that do
not decode end the connection.  KV never crosses the socket.  One `Steps` frame carries everything
that one engine step produced; if the gateway has not read the last one yet, the worker merges what
follows, so a slow reader costs latency and never memory.

Both sides share this module; it does no I/O.
"""

import struct
from collections.abc import Iterator
from typing import Generic, TypeVar

import msgspec

from brim.chat.overflow import ToSummarize
from brim.core.answer import Delta, ErrorInfo, MovedLine, OverflowReport
from brim.core.cache import CacheOptions, PrefixStats
from brim.core.memory import Footprint
from brim.core.plan import Plan
from brim.core.request import Request
from brim.core.stance import WorkLimits
from brim.errors import EngineError

T = TypeVar("T")

PROTOCOL_VERSION = 3

MAX_FRAME_BYTES = 64 * 1024 * 1024
"""Above the largest accepted request body (server.limits), with room for its encoding."""

_LENGTH = struct.Struct("<I")


# --- gateway to worker -------------------------------------------------------------------------


class WorkerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a worker works, beside how its model is loaded."""

    stall_target_s: float = 0.3
    """Longest step while something decodes."""
    cache: CacheOptions | None = None
    """None keeps no KV on disk."""
    limits: WorkLimits = WorkLimits()


class Load(msgspec.Struct, frozen=True, tag=True):
    """Load the planned model; answered by `Loaded` or `LoadFailed`.  Sent once."""

    plan: Plan
    options: WorkerOptions = WorkerOptions()


class Prepare(msgspec.Struct, frozen=True, tag=True):
    """First phase of admission: render the template and count tokens.

    Answered by `Counted`, or by `Steps` with an error for every choice.
    """

    ticket: int
    """The gateway's number for this request; unique for the life of the worker."""
    request: Request
    summary: str | None = None
    """Of what the last `Counted` for this ticket wanted summarised."""


class Start(msgspec.Struct, frozen=True, tag=True):
    """Second phase: the ledger granted the KV; generate at most `max_tokens` a choice."""

    ticket: int
    max_tokens: int


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Drop a request at the next step boundary; no further deltas follow for it."""

    ticket: int


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Free the engine and exit 0; whatever still runs is dropped."""


class GetStats(msgspec.Struct, frozen=True, tag=True):
    """Ask for `Stats`, taken between two steps."""


class SetLimits(msgspec.Struct, frozen=True, tag=True):
    """Work within these limits from the next step on; may come before the model is loaded."""

    limits: WorkLimits


class Resize(msgspec.Struct, frozen=True, tag=True):
    """Give the KV pool another size between two steps; answered by `Resized`.

    Idle sequences go first, what is worth it to disk.  A pool that is to be smaller than what
    running requests hold and were promised becomes that large.
    """

    kv_tokens: int


GatewayFrame = Load | Prepare | Start | Cancel | Shutdown | GetStats | SetLimits | Resize


# --- worker to gateway -------------------------------------------------------------------------


class Hello(msgspec.Struct, frozen=True, tag=True):
    """The worker is up."""

    protocol_version: int
    pid: int


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """The model is ready."""

    footprint: Footprint
    load_s: float
    exact_profile: bool
    forks_share_kv: bool
    """Choices of one request share the prompt's KV; admission counts with it."""


class LoadFailed(msgspec.Struct, frozen=True, tag=True):
    """The model cannot be loaded; the worker exits."""

    error: ErrorInfo


class Counted(msgspec.Struct, frozen=True, tag=True):
    """How long the prompt is in tokens; the worker holds it until Start or Cancel."""

    ticket: int
    num_prompt_tokens: int
    overflow: OverflowReport | None = None
    """What was done to make it fit, where something was."""
    moved_lines: tuple[MovedLine, ...] = ()
    """Lines that do not stand where the client put them."""
    to_summarize: ToSummarize | None = None
    """What must be summarised first; the worker holds nothing, and wants Prepare with it."""
    may_outgrow: bool = False
    """The answer may be longer than the window: older tokens are dropped as it grows."""


class Resized(msgspec.Struct, frozen=True, tag=True):
    """The pool as it is now, whether or not it is what was wanted."""

    kv_tokens: int
    footprint: Footprint
    num_dropped_tokens: int = 0
    """Cells of idle sequences that went."""
    error: ErrorInfo | None = None
    """Why it is not what was wanted, where the engine refused."""


class LoadProgress(msgspec.Struct, frozen=True, tag=True):
    """How far loading is, for those who wait; none of these comes after `Loaded`."""

    fraction: float
    """0 to 1."""


class Steps(msgspec.Struct, frozen=True, tag=True):
    """What steps since the last frame produced: (ticket, delta) pairs, in order."""

    deltas: tuple[tuple[int, Delta], ...]


class Stats(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Counters since the model was loaded.

    `loop_cpu_s - engine_cpu_s + reader_cpu_s` is what the worker itself costs; the backend's own
    threads are in none of them.
    """

    num_steps: int
    num_tokens: int
    """Tokens drawn."""
    num_prompt_tokens: int
    """Prompt tokens of requests that were started."""
    num_sequences: int
    """Sequences that are open in the engine."""
    num_prepared: int
    """Prompts that wait for Start."""
    num_frames: int
    """Frames sent; fewer than steps when the gateway reads slowly and deltas are merged."""
    engine_cpu_s: float
    """CPU time of the loop's thread inside the engine's step."""
    engine_s: float
    """Wall time inside the engine's step."""
    loop_cpu_s: float
    """CPU time of the loop's thread, the engine's step included."""
    reader_cpu_s: float
    """CPU time of the thread that reads frames, renders templates and tokenises."""
    num_waiting: int = 0
    """Requests without a sequence yet."""
    prefix: PrefixStats = PrefixStats()
    kv_tokens: int = 0
    """Cells of the pool."""
    num_needed_tokens: int = 0
    """Cells that running requests hold or were promised."""
    kv_bytes: int = 0
    """What the backend says that the pool takes."""


WorkerFrame = Hello | Loaded | LoadFailed | Counted | Steps | Stats | Resized | LoadProgress

_encoder = msgspec.msgpack.Encoder()


def encode(frame: GatewayFrame | WorkerFrame) -> bytes:
    """One frame, length first.

    Raises:
        EngineError: It is larger than MAX_FRAME_BYTES.
    """
    body = _encoder.encode(frame)
    if len(body) > MAX_FRAME_BYTES:
        raise EngineError(f"a frame of {len(body)} bytes is over the limit of {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(body)) + body


class FrameReader(Generic[T]):
    """Cuts a byte stream into frames; `gateway_frames` and `worker_frames` make one for each side.

    Feed it whatever the socket gave; iterate over the frames that are complete.
    """

    def __init__(self, decoder: msgspec.msgpack.Decoder[T]) -> None:
        self._decoder = decoder
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[T]:
        """Frames completed by `data`.

        Raises:
            EngineError: A length over the limit, or bytes that are not a frame of this protocol.
        """
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > MAX_FRAME_BYTES:
                raise EngineError(
                    f"a frame announces {length} bytes; the limit is {MAX_FRAME_BYTES}"
                )
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                return
            body = bytes(memoryview(self._buffer)[_LENGTH.size : end])
            del self._buffer[:end]
            try:
                yield self._decoder.decode(body)
            except msgspec.DecodeError as exc:
                raise EngineError(f"not a frame of protocol {PROTOCOL_VERSION}: {exc}") from exc


def gateway_frames() -> FrameReader[GatewayFrame]:
    """A reader for what the gateway sends."""
    return FrameReader(msgspec.msgpack.Decoder(GatewayFrame))


def worker_frames() -> FrameReader[WorkerFrame]:
    """A reader for what the worker sends."""
    return FrameReader(msgspec.msgpack.Decoder(WorkerFrame))
