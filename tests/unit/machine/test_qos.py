"""The class that a worker's threads work under on macOS."""

import ctypes
import os
import subprocess
import sys
from typing import Any

import pytest

from brim.machine.qos import QosClass, set_qos_class


class Function:
    """A function of a C library that notes its calls."""

    def __init__(self, status: int) -> None:
        self.status = status
        self.calls: list[tuple[int, ...]] = []
        self.argtypes: list[Any] = []
        self.restype: Any = None

    def __call__(self, *arguments: int) -> int:
        self.calls.append(arguments)
        return self.status


class Library:
    def __init__(self, status: int = 0) -> None:
        self.pthread_set_qos_class_self_np = Function(status)


def test_the_class_goes_to_the_calling_thread_with_the_systems_number() -> None:
    """The system is asked for user-initiated, 0x19 in <sys/qos.h>, not lowered in it."""
    library = Library()
    assert set_qos_class(QosClass.USER_INITIATED, library)
    call = library.pthread_set_qos_class_self_np
    assert call.calls == [(0x19, 0)]
    assert call.argtypes == [ctypes.c_uint, ctypes.c_int]
    assert call.restype is ctypes.c_int


def test_the_numbers_are_those_of_the_header() -> None:
    """The five classes have the values that <sys/qos.h> gives them."""
    assert [int(qos) for qos in QosClass] == [0x21, 0x19, 0x15, 0x11, 0x09]


def test_a_refusal_is_no_error() -> None:
    """Where the system says no, as to a process that was started in the background, so do we."""
    assert not set_qos_class(QosClass.USER_INITIATED, Library(status=1))


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has the classes")
def test_other_systems_have_no_classes() -> None:
    """Off macOS nothing is set."""
    assert not set_qos_class(QosClass.USER_INITIATED)


WORKER = """
import os, socket, sys, threading
import brim.worker.__main__ as worker

seen = []
def set_qos_class(qos):
    backends = {"mlx", "llama_cpp"} & set(sys.modules)
    seen.append((qos.name, threading.active_count(), sorted(backends)))

worker.set_qos_class = set_qos_class
ours, theirs = socket.socketpair()
ours.close()
sys.argv = ["brim.worker", f"--fd={theirs.detach()}", f"--parent={os.getppid()}"]
worker.main()
print(seen)
"""


def test_a_worker_sets_its_class_before_anything_could_inherit_another() -> None:
    """When the class is set there is one thread, and no backend is imported that starts more."""
    result = subprocess.run(
        [sys.executable, "-c", WORKER], capture_output=True, text=True, check=True,
        env=dict(os.environ),
    )  # fmt: skip
    assert result.stdout == "[('USER_INITIATED', 1, [])]\n"
