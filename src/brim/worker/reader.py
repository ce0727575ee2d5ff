"""The worker's second thread: reads frames and prepares prompts while the engine steps.

Templates and tokenizers take as long as a prompt is long; here that costs the choices that are
decoding nothing.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable

import msgspec

from brim.core.request import Request
from brim.errors import BrimError, EngineError
from brim.scheduler.answers import error_deltas
from brim.scheduler.sequence import ScheduledRequest
from brim.telemetry.trace import where
from brim.worker import protocol
from brim.worker.loop import WorkerLoop
from brim.worker.outbox import Outbox
from brim.worker.prepare import BuiltPrompt, PromptBuilder

_log = logging.getLogger(__name__)

RECEIVE_BYTES = 64 * 1024
"""One read of the socket; frames are mostly far smaller, and prompts come in a few reads."""

STACK_BYTES = 512 * 1024 * 1024
"""llama.cpp splits text with std::regex, which recurses once for each character of an unbroken run:
32,000 letters crashed a default stack with several pre-tokenizers, this one tokenised 131,072.
Address space only: pages that are never touched are never there."""


class Prepared(msgspec.Struct, frozen=True):
    """A request between `Counted` and `Start`."""

    request: Request
    prompt: BuiltPrompt
    arrived_s: float


class FrameThread(threading.Thread):
    """Reads the gateway's frames to the end of the connection, which ends the process.

    Args:
        sock: The socket to the gateway.
        outbox: For `Counted` and for requests that cannot be prepared.
        on_load: Called with the one `Load` frame.
    """

    def __init__(
        self, sock: socket.socket, outbox: Outbox, on_load: Callable[[protocol.Load], None]
    ) -> None:
        super().__init__(name="frames", daemon=True)
        self._sock = sock
        self._outbox = outbox
        self._on_load = on_load
        self._prepared: dict[int, Prepared] = {}
        self._loop: WorkerLoop | None = None
        # Guards the loop and the limits that came before it.
        self._attach_lock = threading.Lock()
        self._early_limits: protocol.SetLimits | None = None
        self._prompts: PromptBuilder | None = None

    def attach(self, loop: WorkerLoop, prompts: PromptBuilder) -> None:
        """What requests need, once the model is loaded; before `Loaded` is sent."""
        self._prompts = prompts
        with self._attach_lock:
            self._loop = loop
            if self._early_limits is not None:
                loop.put(self._early_limits)

    def start(self) -> None:
        """Start reading, on a stack that a prompt cannot overflow."""
        usual_bytes = threading.stack_size(STACK_BYTES)
        try:
            super().start()
        finally:
            threading.stack_size(usual_bytes)

    def run(self) -> None:
        """Read until the gateway is gone; a worker never outlives it.

        The exit is immediate: nothing here is worth finishing for nobody, and the main thread may
        be inside the backend for seconds.
        """
        frames = protocol.gateway_frames()
        try:
            while data := self._sock.recv(RECEIVE_BYTES):
                for frame in frames.feed(data):
                    self._handle(frame)
        except ConnectionError:
            os._exit(0)
        except BaseException as exc:
            _log.error("the frame thread failed: %s", where(exc))
            os._exit(1)
        os._exit(0)

    def _handle(self, frame: protocol.GatewayFrame) -> None:
        if isinstance(frame, protocol.Load):
            self._on_load(frame)
            return
        if isinstance(frame, protocol.SetLimits):
            self._set_limits(frame)
            return
        if self._loop is None:
            if isinstance(frame, protocol.Shutdown):
                # Nothing is loaded, and the main thread may be in the middle of loading.
                os._exit(0)
            raise EngineError(f"{type(frame).__name__} came before the model was loaded")
        if isinstance(frame, protocol.Prepare):
            self._prepare(frame)
        elif isinstance(frame, protocol.Start):
            self._start(self._loop, frame)
        elif isinstance(frame, protocol.Cancel) and frame.ticket in self._prepared:
            del self._prepared[frame.ticket]
        else:
            self._loop.reader_cpu_s = time.thread_time()
            self._loop.num_prepared = len(self._prepared)
            self._loop.put(frame)

    def _set_limits(self, frame: protocol.SetLimits) -> None:
        """Hand limits on, or keep the newest until there is a model that works within them."""
        with self._attach_lock:
            if self._loop is None:
                self._early_limits = frame
            else:
                self._loop.put(frame)

    def _prepare(self, frame: protocol.Prepare) -> None:
        """Answer with the prompt's length, or with the reason why there is none."""
        arrived_s = time.monotonic()
        request = frame.request
        try:
            if self._prompts is None:
                raise EngineError("the model is not loaded")
            prompt = self._prompts.build(request, frame.summary)
        except BrimError as error:
            self._outbox.send(_refusal(frame, error))
        except Exception as exc:
            # A defect in a template or tokenizer must not take other clients' answers with it.
            _log.error("preparing a prompt failed: %s", where(exc))
            defect = EngineError(f"preparing the prompt failed: {type(exc).__name__}: {exc}")
            self._outbox.send(_refusal(frame, defect))
        else:
            if prompt.to_summarize is None:
                self._prepared[frame.ticket] = Prepared(request, prompt, arrived_s)
            self._outbox.send(
                protocol.Counted(
                    frame.ticket,
                    len(prompt.tokens),
                    overflow=prompt.overflow,
                    to_summarize=prompt.to_summarize,
                    may_outgrow=prompt.shift_keep_tokens is not None,
                    moved_lines=prompt.moved_lines,
                )
            )

    def _start(self, loop: WorkerLoop, frame: protocol.Start) -> None:
        prepared = self._prepared.pop(frame.ticket, None)
        if prepared is None:
            raise EngineError(f"Start names ticket {frame.ticket}, which was never prepared")
        request, prompt = prepared.request, prepared.prompt
        loop.put(
            ScheduledRequest(
                ticket=frame.ticket,
                prompt_tokens=prompt.tokens,
                max_tokens=frame.max_tokens,
                num_choices=request.num_choices,
                stop=request.stop,
                sampling=request.sampling,
                arrived_s=prepared.arrived_s,
                priority=request.priority,
                namespace=request.cache_namespace,
                use_cache=request.use_cache,
                keeps_on_disk=request.keeps_on_disk,
                turn_starts=prompt.turn_starts,
                boundaries=prompt.boundaries,
                shift_keep_tokens=prompt.shift_keep_tokens,
            )
        )


def _refusal(frame: protocol.Prepare, error: BrimError) -> protocol.Steps:
    return protocol.Steps(tuple(error_deltas(frame.ticket, frame.request.num_choices, error)))
