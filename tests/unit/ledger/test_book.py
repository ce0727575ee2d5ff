"""The book of all processes' grants: seen by others, dropped with their writers, locked."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from brim.core.machine import MachineSpec
from brim.errors import Busy
from brim.ledger import book as book_module
from brim.ledger.book import Book, Page, Promise, beside
from brim.ledger.processes import process_tree, start_time


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "brim" / "grants.json"


@pytest.fixture
def neighbour() -> Iterator[int]:
    """Another process that runs."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process.pid
        process.kill()


def test_a_process_sees_others_and_not_itself(path: Path, neighbour: int) -> None:
    """What one wrote last is what the other reads; writing again replaces it."""
    ours, theirs = Book(path), Book(path, pid=neighbour)
    with theirs.open() as page:
        page.write([("a", 5), ("b", 7)])
    with ours.open() as page:
        page.write([("c", 1)])
        assert [(each.name, each.num_bytes) for each in page.others()] == [("a", 5), ("b", 7)]
    with theirs.open() as page:
        page.write([("a", 6)])
        assert [each.name for each in page.others()] == ["c"]
    with ours.open() as page:
        assert [each.num_bytes for each in page.others()] == [6]
    theirs.erase()
    with ours.open() as page:
        assert page.others() == []
    assert path.stat().st_mode & 0o077 == 0


def test_lines_of_ended_processes_are_dropped(path: Path) -> None:
    """A killed process leaves nothing behind, nor does one whose id was given out again."""
    path.parent.mkdir()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    lines = [
        Promise(pid=gone.pid, started_unix_s=1.0, name="gone", num_bytes=5),
        Promise(pid=os.getppid(), started_unix_s=1.0, name="stranger", num_bytes=5),
    ]
    path.write_bytes(msgspec.json.encode(lines))
    with Book(path).open() as page:
        assert page.others() == []
        page.write([])
    assert path.read_bytes() == b"[]"


@pytest.mark.parametrize("damage", [b"", b"{", b'[{"pid": "x"}]', b"\xff" * 100])
def test_a_damaged_book_is_an_empty_one(path: Path, damage: bytes, neighbour: int) -> None:
    """Whatever it holds, grants can be written and read again."""
    path.parent.mkdir()
    path.write_bytes(damage)
    with Book(path, pid=neighbour).open() as page:
        assert page.others() == []
        page.write([("a", 5)])
    with Book(path).open() as page:
        assert [each.name for each in page.others()] == ["a"]


def test_the_lock_is_waited_for(path: Path, neighbour: int) -> None:
    """Who opens the book second reads what the first one wrote before it let go."""
    ours, theirs = Book(path), Book(path, pid=neighbour)
    page = theirs.open()
    seen: list[str] = []

    def read() -> None:
        with ours.open() as late:
            seen.extend(each.name for each in late.others())

    thread = threading.Thread(target=read)
    thread.start()
    page.write([("a", 5)])
    assert seen == []
    page.close()
    thread.join()
    assert seen == ["a"]


def test_a_lock_that_is_never_given_back_is_said(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the limit the caller is told who must act; nothing stays open."""
    monkeypatch.setattr(book_module, "LOCK_LIMIT_S", 0.0)
    held = Book(path).open()
    with pytest.raises(Busy, match=r"another brim process has held .*grants\.json") as caught:
        Book(path).open()
    assert caught.value.retry_after_s is not None
    held.close()
    Book(path).open().close()


def test_a_closed_page_takes_nothing(path: Path) -> None:
    """A write that comes late, from a thread that nobody waits for, touches no file."""
    page = Book(path).open()
    page.close()
    page.close()
    page.write([("a", 5)])
    assert page.others() == []
    assert path.read_bytes() == b""


def test_a_book_that_takes_nothing_is_said_and_not_raised(
    path: Path, neighbour: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a full disk, or another fault of it, grants go on and an event says why."""
    with Book(path, pid=neighbour).open() as page:
        page.write([("a", 5)])
    with Page(os.open(path, os.O_RDONLY), Book(path)) as page:
        page.write([("b", 7)])
        assert [each.name for each in page.others()] == ["a"]
    with Page(os.open(path, os.O_WRONLY), Book(path)) as page:
        assert page.others() == []
    assert capsys.readouterr().err.count("ledger_book_unusable") == 1


def test_promises_count_as_used_less_what_their_process_holds(neighbour: int) -> None:
    """Only what does not show in a reading yet is added, and the source says so."""
    machine = MachineSpec(name="m", system="linux", ram_bytes=10**12, others_bytes=10)
    promise = Promise(pid=neighbour, started_unix_s=0.0, name="a", num_bytes=10**11)
    added = beside(machine, [promise, promise])
    assert 2 * 10**11 - 10**9 < added.others_bytes - 10 < 2 * 10**11
    assert added.sources["others_bytes"].endswith("plans of other brim servers")
    small = msgspec.structs.replace(promise, num_bytes=1)
    assert beside(machine, [small]) is machine
    assert beside(machine, []) is machine


def test_the_gpu_limit_is_shared_with_other_processes(neighbour: int) -> None:
    """Two servers together are not granted more than the GPU keeps resident for one."""
    machine = MachineSpec(
        name="m", system="darwin", ram_bytes=100, others_bytes=10, gpu_limit_bytes=60
    )
    promise = Promise(pid=neighbour, started_unix_s=0.0, name="a", num_bytes=40)
    left = beside(machine, [promise])
    assert (left.gpu_limit_bytes, left.others_bytes) == (20, 10), "it holds more than 40 bytes"
    assert left.sources["gpu_limit_bytes"].endswith("less plans of other brim servers")
    assert beside(machine, [promise, promise]).gpu_limit_bytes == 0
    assert beside(machine, []) is machine


def test_a_process_and_what_it_started_are_found(neighbour: int) -> None:
    """This process has its child in its tree; one that is gone has no start and no tree."""
    assert {os.getpid(), neighbour} <= set(process_tree(os.getpid()))
    assert start_time(neighbour) is not None
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert (start_time(gone.pid), process_tree(gone.pid)) == (None, [])
