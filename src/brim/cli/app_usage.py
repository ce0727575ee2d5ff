"""What apps used, as `brim apps` shows it: the files of usage beside the budgets of manifests."""

import time
from collections.abc import Iterable
from pathlib import Path

import msgspec

from brim.apps.day import day_of, days_before, renews_in_s
from brim.apps.registry import Entry
from brim.apps.usage import FILE_NAME, Spent, UsageLine, read_reserved, read_usage


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """Where one app stands today; a budget of None is no bound."""

    name: str
    day: str
    renews_in_s: float
    num_requests: int
    num_refused: int
    used_tokens: int
    reserved_tokens: int
    """That running requests may still use."""
    budget_tokens: int | None
    used_energy_j: float
    budget_energy_j: float | None
    ssd_written_bytes: int
    budget_ssd_write_bytes: int | None


def standings(entries: Iterable[Entry], directory: Path) -> list[Standing]:
    """Where each app stands today, as far as the file says: a second behind a running server."""
    now = time.time()
    today = day_of(now)
    spent: dict[str, Spent] = {}
    for line in read_usage(directory / FILE_NAME, since_day=today):
        if line.day == today:
            spent[line.app] = spent.get(line.app, Spent()) + line.spent
    reserved = read_reserved(directory / FILE_NAME)
    return [
        _standing(
            entry, spent.get(entry.app.name, Spent()), reserved.get((entry.app.name, today), 0), now
        )
        for entry in entries
    ]


def lines_of(directory: Path, *, num_days: int, app: str | None) -> list[UsageLine]:
    """What was used in the last days, today included, newest first."""
    since = days_before(day_of(time.time()), num_days - 1)
    return read_usage(directory / FILE_NAME, since_day=since, app=app)


def _standing(entry: Entry, spent: Spent, reserved_tokens: int, now: float) -> Standing:
    budgets = entry.app.budgets
    return Standing(
        name=entry.app.name,
        day=day_of(now),
        renews_in_s=round(renews_in_s(now), 1),
        num_requests=spent.num_requests,
        num_refused=spent.num_refused,
        used_tokens=spent.num_tokens,
        reserved_tokens=reserved_tokens,
        budget_tokens=budgets.tokens,
        used_energy_j=spent.energy_j,
        budget_energy_j=budgets.energy_j,
        ssd_written_bytes=spent.ssd_write_bytes,
        budget_ssd_write_bytes=budgets.ssd_write_bytes,
    )
