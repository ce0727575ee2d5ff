"""What a server writes down: its events, and what apps use of their budgets."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from brim.apps.meter import Meter
from brim.apps.registry import Registry
from brim.apps.usage import FILE_NAME as USAGE_FILE
from brim.apps.usage import UsageStore
from brim.core.event import Event, EventKind
from brim.telemetry.event_log import EventLog
from brim.telemetry.event_store import FILE_NAME as EVENTS_FILE
from brim.telemetry.event_store import EventStore
from brim.telemetry.events import log_event

SAID_ELSEWHERE = frozenset(
    {
        EventKind.WORKER_DIED,
        EventKind.MODEL_QUARANTINED,
        EventKind.SERVER_STARTED,
        EventKind.SERVER_STOPPED,
    }
)
"""Events that whoever sees them first says on stderr, with more detail or for a person."""


@dataclass(frozen=True, slots=True)
class Records:
    """Where things are written down while a server runs."""

    events: EventLog
    meter: Meter


@contextlib.contextmanager
def open_records(directory: Path, apps: Registry, *, is_simulated: bool) -> Iterator[Records]:
    """Keep records in a state directory; the server's start and end are the first and the last.

    Args:
        directory: A server's state directory.
        apps: Whose usage it is.
        is_simulated: Whether the machine comes from a scenario.

    Raises:
        ConfigError: What is kept there is damaged or of a newer brim.
    """
    store = EventStore(directory / EVENTS_FILE)
    usage = UsageStore(directory / USAGE_FILE)

    def sink(event: Event) -> None:
        store.record(event)
        say_event(event)

    events = EventLog(sink)

    def record(kind: EventKind) -> None:
        events.record(Event(at_unix_s=time.time(), kind=kind, is_simulated=is_simulated))

    try:
        record(EventKind.SERVER_STARTED)
        yield Records(events, Meter(apps, usage, on_event=events.record))
        record(EventKind.SERVER_STOPPED)
    finally:
        store.close()
        usage.close()


def say_event(event: Event) -> None:
    """Write an event to stderr as one line, as everything else that happens to a server."""
    if event.kind in SAID_ELSEWHERE:
        return
    log_event(
        event.kind.value.replace(" ", "_"),
        model=event.model or None,
        app=event.app or None,
        cause=event.cause or None,
        before_bytes=event.before_bytes,
        after_bytes=event.after_bytes,
        before_watts=event.before_watts,
        after_watts=event.after_watts,
        took_s=event.took_s,
        **{name: value for name, value in event.detail.items() if name != "model"},
        simulated=True if event.is_simulated else None,
    )
