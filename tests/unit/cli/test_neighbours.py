"""The machine's account as commands see it."""

import os
from pathlib import Path

import pytest

from brim.cli.neighbours import granted, machine_beside_servers
from brim.cli.serving import fitted
from brim.config.tree import Settings
from brim.core.machine import MachineSpec
from brim.core.memory import MemoryTerms
from brim.errors import DoesNotFit
from brim.ledger.book import Book
from brim.machine.reading import read_machine
from brim.planner.fit import Room

TERMS = MemoryTerms(weights_bytes=1000, kv_bytes=0, compute_bytes=0, overhead_bytes=0)
HUGE = 10**15


def neighbour(directory: Path) -> Book:
    """The book as the process that started these tests would hold it."""
    return Book(directory / "grants.json", pid=os.getppid())


def seen(book: Book) -> list[tuple[str, int]]:
    with book.open() as page:
        return [(each.name, each.num_bytes) for each in page.others()]


def test_a_model_that_a_command_loads_is_seen_while_it_is_loaded(own_directories: Path) -> None:
    """Other processes count it from the grant to the end, however the command ends."""
    book = neighbour(own_directories)
    with pytest.raises(KeyError), granted("bench", TERMS):
        assert seen(book) == [("bench", 1000)]
        raise KeyError
    assert seen(book) == []


def test_a_command_gets_nothing_that_a_server_has(own_directories: Path) -> None:
    """What others were granted is not granted again, unless it is forced, and never stays."""
    book = neighbour(own_directories)
    with book.open() as page:
        page.write([("theirs", HUGE)])
    assert machine_beside_servers().others_bytes > HUGE // 2
    with pytest.raises(DoesNotFit), granted("bench", TERMS):
        pytest.fail("it was granted")
    with granted("bench", TERMS, force=True) as grant:
        assert grant.short_bytes > 0
    assert seen(book) == []


def test_a_book_that_cannot_be_used_leaves_the_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A command still runs where no directory is ours, and says what it does without."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("brim.config.places.runtime_directory", lambda: tmp_path / "file" / "brim")
    assert machine_beside_servers().ram_bytes == read_machine().ram_bytes
    with granted("bench", TERMS):
        pass
    assert "ledger_book_unusable" in capsys.readouterr().err


@pytest.mark.parametrize("num_mib", [10_000, 250, 150, 0])
def test_a_fitted_plan_is_never_more_than_the_wish(num_mib: int) -> None:
    """Whatever room there is: no longer context, no more bytes; the wish itself where none fits."""
    from brim.cli.planning import plan_model

    machine = MachineSpec(name="m", system="linux", ram_bytes=2**34, others_bytes=2**32)
    wish = plan_model("demo", machine, Settings())
    room = Room(num_mib * 2**20, num_mib * 2**20)
    plan = fitted(wish, machine, room)
    assert plan.context_tokens <= wish.context_tokens
    assert plan.memory.total_bytes <= wish.memory.total_bytes
    assert plan is wish or plan.memory.total_bytes <= room.tight_bytes
