"""Freed memory goes back to the system, by whatever call its C library has."""

import ctypes
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from brim.machine.heap import LARGE_BLOCK_BYTES, keep_heap_compact, trim_heap


class Libc:
    """A C library with one of the calls, or none."""

    def __init__(self, name: str = "") -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        if name:
            setattr(self, name, lambda *arguments: self.calls.append((name, arguments)))


@pytest.mark.parametrize(
    ("name", "num_arguments"), [("malloc_trim", 1), ("malloc_zone_pressure_relief", 2)]
)
def test_the_library_is_asked_for_everything(name: str, num_arguments: int) -> None:
    """All zones, and no bytes that it may keep."""
    libc = Libc(name)
    trim_heap(libc)
    [(called, arguments)] = libc.calls
    assert called == name
    assert len(arguments) == num_arguments
    assert not any(argument.value for argument in arguments)


def test_a_library_without_such_a_call_is_left_alone() -> None:
    """Nothing happens."""
    trim_heap(Libc())


def test_freed_memory_leaves_the_process() -> None:
    """Blocks below the end of the heap that glibc would keep are not resident any more."""
    libc, statm = ctypes.CDLL(None), Path("/proc/self/statm")
    if not hasattr(libc, "malloc_trim") or not statm.exists():
        pytest.skip("not glibc on Linux")
    libc.malloc.restype = ctypes.c_void_p
    block_bytes, num_blocks = 100 * 1024, 200
    blocks = [libc.malloc(ctypes.c_size_t(block_bytes)) for _ in range(num_blocks)]
    for block in blocks:
        ctypes.memset(block, 1, block_bytes)
    for block in blocks[:-1]:  # the last one keeps the heap's end where it is
        libc.free(ctypes.c_void_p(block))

    def resident_bytes() -> int:
        return int(statm.read_text().split()[1]) * 4096

    before = resident_bytes()
    trim_heap()
    given_back = before - resident_bytes()
    libc.free(ctypes.c_void_p(blocks[-1]))
    assert given_back > 0.8 * block_bytes * num_blocks


def test_glibc_is_told_of_one_heap_and_of_large_blocks() -> None:
    """By the numbers of its malloc.h; other libraries are left alone."""
    libc = Libc("mallopt")
    keep_heap_compact(libc)
    assert [tuple(each.value for each in arguments) for _, arguments in libc.calls] == [
        (-8, 1),
        (-3, LARGE_BLOCK_BYTES),
    ]
    keep_heap_compact(Libc())


SCRIPT = """
import ctypes, pathlib, threading
from brim.machine.heap import keep_heap_compact

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
keep_heap_compact()

def take(num_bytes):
    block = libc.malloc(ctypes.c_size_t(num_bytes))
    ctypes.memset(block, 1, num_bytes)
    return block

def work():
    libc.free(ctypes.c_void_p(take(8 << 20)))  # from then on glibc would keep blocks of this size
    for block in [(take(1 << 20), take(100))[0] for _ in range(8)]:  # the small ones stay
        libc.free(ctypes.c_void_p(block))

def resident_bytes():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096

before = resident_bytes()
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(resident_bytes() - before)
"""


def test_what_threads_have_freed_leaves_the_process() -> None:
    """Large blocks of several threads are not resident any more, whatever small ones stay."""
    if not hasattr(ctypes.CDLL(None), "mallopt") or not Path("/proc/self/statm").exists():
        pytest.skip("not glibc on Linux")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=True
    )
    assert int(done.stdout) < 4 << 20, "of 32 MiB that were taken and freed"
