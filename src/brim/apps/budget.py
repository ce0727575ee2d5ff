"""One app's day against its budgets: what is left, why a request is refused, and what is news.

Pure: the meter gives the time, and keeps the days.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from brim.apps.day import in_words, renews_in_s
from brim.core.app import App
from brim.core.event import Event, EventKind
from brim.errors import BrimError, OverBudget, RateLimited

TIGHT_FRACTION = 0.8
"""Of a budget: from here on the app is told that it gets tight."""

SOON_S = 5.0
"""When to ask again where requests of the same app have to end first: most take seconds."""


@dataclass(slots=True)
class Day:
    """One app's use of one day."""

    used_tokens: int
    energy_j: float
    ssd_written_bytes: int
    reserved_tokens: int = 0
    """That running requests may still use."""
    told: set[tuple[str, EventKind]] = field(default_factory=set)
    """News of it that are none any more."""


@dataclass(frozen=True, slots=True)
class Use:
    """What was used of one budget."""

    budget: str
    """Its name in events, unit included."""
    used: float
    limit: float
    words: str
    divisor: float
    digits: int

    def __str__(self) -> str:
        used, limit = (
            f"{figure / self.divisor:,.{self.digits}f}" for figure in (self.used, self.limit)
        )
        return f"{used} of its {limit} {self.words}"

    @property
    def is_all(self) -> bool:
        """Whether nothing is left."""
        return self.used >= self.limit


def uses(app: App, day: Day) -> Iterator[Use]:
    """All that the app has a budget for: tokens, energy, writes."""
    budgets = app.budgets
    if budgets.tokens is not None:
        yield Use("tokens", day.used_tokens, budgets.tokens, "tokens", 1, 0)
    if budgets.energy_j is not None:
        yield Use("energy_j", day.energy_j, budgets.energy_j, "Wh", 3600, 2)
    if budgets.ssd_write_bytes is not None:
        written = day.ssd_written_bytes
        yield Use("ssd_write_bytes", written, budgets.ssd_write_bytes, "GB of writes", 1e9, 2)


def left_tokens(app: App, day: Day) -> int:
    """Tokens that no request has used or may still use; below 0 where a budget was lowered."""
    assert app.budgets.tokens is not None
    return app.budgets.tokens - day.used_tokens - day.reserved_tokens


def exhausted(app: App, day: Day, now_unix_s: float) -> OverBudget | None:
    """Why no request of the app is taken at all; None where one is."""
    for use in uses(app, day):
        # Writes refuse nothing: prompts stay in memory.
        if use.is_all and use.budget != "ssd_write_bytes":
            return _over(app, use, now_unix_s)
    return None


def no_room(app: App, day: Day, needed: int, now_unix_s: float) -> BrimError:
    """Why a request of this many tokens has no room in the budget, and when it will."""
    budget = app.budgets.tokens
    assert budget is not None
    if day.used_tokens + needed <= budget:
        return RateLimited(
            f"app '{app.name}' has {budget - day.used_tokens:,} tokens left today, of which "
            f"{day.reserved_tokens:,} are promised to its running requests; this one needs "
            f"{needed:,}: send it when one of them has ended",
            retry_after_s=SOON_S,
        )
    return _over(app, next(uses(app, day)), now_unix_s, f", and this request needs {needed:,}")


def news(app: App, day: Day, now_unix_s: float) -> list[Event]:
    """What the app has to be told of its budgets and was not yet; from now on it was."""
    found = []
    for use, kind in _facts(app, day):
        if (use.budget, kind) not in day.told:
            day.told |= {(use.budget, kind), (use.budget, EventKind.BUDGET_TIGHTENING)}
            found.append(_event(app, use, kind, now_unix_s))
    return found


def note_told(app: App, day: Day) -> None:
    """What an earlier server has said of a day is no news."""
    news(app, day, 0.0)


def _facts(app: App, day: Day) -> Iterator[tuple[Use, EventKind]]:
    """The worst of each budget that is tight or used up."""
    for use in uses(app, day):
        if use.is_all:
            yield use, EventKind.BUDGET_EXHAUSTED
        elif use.used >= TIGHT_FRACTION * use.limit:
            yield use, EventKind.BUDGET_TIGHTENING


def _event(app: App, use: Use, kind: EventKind, now_unix_s: float) -> Event:
    return Event(
        at_unix_s=now_unix_s,
        kind=kind,
        app=app.name,
        cause=f"it has used {use} of today",
        detail={
            "budget": use.budget,
            "used": use.used,
            "limit": use.limit,
            "renews_in_s": round(renews_in_s(now_unix_s), 1),
        },
    )


def _over(app: App, use: Use, now_unix_s: float, needs: str = "") -> OverBudget:
    wait_s = renews_in_s(now_unix_s)
    return OverBudget(
        f"app '{app.name}' has used {use} of today{needs}; the budget renews at 00:00 UTC, in "
        f"{in_words(wait_s)}",
        retry_after_s=wait_s,
    )
