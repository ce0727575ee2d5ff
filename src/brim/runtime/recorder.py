"""Events of this gateway: recorded with the time and with whether the machine is simulated."""

import time
from collections.abc import Callable
from typing import Any

from brim.core.event import Event, EventKind
from brim.telemetry.event_log import EventLog


class Recorder:
    """Records what happens to models.

    Args:
        log: Where events go.
        is_simulated: Whether the machine that is read comes from a scenario.
    """

    def __init__(self, log: EventLog, *, is_simulated: Callable[[], bool] = lambda: False) -> None:
        self._log = log
        self._is_simulated = is_simulated

    def __call__(self, kind: EventKind, *, model: str, cause: str, **fields: Any) -> None:
        """Record an event of one model; `fields` are others of `Event`."""
        self._log.record(
            Event(
                at_unix_s=time.time(),
                kind=kind,
                model=model,
                cause=cause,
                is_simulated=self._is_simulated(),
                **fields,
            )
        )
