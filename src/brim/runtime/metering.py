"""What requests cost the apps that sent them: told to a meter exactly once, however they end."""

from typing import Protocol

from brim.core.answer import Delta
from brim.core.plan import Plan
from brim.core.request import Request
from brim.runtime.energy_share import EnergyShare
from brim.worker.protocol import Stats

APP_OWNER = "app:"
"""Begins the cache owner of an app's prefixes; its name follows."""


class Meter(Protocol):
    """Bounds and records what apps use; `brim.apps.meter.Meter` does, on a database.

    A seam of ten calls, rather than that class: whoever embeds a gateway may count in another way,
    and what is promised below, that each request is told exactly once, is tested with a meter that
    fails where one is told twice.  An app without a name is nobody in particular: no bounds, no
    record.
    """

    def enter(self, app: str) -> None:
        """One more request; RateLimited or OverBudget where there may be none."""

    def leave(self, app: str) -> None:
        """One that had entered is over."""

    def answer_bound(
        self, app: str, *, num_prompt_tokens: int, num_choices: int, max_tokens: int
    ) -> int:
        """What the app's budget leaves of an answer; OverBudget where it is nothing."""
        ...

    def check_share(self, app: str, *, model: str, kv_tokens: int, pool_tokens: int) -> None:
        """RateLimited where the app would hold more of a pool than it may."""

    def check_kv_quality(self, app: str, *, model: str, kv_type_k: str, kv_type_v: str) -> None:
        """Unsupported where a model keeps its KV less exactly than the app accepts."""

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
        """A request was started."""

    def end(
        self,
        app: str,
        request_id: str,
        *,
        num_completion_tokens: int,
        num_cached_tokens: int = 0,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """One that had begun is over; None is the whole of its prompt."""

    def keeps_on_disk(self, app: str) -> bool:
        """Whether the app may still write prefixes today."""
        ...

    def note_written(self, app: str, num_bytes: int) -> None:
        """So much of the app's was written to the disk."""

    def note_energy(self, app: str, joules: float) -> None:
        """So much energy went into the app's requests."""


class Metering:
    """The meter of one gateway, and the energy that is to be shared.

    Args:
        meter: None where there are no apps.
    """

    def __init__(self, meter: Meter | None) -> None:
        self.meter = meter
        self.energy = EnergyShare()

    def of(self, request: Request, *, is_own: bool = False) -> "Metered":
        """The meter's side of one request.

        Args:
            request: The request.
            is_own: Whether it is one of ours on behalf of another, which holds the app's place.
        """
        return Metered(self, request, is_own=is_own)

    def keeps_on_disk(self, app: str) -> bool:
        """Whether an app's prefixes may be written."""
        return self.meter is None or self.meter.keeps_on_disk(app)

    def note_joules(self, joules: float, *, is_working: bool) -> None:
        """Joules that the machine's meter counted since the last call."""
        for app, share_j in self.energy.split(joules, is_working=is_working).items():
            if self.meter is not None:
                self.meter.note_energy(app, share_j)


class Metered:
    """One request: `enter` once, `finish` at least once, and between them `begin` at most once."""

    def __init__(self, metering: Metering, request: Request, *, is_own: bool) -> None:
        self._meter, self._energy = metering.meter, metering.energy
        self._app, self._request_id = request.app, request.request_id
        self.is_own = is_own
        self._has_begun = self._is_finished = False
        self._num_prompt_tokens = self._num_cached_tokens = 0
        self._num_drawn: dict[int, int] = {}

    def enter(self) -> None:
        """Take the app's place for it.

        Raises:
            RateLimited: The app has too many.
            OverBudget: It has used up what it may.
        """
        if self._meter is not None and not self.is_own:
            self._meter.enter(self._app)

    def answer_bound(self, *, num_prompt_tokens: int, num_choices: int, max_tokens: int) -> int:
        """What the app's budget leaves of `max_tokens` for each choice.

        Raises:
            OverBudget: Not even one token.
        """
        if self._meter is None:
            return max_tokens
        return self._meter.answer_bound(
            self._app,
            num_prompt_tokens=num_prompt_tokens,
            num_choices=num_choices,
            max_tokens=max_tokens,
        )

    def check_share(self, model: str, kv_tokens: int, pool_tokens: int) -> None:
        """Refuse what would hold more of a model's pool than the app may.

        Raises:
            RateLimited: It would.
        """
        if self._meter is not None:
            self._meter.check_share(
                self._app, model=model, kv_tokens=kv_tokens, pool_tokens=pool_tokens
            )

    def check_kv_quality(self, plan: Plan) -> None:
        """Refuse a model that is loaded with a KV type below what the app accepts.

        Raises:
            Unsupported: It is.
        """
        if self._meter is not None:
            self._meter.check_kv_quality(
                self._app,
                model=plan.model.name,
                kv_type_k=plan.kv_type_k,
                kv_type_v=plan.kv_type_v,
            )

    def begin(
        self, model: str, *, num_prompt_tokens: int, max_completion_tokens: int, kv_tokens: int
    ) -> None:
        """It was started."""
        self._has_begun, self._num_prompt_tokens = True, num_prompt_tokens
        if self._meter is not None:
            self._meter.begin(
                self._app,
                self._request_id,
                model=model,
                num_prompt_tokens=num_prompt_tokens,
                max_completion_tokens=max_completion_tokens,
                kv_tokens=kv_tokens,
            )

    def note(self, delta: Delta) -> None:
        """Something of the answer has come."""
        if not self._num_drawn:
            self._energy.note(self._app, num_prompt_tokens=self._num_prompt_tokens)
        before = self._num_drawn.get(delta.index, 0)
        drawn = before + delta.num_tokens
        if delta.timings is not None:
            # Tokens that were held back, as part of a character or of a stop string, count too.
            drawn = max(drawn, delta.timings.num_completion_tokens)
            if delta.index == 0:  # other choices fork the first one's prompt
                self._num_cached_tokens = delta.timings.num_cached_tokens
        self._num_drawn[delta.index] = drawn
        self._energy.note(self._app, num_completion_tokens=drawn - before)

    def finish(self, *, was_read: bool = True) -> None:
        """It is over, whatever ended it; only the first call counts.

        Args:
            was_read: False where nothing of its prompt was read; who leaves while it is read has
                had the work done.
        """
        if self._is_finished:
            return
        self._is_finished = True
        if self._meter is None:
            return
        if self._has_begun:
            num_tokens = sum(self._num_drawn.values())
            self._meter.end(
                self._app,
                self._request_id,
                num_completion_tokens=num_tokens,
                num_cached_tokens=self._num_cached_tokens,
                num_prompt_tokens=None if was_read else 0,
            )
        if not self.is_own:
            self._meter.leave(self._app)


class WrittenBytes:
    """Tells the meter what each app's prefixes have written, from workers' running totals."""

    def __init__(self) -> None:
        self._pid: int | None = None
        self._seen: dict[str, int] = {}

    def note(self, pid: int | None, stats: Stats, meter: Meter | None) -> None:
        """Take the totals of a worker, which begin at 0 with each."""
        if meter is None or stats.prefix.store is None:
            return
        if pid != self._pid:
            self._pid, self._seen = pid, {}
        for owner, total in stats.prefix.store.written_by_owner.items():
            num_bytes = total - self._seen.get(owner, 0)
            self._seen[owner] = total
            if owner.startswith(APP_OWNER) and num_bytes:
                meter.note_written(owner.removeprefix(APP_OWNER), num_bytes)
