"""Grants that other processes see: in order, and safe from whoever leaves in the middle."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from support.serving import MACHINE, toy_plan

from brim.core.machine import MachineSpec
from brim.core.memory import MemoryTerms
from brim.core.plan import Plan, Verdict
from brim.errors import DoesNotFit
from brim.ledger.account import Account
from brim.ledger.book import Book
from brim.ledger.history import ForecastHistory
from brim.planner.fit import Room
from brim.runtime import granter as granter_module
from brim.runtime.forecast_errors import subject_of
from brim.runtime.granter import Granter

pytestmark = pytest.mark.anyio

GB = 10**9


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "brim" / "grants.json"


@pytest.fixture
def history() -> Iterator[ForecastHistory]:
    history = ForecastHistory(None)
    yield history
    history.close()


def plan(weights_bytes: int, name: str = "toy") -> Plan:
    memory = MemoryTerms(weights_bytes=weights_bytes, kv_bytes=0, compute_bytes=0, overhead_bytes=0)
    return msgspec.structs.replace(toy_plan(name), memory=memory)


def granter(account: Account, history: ForecastHistory, book: Book | None) -> Granter:
    return Granter(account, read_machine=lambda: MACHINE, book=book, history=history, fit=None)


async def test_a_grant_is_written_and_a_release_takes_it_out(
    path: Path, history: ForecastHistory
) -> None:
    """What the account charges is what other processes read."""
    account = Account()
    ours = granter(account, history, Book(path))
    answer = (await ours.grant(plan(5 * GB), force=False))[1]
    assert answer.verdict is Verdict.COMFORTABLE
    other = Book(path, pid=os.getppid())

    def seen() -> list[tuple[str, int]]:
        with other.open() as page:
            return [(each.name, each.num_bytes) for each in page.others()]

    assert seen() == account.promises() == [("toy", 5 * GB)]
    await ours.release("toy")
    assert seen() == []


async def test_what_others_were_granted_is_not_granted_again(
    path: Path, history: ForecastHistory
) -> None:
    """A neighbour's bytes count, in a trial and in a grant, but for those who ask without them."""
    with Book(path, pid=os.getppid()).open() as page:
        page.write([("theirs", 500 * GB)])
    ours = granter(Account(), history, Book(path))
    with pytest.raises(DoesNotFit):
        await ours.grant(plan(5 * GB), force=False)
    assert (await ours.trial(plan(5 * GB))).verdict is Verdict.NO
    assert (await ours.trial(plan(5 * GB), others_bytes=0)).verdict is Verdict.COMFORTABLE
    assert ours.statement() is not None


async def test_without_others_the_gpu_is_ours_again(path: Path, history: ForecastHistory) -> None:
    """What other servers have of the GPU's limit comes back when they end: waiting helps."""
    with Book(path, pid=os.getppid()).open() as page:
        page.write([("theirs", 500 * GB)])
    machine = msgspec.structs.replace(MACHINE, gpu_limit_bytes=10 * GB)
    ours = Granter(
        Account(), read_machine=lambda: machine, book=Book(path), history=history, fit=None
    )
    assert (await ours.trial(plan(5 * GB))).verdict is Verdict.NO
    assert (await ours.trial(plan(5 * GB), others_bytes=0)).verdict is Verdict.COMFORTABLE


async def test_who_leaves_while_waiting_for_the_book_does_not_keep_it(
    path: Path, history: ForecastHistory
) -> None:
    """A lock that comes after its waiter has gone is given back at once."""
    held = Book(path).open()
    ours = granter(Account(), history, Book(path))
    waiting = asyncio.ensure_future(ours.refresh())
    for _ in range(3):
        await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    held.close()
    await ours.refresh()
    Book(path).open().close()


async def test_a_book_that_cannot_be_used_does_not_stop_a_server(
    tmp_path: Path, history: ForecastHistory, capsys: pytest.CaptureFixture[str]
) -> None:
    """Grants go on by the reading alone, and an event says why."""
    (tmp_path / "file").write_text("")
    ours = granter(Account(), history, Book(tmp_path / "file" / "grants.json"))
    assert (await ours.grant(plan(5 * GB), force=False))[1].verdict is Verdict.COMFORTABLE
    assert "ledger_book_unusable" in capsys.readouterr().err


async def test_a_model_that_is_asked_for_again_and_again_keeps_its_correction(
    history: ForecastHistory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the refusals of a minute one ages it: clients that try again wear nothing out."""
    wish = plan(11 * GB)
    subject = subject_of(wish, MACHINE)
    history.record(subject, "load", {"weights_bytes": (11 * GB, 20 * GB)})
    ours = granter(Account(), history, None)
    for _ in range(3):
        with pytest.raises(DoesNotFit):
            await ours.grant(wish, force=False)
    assert history.past_errors(subject).num_refused == 1
    monkeypatch.setattr(granter_module, "REFUSAL_PERIOD_S", 0.0)
    ours = granter(Account(), history, None)
    for _ in range(3):
        with pytest.raises(DoesNotFit):
            await ours.grant(wish, force=False)
    assert history.past_errors(subject).num_refused == 4


async def test_a_wish_that_fits_is_kept_and_another_suited_to_the_room(
    history: ForecastHistory,
) -> None:
    """Only what does not fit comfortably is made smaller, by the room that past errors leave."""
    rooms: list[Room] = []

    def fit(wish: Plan, machine: MachineSpec, room: Room) -> Plan:
        rooms.append(room)
        return plan(room.comfortable_bytes)

    account = Account()
    ours = Granter(account, read_machine=lambda: MACHINE, book=None, history=history, fit=fit)
    wish = plan(11 * GB)
    assert (await ours.grant(wish, force=False))[0] is wish
    account.release("toy")
    suited, answer, _ = await ours.grant(plan(12 * GB), force=False)
    assert rooms == [Room(int(11.2 * GB), 12 * GB)]
    assert (suited.memory.total_bytes, answer.verdict) == (int(11.2 * GB), Verdict.COMFORTABLE)


async def test_kv_on_its_way_to_the_disk_is_charged_out_of_what_is_left(
    path: Path, history: ForecastHistory
) -> None:
    """At most a part of the room is set aside, account and book count it, a release frees it."""
    account = Account()
    ours = granter(account, history, Book(path))
    await ours.grant(plan(5 * GB), force=False)
    left_bytes = account.room(MACHINE).comfortable_bytes
    assert await ours.reserve_writes("toy", 10**6) == 10**6
    with Book(path, pid=os.getppid()).open() as page:
        assert sum(line.num_bytes for line in page.others()) == account.charged_bytes
    assert account.charged_bytes == 5 * GB + 10**6
    statement = ours.statement()
    assert statement is not None
    assert statement.prefix_cache_bytes == 10**6
    await ours.grant(plan(GB, "other"), force=False)
    most = await ours.reserve_writes("other", 10**15)
    assert most == (left_bytes - 10**6 - GB) // granter_module.WRITES_PART
    await ours.release("toy")
    await ours.release("other")
    assert account.charged_bytes == 0


async def test_a_full_machine_sets_nothing_aside_for_writes(history: ForecastHistory) -> None:
    """A model that was forced in is loaded all the same, and keeps nothing on disk."""
    account = Account()
    ours = granter(account, history, None)
    await ours.grant(plan(50 * GB), force=True)
    assert await ours.reserve_writes("toy", 10**6) == 0
    assert account.charged_bytes == 50 * GB
