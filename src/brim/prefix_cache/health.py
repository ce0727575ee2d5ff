"""Whether writing is worth a try: a disk that fails is left alone for a while, and said once."""

from collections.abc import Callable

from brim.prefix_cache.segment import Skip
from brim.telemetry.events import log_event

FAILURES_BEFORE_PAUSE = 3
"""One may be chance; an export costs milliseconds of every running answer."""

PAUSE_S = 60.0
"""What a user takes to free some room; doubled with each failure after that."""

MAX_PAUSE_S = 3600.0

SAY_AGAIN_S = 3600.0
"""At its floor a disk takes every second entry, for days: that is no event for each of them."""

_FAILURES = {Skip.NO_SPACE, Skip.READ_ONLY, Skip.WRITE_FAILED, Skip.REFUSED}

_SAID = _FAILURES | {Skip.DISK_FLOOR, Skip.EXPORT_FAILED}
"""What whoever runs the server should know; other bounds do what they were set for."""


class Health:
    """Counts failures in a row.

    Args:
        directory: The cache's, for the event.
        clock: Seconds since 1970.
    """

    def __init__(self, directory: str, clock: Callable[[], float]) -> None:
        self._directory, self._clock = directory, clock
        self._num_failures = 0
        self._paused_at_s = self._paused_until_s = 0.0
        self._said_at_s: dict[Skip, float] = {}
        self._kept_since: set[Skip] = set()
        """Of what was said: reasons that an entry was kept after."""

    def may_try(self) -> bool:
        """Whether a write may be tried now."""
        # A clock that was put back must not make a pause last until it has caught up.
        return not self._paused_at_s <= self._clock() < self._paused_until_s

    def failed(self, reason: Skip, problem: str) -> None:
        """Note why an entry was not kept; says it once until one is kept again, once an hour."""
        if reason in _SAID and self._is_news(reason):
            self._said_at_s[reason] = self._clock()
            self._kept_since.discard(reason)
            log_event(
                "prefix_not_kept", reason=reason, directory=self._directory, problem=problem or None
            )
        if reason not in _FAILURES:
            return
        self._num_failures += 1
        if self._num_failures >= FAILURES_BEFORE_PAUSE:
            self.pause()

    def pause(self) -> None:
        """Try nothing for a while, longer each time."""
        excess = max(0, self._num_failures - FAILURES_BEFORE_PAUSE)
        pause_s = min(PAUSE_S * 2.0 ** min(excess, 16), MAX_PAUSE_S)
        self._paused_at_s = self._clock()
        self._paused_until_s = self._paused_at_s + pause_s

    def succeeded(self) -> None:
        """An entry was kept."""
        self._num_failures = 0
        self._paused_at_s = self._paused_until_s = 0.0
        self._kept_since.update(self._said_at_s)

    def _is_news(self, reason: Skip) -> bool:
        said_s = self._said_at_s.get(reason)
        if said_s is None:
            return True
        return reason in self._kept_since and not 0 <= self._clock() - said_s < SAY_AGAIN_S
