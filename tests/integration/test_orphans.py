"""Workers that outlive their gateway, with real processes: ended, and nobody else's are.

Linux kills a worker with its gateway, so the orphan is one that hangs before it could ask for that:
a real worker process that is stopped as soon as it exists.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from support.hung_worker import Gateway, has_ended

from brim.runtime.orphans import (
    WorkerNote,
    end_orphans,
    find_orphans,
    forget_worker,
    is_orphan,
    note_worker,
)


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    gateway = Gateway(tmp_path)
    yield gateway
    gateway.kill()
    if has_ended(gateway.worker):
        return
    gateway.worker.kill()


def test_the_worker_of_a_killed_gateway_is_ended(gateway: Gateway, tmp_path: Path) -> None:
    """It hangs and lives on; the next start finds it by its note and ends it, once."""
    gateway.kill()
    assert not has_ended(gateway.worker)
    assert [note.pid for note in find_orphans(tmp_path)] == [gateway.worker.pid]
    assert end_orphans(tmp_path) == [gateway.worker.pid]
    assert has_ended(gateway.worker)
    assert list(tmp_path.iterdir()) == []
    assert end_orphans(tmp_path) == []


def test_a_worker_whose_gateway_runs_is_left_alone(gateway: Gateway, tmp_path: Path) -> None:
    """Another start must not touch it, nor its note."""
    assert end_orphans(tmp_path) == []
    assert not has_ended(gateway.worker)
    assert [path.name for path in tmp_path.iterdir()] == [f"{gateway.worker.pid}.json"]


def test_a_worker_that_has_its_parent_is_left_alone(gateway: Gateway, tmp_path: Path) -> None:
    """Even where its gateway seems to have begun at another time, as after the clock was set."""
    path = tmp_path / f"{gateway.worker.pid}.json"
    note = msgspec.json.decode(path.read_bytes(), type=WorkerNote)
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(note, gateway_started_unix_s=1.0)))
    assert end_orphans(tmp_path) == []
    assert not has_ended(gateway.worker)


def test_a_process_that_is_no_worker_is_left_alone(tmp_path: Path) -> None:
    """A note that names a stranger, with its very start, does not get it killed."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stranger:
        note_worker(stranger.pid, tmp_path)
        path = tmp_path / f"{stranger.pid}.json"
        note = msgspec.json.decode(path.read_bytes(), type=WorkerNote)
        gone = msgspec.structs.replace(note, gateway_started_unix_s=1.0)
        path.write_bytes(msgspec.json.encode(gone))
        assert end_orphans(tmp_path) == []
        assert stranger.poll() is None
        stranger.kill()


def test_a_worker_is_known_by_when_it_began(gateway: Gateway, tmp_path: Path) -> None:
    """One whose id the note's worker had before is another: it lives, and the note goes."""
    gateway.kill()
    path = tmp_path / f"{gateway.worker.pid}.json"
    note = msgspec.json.decode(path.read_bytes(), type=WorkerNote)
    earlier = msgspec.structs.replace(note, started_unix_s=note.started_unix_s - 3600)
    assert is_orphan(note)
    assert not is_orphan(earlier)
    path.write_bytes(msgspec.json.encode(earlier))
    assert end_orphans(tmp_path) == []
    assert not has_ended(gateway.worker)
    assert not path.exists()


def test_a_worker_of_another_gateway_is_left_alone(gateway: Gateway, tmp_path: Path) -> None:
    """Its command line names the gateway that it belongs to, and a note with another one lies."""
    gateway.kill()
    path = tmp_path / f"{gateway.worker.pid}.json"
    note = msgspec.json.decode(path.read_bytes(), type=WorkerNote)
    assert not is_orphan(msgspec.structs.replace(note, gateway_pid=note.gateway_pid + 1))


def test_notes_that_cannot_be_read_or_written_stop_nobody(tmp_path: Path) -> None:
    """Damaged ones go; where none can be written, the worker runs without."""
    (tmp_path / "1.json").write_text("{")
    assert end_orphans(tmp_path) == []
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    note_worker(os.getpid(), tmp_path / "file" / "workers")
    forget_worker(os.getpid(), tmp_path / "file" / "workers")
