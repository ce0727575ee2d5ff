"""The machine's account as commands see it: the book that all brim processes share, and servers.

Each process keeps its own account and writes what it was granted into the book; the weights that
one has mapped look like free memory to everybody else.
"""

import contextlib
import http.client
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any

import msgspec

from brim.cli.state import ServerState
from brim.config import places
from brim.core.machine import MachineSpec
from brim.core.memory import MemoryTerms
from brim.core.plan import Grant, Plan
from brim.core.stance import Stance
from brim.errors import BrimError
from brim.ledger.account import Account
from brim.ledger.book import Book, Page, beside
from brim.ledger.entry import Statement
from brim.ledger.history import ForecastHistory
from brim.machine.reading import read_machine
from brim.runtime.api import ModelStatus
from brim.telemetry.events import log_event


def grant_book() -> Book:
    """Where all brim processes of this user write what they were granted."""
    return Book(places.runtime_directory() / "grants.json")


def has_neighbours() -> bool:
    """Whether another process of brim holds memory for a model."""
    with _opened(grant_book()) as page:
        return page is None or bool(page.others())


def forecast_history() -> ForecastHistory:
    """Where loads of all sessions keep what they were forecast to take and took."""
    return ForecastHistory(history_directory() / "forecasts.sqlite")


def history_directory() -> Path:
    """The platform's directory for state that outlives a reboot."""
    import platformdirs

    return platformdirs.user_state_path("brim", appauthor=False)


def machine_beside_servers() -> MachineSpec:
    """A fresh reading in which what other brim processes were granted counts as used."""
    with _opened(grant_book()) as page:
        return _read(page)


@contextlib.contextmanager
def granted(name: str, wanted: Plan | MemoryTerms, *, force: bool = False) -> Iterator[Grant]:
    """Hold a grant for a model that this very process loads, where servers see it.

    Args:
        name: The model's name.
        wanted: How it is loaded, or its bytes alone.
        force: Hold it even where it does not fit.

    Raises:
        DoesNotFit: There is no room beside what others were granted.
        Busy: Another process keeps the book locked.
    """
    book, account = grant_book(), Account()
    with _opened(book) as page:
        grant = account.grant(name, wanted, _read(page), force=force)
        if page is not None:
            page.write(account.promises())
    try:
        yield grant
    finally:
        book.erase()


def _read(page: Page | None) -> MachineSpec:
    machine = read_machine()
    return machine if page is None else beside(machine, page.others())


@contextlib.contextmanager
def _opened(book: Book) -> Iterator[Page | None]:
    """The locked book; None where its file cannot be used, since a reading alone needs no file."""
    try:
        page = book.open()
    except OSError as exc:
        log_event("ledger_book_unusable", reason=exc)
        yield None
        return
    with page:
        yield page


def statuses_of(server: ServerState, *, within_s: float) -> list[ModelStatus]:
    """What a server says of its models.

    Raises:
        BrimError: It does not answer, or not as a server of this version does.
    """
    found: list[ModelStatus] = _asked(server, "/brim/ps", list[ModelStatus], within_s)
    return found


def statement_of(server: ServerState, *, within_s: float) -> Statement | None:
    """A server's account of the machine's memory; None where nothing was asked of it yet.

    Raises:
        BrimError: As for `statuses_of`.
    """
    found: Statement | None = _asked(server, "/brim/ledger", Statement | None, within_s)
    return found


def stance_of(server: ServerState, *, within_s: float) -> Stance:
    """What a server's governor allows at the moment.

    Raises:
        BrimError: As for `statuses_of`.
    """
    found: Stance = _asked(server, "/brim/stance", Stance, within_s)
    return found


def operator_headers(server: ServerState) -> dict[str, str]:
    """The header that tells a server that its own user asks."""
    if not server.operator_token:
        return {}
    return {"Authorization": f"Bearer {server.operator_token}"}


def _asked(server: ServerState, path: str, kind: type | UnionType, within_s: float) -> Any:
    # Not urllib's opener, which would send a request to this machine through a proxy.
    address = urllib.parse.urlsplit(server.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=within_s)
    try:
        connection.request("GET", path, headers=operator_headers(server))
        response = connection.getresponse()
        body = response.read()
        if response.status != 200:
            raise BrimError(f"the server on {server.url} answers {response.status}; restart it")
        return msgspec.json.decode(body, type=kind)
    except (OSError, http.client.HTTPException, msgspec.DecodeError) as exc:
        raise BrimError(
            f"the server on {server.url} (pid {server.pid}) gives no answer ({exc}); "
            "try again, or stop it with: brim stop"
        ) from exc
    finally:
        connection.close()
