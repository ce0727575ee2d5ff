"""The log of events in memory: kept, handed on, and never waited for."""

import asyncio

import pytest

from brim.core.event import Event, EventKind
from brim.telemetry.event_log import NUM_KEPT, NUM_PENDING, EventLog

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def event(number: int) -> Event:
    return Event(at_unix_s=float(number), kind=EventKind.MODEL_LOADED)


def test_the_newest_are_kept_and_the_sink_gets_all() -> None:
    """A server that runs for months holds no more than its bound."""
    seen: list[Event] = []
    log = EventLog(seen.append)
    for number in range(NUM_KEPT + 5):
        log.record(event(number))
    assert len(seen) == NUM_KEPT + 5
    assert [log.events()[0].at_unix_s, len(log.events())] == [5.0, NUM_KEPT]


async def test_listening_begins_where_history_ends() -> None:
    """Between what is kept and the first that is heard there is no gap and no overlap."""
    log = EventLog()
    log.record(event(1))
    with log.listening() as listener:
        history = log.events()
        log.record(event(2))
        assert await listener.next() == event(2)
    assert history == [event(1)]


async def test_a_listener_that_is_behind_hears_what_it_had_room_for_and_then_the_end() -> None:
    """Nothing is left out in the middle: the first that is lost ends the listening."""
    log = EventLog()
    with log.listening() as listener:
        for number in range(NUM_PENDING + 1):
            log.record(event(number))
        heard = [await listener.next() for _ in range(NUM_PENDING)]
        log.record(event(-1))
        assert [each.at_unix_s for each in heard if each] == list(range(NUM_PENDING))
        assert await listener.next() is None


async def test_whoever_stops_listening_is_forgotten() -> None:
    """A log is not the longer at work for listeners that have left."""
    log = EventLog()
    with log.listening() as listener:
        pass
    log.record(event(1))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await listener.next()
