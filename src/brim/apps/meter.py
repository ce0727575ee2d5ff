"""What an app may still do: budgets of the day, requests at once and in a minute, share of memory.

All of it is arithmetic on the event loop's thread; `usage.UsageStore` writes behind it.  Tokens are
exact: what was used and what running requests may use are never more than the budget, over restarts
and crashes.  Energy and bytes written are measured after the fact, so the request that crosses the
bound is the last one.

A request belongs to the day in which it began; at midnight, UTC, an app has its whole budget again.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import msgspec

from brim.apps.budget import (
    SOON_S,
    Day,
    exhausted,
    left_tokens,
    news,
    no_room,
    note_told,
)
from brim.apps.day import day_of, days_before, in_words, renews_in_s
from brim.apps.usage import Reservation, Spent, UsageStore
from brim.core.app import App
from brim.core.event import Event
from brim.errors import (
    BrimError,
    ContextOverflow,
    InvalidRequest,
    RateLimited,
    Unauthenticated,
    Unsupported,
)

MINUTE_S = 60.0

Figure = TypeVar("Figure", int, float)


class Apps(Protocol):
    """Where apps are looked up; `Registry` is one."""

    def get(self, name: str) -> App | None:
        """The app of this name; None where there is none, or no longer."""
        ...


class Left(msgspec.Struct, frozen=True, kw_only=True):
    """Where an app stands today; None where there is no bound."""

    day: str
    renews_in_s: float
    used_tokens: int
    reserved_tokens: int
    """That running requests may still use, beside what they are known to."""
    left_tokens: int | None
    used_energy_j: float
    left_energy_j: float | None
    ssd_written_bytes: int
    left_ssd_write_bytes: int | None
    num_in_flight: int


@dataclass(slots=True)
class _Running:
    number: int
    reservation: Reservation
    kv_tokens: int


@dataclass(slots=True)
class _Now:
    """What one app does at the moment."""

    num_entered: int = 0
    entered_s: deque[float] = field(default_factory=deque)
    """When its requests of the last minute came."""
    running: dict[str, _Running] = field(default_factory=dict)


class Meter:
    """Counts and bounds what apps use; "" is nobody in particular: no bounds, no record.

    Not thread-safe: on the event loop's thread alone.

    Args:
        apps: Where an app's budgets and limits are looked up, each time: they may change.
        usage: What outlives the process.
        on_event: Told when a budget gets tight and when it is used up; called on the same thread.
        clock: Monotonic seconds.
        now: Unix seconds.
    """

    def __init__(
        self,
        apps: Apps,
        usage: UsageStore,
        *,
        on_event: Callable[[Event], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._apps = apps
        self._usage = usage
        self._on_event = on_event
        self._clock = clock
        self._now = now
        self._days: dict[tuple[str, str], Day] = {}
        self._today = ""
        self._in_work: dict[str, _Now] = {}

    def enter(self, app: str) -> None:
        """Take one more request of an app in; `leave` when it is over, however it ends.

        Raises:
            Unauthenticated: The app was removed meanwhile.
            OverBudget: Its tokens or its energy of today are used up.
            RateLimited: It has as many requests in work, or came as often in the last minute, as it
                may.
        """
        if not app:
            return
        known = self._apps.get(app)
        if known is None:
            raise Unauthenticated(f"the app '{app}' was removed; ask the operator for a new key")
        now = self._now_of(app)
        try:
            day = self._day_of(app)
            if refusal := exhausted(known, day, self._now()):
                self._tell(app, day)
                raise refusal
            self._check_limits(known, now)
        except BrimError:
            self._note_refusal(app)
            raise
        now.num_entered += 1
        if known.limits.requests_per_minute is not None:
            now.entered_s.append(self._clock())

    def leave(self, app: str) -> None:
        """A request that was taken in is over."""
        if app:
            self._now_of(app).num_entered -= 1

    def answer_bound(
        self, app: str, *, num_prompt_tokens: int, num_choices: int, max_tokens: int
    ) -> int:
        """Most tokens of each choice that the app's context and budget leave, up to `max_tokens`.

        Raises:
            ContextOverflow: The prompt alone fills the context that the app's manifest grants.
            RateLimited: What is left is promised to requests in work.
            OverBudget: Not even one token is left for each choice.
        """
        known = self._apps.get(app) if app else None
        if known is None:
            return max_tokens
        try:
            bound = min(max_tokens, _context_left(known, num_prompt_tokens))
            if known.budgets.tokens is None:
                return bound
            day = self._day_of(app)
            room = (left_tokens(known, day) - num_prompt_tokens) // num_choices
            if room < 1:
                raise no_room(known, day, num_prompt_tokens + num_choices, self._now())
            return min(bound, room)
        except BrimError:
            self._note_refusal(app)
            raise

    def check_share(self, app: str, *, model: str, kv_tokens: int, pool_tokens: int) -> None:
        """Refuse a request that would have the app hold more of a model's pool than its share.

        Raises:
            InvalidRequest: It alone is over the share; waiting does not help.
            RateLimited: It is, beside those of the app that run.
        """
        known = self._apps.get(app) if app else None
        if known is None or known.limits.memory_share >= 1:
            return
        share = int(known.limits.memory_share * pool_tokens)
        held = sum(
            each.kv_tokens
            for each in self._now_of(app).running.values()
            if each.reservation.model == model
        )
        if held + kv_tokens <= share:
            return
        self._note_refusal(app)
        of_it = f"{known.limits.memory_share:.0%} of the memory of '{model}', {share} tokens"
        if kv_tokens > share:
            raise InvalidRequest(
                f"the request needs {kv_tokens} tokens of memory and app '{app}' may hold {of_it}; "
                "shorten the prompt, lower max_tokens, or have its operator raise "
                "limits.memory_share",
                param="max_tokens",
            )
        raise RateLimited(
            f"app '{app}' may hold {of_it}, and its running requests hold {held}; this one needs "
            f"{kv_tokens}: send it when one of them has ended",
            retry_after_s=SOON_S,
        )

    def check_kv_quality(self, app: str, *, model: str, kv_type_k: str, kv_type_v: str) -> None:
        """Refuse a model whose KV is kept less exactly than the app accepts.

        Raises:
            Unsupported: It is.
        """
        known = self._apps.get(app) if app else None
        if known is None or known.kv_quality is None or known.accepts_kv(kv_type_k, kv_type_v):
            return
        self._note_refusal(app)
        kept = kv_type_k if kv_type_k == kv_type_v else f"{kv_type_k}/{kv_type_v}"
        raise Unsupported(
            f"app '{app}' accepts a KV cache of {known.kv_quality.value} or better, and '{model}' "
            f"keeps its as {kept}; ask for another model, or have the operator lower kv_quality",
            param="model",
        )

    def begin(
        self,
        app: str,
        request_id: str,
        *,
        model: str,
        num_prompt_tokens: int,
        max_completion_tokens: int,
        kv_tokens: int,
    ) -> None:
        """Reserve what a request may use; `end` it once, however it ends.

        Args:
            app: Whose it is.
            request_id: Unique among the app's requests in work.
            model: Which model works on it.
            num_prompt_tokens: Tokens that are read.
            max_completion_tokens: Most tokens of all its choices together.
            kv_tokens: Cells of the model's pool that it may hold.

        Raises:
            RateLimited, OverBudget: Others of the app have taken what `answer_bound` saw.
        """
        known = self._apps.get(app) if app else None
        if not app:
            return
        day, wanted = self._day_of(app), num_prompt_tokens + max_completion_tokens
        if known is not None and known.budgets.tokens is not None:
            if wanted > left_tokens(known, day):
                self._note_refusal(app)
                raise no_room(known, day, wanted, self._now())
        running = self._now_of(app).running
        assert request_id not in running, "a request begins once"
        reservation = Reservation(
            app=app,
            day=self._today,
            model=model,
            num_prompt_tokens=num_prompt_tokens,
            max_completion_tokens=max_completion_tokens,
        )
        day.reserved_tokens += wanted
        running[request_id] = _Running(self._usage.begin(reservation), reservation, kv_tokens)

    def end(
        self,
        app: str,
        request_id: str,
        *,
        num_completion_tokens: int,
        num_cached_tokens: int = 0,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Count what a request used in the place of what it might have; a second time is nothing.

        Args:
            app: Whose it is.
            request_id: Which one.
            num_completion_tokens: Written, of all its choices.
            num_cached_tokens: Of its prompt: not computed.
            num_prompt_tokens: Of its prompt: read, where it ended before all of it was.
        """
        ended = self._now_of(app).running.pop(request_id, None) if app else None
        if ended is None:
            return
        reservation = ended.reservation
        if num_prompt_tokens is None:
            num_prompt_tokens = reservation.num_prompt_tokens
        spent = Spent(
            num_requests=1,
            num_prompt_tokens=num_prompt_tokens,
            num_cached_tokens=num_cached_tokens,
            num_completion_tokens=num_completion_tokens,
        )
        self._usage.end(ended.number, reservation, spent)
        day = self._day(app, reservation.day)
        day.reserved_tokens -= reservation.num_prompt_tokens + reservation.max_completion_tokens
        day.used_tokens += spent.num_tokens
        if reservation.day == self._today:
            self._tell(app, day)

    def keeps_on_disk(self, app: str) -> bool:
        """Whether prompts of the app may still be written to disk today."""
        known = self._apps.get(app) if app else None
        if known is None or known.budgets.ssd_write_bytes is None:
            return True
        return self._day_of(app).ssd_written_bytes < known.budgets.ssd_write_bytes

    def note_written(self, app: str, num_bytes: int) -> None:
        """KV of the app's prompts was written to disk."""
        if app:
            day = self._day_of(app)
            day.ssd_written_bytes += num_bytes
            self._usage.note(app, self._today, Spent(ssd_write_bytes=num_bytes))
            self._tell(app, day)

    def note_energy(self, app: str, joules: float) -> None:
        """The app's requests took energy."""
        if app:
            day = self._day_of(app)
            day.energy_j += joules
            self._usage.note(app, self._today, Spent(energy_j=joules))
            self._tell(app, day)

    def left(self, app: str) -> Left:
        """Where the app stands now; an app that is not known has no bounds."""
        known = self._apps.get(app) or App(name=app)
        day, budgets = self._day_of(app), known.budgets
        return Left(
            day=self._today,
            renews_in_s=renews_in_s(self._now()),
            used_tokens=day.used_tokens,
            reserved_tokens=day.reserved_tokens,
            left_tokens=None if budgets.tokens is None else max(0, left_tokens(known, day)),
            used_energy_j=day.energy_j,
            left_energy_j=_rest(budgets.energy_j, day.energy_j),
            ssd_written_bytes=day.ssd_written_bytes,
            left_ssd_write_bytes=_rest(budgets.ssd_write_bytes, day.ssd_written_bytes),
            num_in_flight=self._now_of(app).num_entered,
        )

    def close(self) -> None:
        """Write what is left; requests that still run count in full at the next start."""
        self._usage.close()

    def _check_limits(self, app: App, now: _Now) -> None:
        limits = app.limits
        if limits.max_concurrent is not None and now.num_entered >= limits.max_concurrent:
            raise RateLimited(
                f"app '{app.name}' has {now.num_entered} requests in work and may have "
                f"{limits.max_concurrent}; wait for one of them",
                retry_after_s=SOON_S,
            )
        if limits.requests_per_minute is None:
            now.entered_s.clear()
            return
        oldest_s = self._clock() - MINUTE_S
        while now.entered_s and now.entered_s[0] <= oldest_s:
            now.entered_s.popleft()
        if len(now.entered_s) >= limits.requests_per_minute:
            # The one whose end of its minute makes room; earlier ones may be over the limit where
            # the limit was lowered.
            wait_s = now.entered_s[-limits.requests_per_minute] - oldest_s
            raise RateLimited(
                f"app '{app.name}' sent {len(now.entered_s)} requests in the last minute and may "
                f"send {limits.requests_per_minute}; try again in {in_words(wait_s)}",
                retry_after_s=wait_s,
            )

    def _tell(self, app: str, day: Day) -> None:
        """Hand on what is new of the app's budgets."""
        known = self._apps.get(app)
        for event in () if known is None else news(known, day, self._now()):
            if self._on_event is not None:
                self._on_event(event)

    def _note_refusal(self, app: str) -> None:
        self._day_of(app)
        self._usage.note(app, self._today, Spent(num_refused=1))

    def _now_of(self, app: str) -> _Now:
        return self._in_work.setdefault(app, _Now())

    def _day_of(self, app: str) -> Day:
        """The app's use of today."""
        today = day_of(self._now())
        if today != self._today:
            self._today = today
            self._forget(days_before(today, 1))
        return self._day(app, today)

    def _day(self, app: str, name: str) -> Day:
        day = self._days.get((app, name))
        if day is None:
            spent = self._usage.spent(app, name)
            day = Day(spent.num_tokens, spent.energy_j, spent.ssd_write_bytes)
            if known := self._apps.get(app):
                note_told(known, day)
            self._days[app, name] = day
        return day

    def _forget(self, yesterday: str) -> None:
        """Drop days that nothing can be added to any more.

        Yesterday stays: a clock that is set back must not find the file, which is behind.
        """
        self._days = {
            key: day
            for key, day in self._days.items()
            if key[1] >= yesterday or day.reserved_tokens
        }


def _rest(budget: Figure | None, used: Figure) -> Figure | None:
    return None if budget is None else max(budget - used, budget - budget)


def _context_left(app: App, num_prompt_tokens: int) -> int:
    """Tokens of an answer for which the app's context has room.

    Raises:
        ContextOverflow: None.
    """
    if app.max_context_tokens is None:
        return num_prompt_tokens + 2**62
    left = app.max_context_tokens - num_prompt_tokens
    if left < 1:
        raise ContextOverflow(
            f"the prompt is {num_prompt_tokens} tokens, and app '{app.name}' may have a context of "
            f"{app.max_context_tokens}; shorten it by {1 - left}, or have its operator raise "
            "context.max_tokens",
            param="messages",
        )
    return left
