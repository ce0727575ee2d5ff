"""The thread that reads frames and tokenises, as the system made it."""

import ctypes
import os
import socket
import sys
import threading
from typing import Any

import msgspec
import pytest
from support.chat_templates import CHATML
from support.models import plan_for

from brim.core.request import Message, Priority, Request
from brim.engine.byte_tokenizer import ByteTokenizer
from brim.scheduler.sequence import ScheduledRequest
from brim.worker import protocol
from brim.worker.outbox import Outbox
from brim.worker.prepare import PromptBuilder
from brim.worker.reader import STACK_BYTES, FrameThread

LIMIT_S = 60.0
"""For what takes a thread milliseconds."""


def own_stack_bytes() -> int:
    """Of the calling thread, from glibc or musl."""
    libc = ctypes.CDLL(None)
    attributes, size = ctypes.create_string_buffer(64), ctypes.c_size_t()
    libc.pthread_self.restype = ctypes.c_void_p
    assert libc.pthread_getattr_np(ctypes.c_void_p(libc.pthread_self()), attributes) == 0
    libc.pthread_attr_getstacksize(attributes, ctypes.byref(size))
    libc.pthread_attr_destroy(attributes)
    return size.value


@pytest.mark.skipif(sys.platform != "linux", reason="asks the C library of Linux")
def test_prompts_are_read_on_a_deep_stack() -> None:
    """The tokenizer's thread has its room, and threads started later are as they were."""
    seen: list[int] = []
    done = threading.Event()

    def on_load(load: protocol.Load) -> None:
        seen.append(own_stack_bytes())
        done.set()
        # The end of the connection would end this process.
        threading.Event().wait()

    ours, theirs = socket.socketpair()
    with ours:
        usual_bytes = threading.stack_size()
        FrameThread(theirs, Outbox(theirs), on_load).start()
        assert threading.stack_size() == usual_bytes
        ours.sendall(protocol.encode(protocol.Load(plan_for("toy"))))
        assert done.wait(LIMIT_S)
    assert seen[0] >= STACK_BYTES


class CapturingLoop:
    """Takes what the thread hands over, and keeps the thread from ending this process."""

    def __init__(self) -> None:
        self.taken: list[ScheduledRequest] = []
        self.done = threading.Event()

    def put(self, command: ScheduledRequest) -> None:
        self.taken.append(command)
        self.done.set()
        threading.Event().wait()


def test_the_scheduler_learns_what_the_prompt_and_the_request_say() -> None:
    """Turns, boundaries, priority and whose cache go with the tokens, and the count goes back."""
    loop: Any = CapturingLoop()
    plan = plan_for("toy")
    model = msgspec.structs.replace(plan.model, chat_template=CHATML)
    prompts = PromptBuilder(msgspec.structs.replace(plan, model=model), ByteTokenizer())
    request = Request(
        request_id="r",
        model="toy",
        messages=(
            Message(role="system", content="x-anthropic-billing-header: cch=1;"),
            Message(role="system", content="Be brief."),
            Message(role="user", content="Hi"),
        ),
        priority=Priority.BACKGROUND,
        cache_namespace="mine",
        use_cache=False,
        keeps_on_disk=False,
    )
    own, theirs = socket.socketpair()
    # Of a descriptor that nobody closes: the end of the connection would end this process, also
    # after a failure.
    connection = os.fdopen(own.detach(), "r+b", buffering=0, closefd=False)
    thread = FrameThread(theirs, Outbox(theirs), lambda load: None)
    thread.attach(loop, prompts)
    thread.start()
    connection.write(protocol.encode(protocol.Prepare(7, request)))
    (counted,) = protocol.worker_frames().feed(connection.read(65536))
    assert isinstance(counted, protocol.Counted), counted
    connection.write(protocol.encode(protocol.Start(7, 5)))
    assert loop.done.wait(LIMIT_S)
    expected = prompts.build(request)
    assert counted.num_prompt_tokens == len(expected.tokens)
    assert [line.kind for line in counted.moved_lines] == ["claude-code billing"]
    (scheduled,) = loop.taken
    assert scheduled.prompt_tokens == expected.tokens
    assert scheduled.turn_starts == expected.turn_starts != ()
    assert scheduled.boundaries == expected.boundaries != ()
    assert (scheduled.priority, scheduled.namespace) == (Priority.BACKGROUND, "mine")
    assert not scheduled.use_cache
    assert not scheduled.keeps_on_disk
    assert scheduled.max_tokens == 5
