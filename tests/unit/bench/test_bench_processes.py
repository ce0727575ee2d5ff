"""Trees of processes that a measurement starts."""

import os
import socket
import sys
from collections.abc import Iterator

import psutil
import pytest

from brim.bench.processes import ProcessTree, dirty_bytes, free_port, is_alive, listeners
from brim.errors import ConfigError
from brim.machine.reading import machine_at_hand

FAMILY = [
    sys.executable,
    "-S",
    "-c",
    "import subprocess, sys;"
    "child = subprocess.Popen([sys.executable, '-S', '-c', 'input()'], stdin=subprocess.PIPE);"
    "print('ready', flush=True); child.wait()",
]
"""A parent whose child waits for it for ever."""


@pytest.fixture
def family() -> Iterator[ProcessTree]:
    tree = ProcessTree(FAMILY)
    try:
        while "ready" not in tree.last_words():
            assert tree.is_running
        yield tree
    finally:
        tree.kill()
        tree.stop()


def test_a_kill_ends_every_process_of_the_tree(family: ProcessTree) -> None:
    """Nothing is left to answer for the parent."""
    members = family.processes()
    assert len(members) == 2
    family.kill()
    assert not any(map(is_alive, members))
    assert not family.is_running
    assert family.processes() == []


def test_a_stop_ends_what_the_parent_leaves_behind(family: ProcessTree) -> None:
    """SIGTERM reaches the parent alone, whose child would wait on."""
    members = family.processes()
    family.stop()
    assert not any(map(is_alive, members))


def test_ctrl_c_at_the_terminal_does_not_reach_it(family: ProcessTree) -> None:
    """It leads a process group of its own."""
    assert os.getpgid(family.pid) == family.pid != os.getpgid(0)


def test_memory_of_a_tree_adds_up(family: ProcessTree) -> None:
    """Parent and child count both, and a tree that is gone is unknown rather than nothing."""
    machine = machine_at_hand()
    members = family.processes()
    each = [dirty_bytes([member], machine) for member in members]
    assert all(value is not None and value > 100_000 for value in each)
    total = dirty_bytes(members, machine)
    assert total is not None
    assert total > max(value for value in each if value is not None)
    family.kill()
    assert dirty_bytes(members, machine) is None


def test_its_last_words_are_kept() -> None:
    """The end of what it printed goes into the message of whoever waits for it."""
    tree = ProcessTree([sys.executable, "-S", "-c", "import sys; sys.exit('no such model')"])
    psutil.wait_procs(tree.processes(), timeout=10)
    assert tree.last_words() == "no such model"
    tree.stop()
    assert tree.last_words() == "it printed nothing"


def test_a_program_that_is_not_there_is_named() -> None:
    """No traceback, and no file of output stays."""
    with pytest.raises(ConfigError, match=r"cannot start '/no/such/program': No such file"):
        ProcessTree(["/no/such/program"])


def test_who_listens_on_a_port_is_found() -> None:
    """This process, while it does; nobody on a port that is free."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        found = listeners(sock.getsockname()[1])
    assert found in ([], [os.getpid()])  # not every system tells
    assert sys.platform != "linux" or found
    assert listeners(free_port()) == []
