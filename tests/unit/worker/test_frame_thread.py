"""The thread that reads frames and tokenises, as the system made it."""

import ctypes
import socket
import sys
import threading

import pytest
from support.models import plan_for

from brim.core.plan import Plan
from brim.worker import protocol
from brim.worker.outbox import Outbox
from brim.worker.reader import STACK_BYTES, FrameThread


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

    def on_load(plan: Plan) -> None:
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
        assert done.wait(10.0)
    assert seen[0] >= STACK_BYTES
