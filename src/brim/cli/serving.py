"""One server's life: listening, loading, ready, drained, gone.

HTTP answers from the first moment, so that /health can say that models are loading.  The first
SIGTERM or SIGINT drains: running answers finish within the limit, new requests get 503.  A second
one ends at once.
"""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Awaitable, Iterator, Sequence
from pathlib import Path

from brim.cli.errors import say
from brim.cli.neighbours import forecast_history, grant_book
from brim.cli.output import gib
from brim.cli.planning import room_note, with_engine_reason
from brim.cli.speed_sources import usable_calibration
from brim.cli.state import write_state
from brim.config.tree import ModelSettings, Settings
from brim.core.machine import MachineSpec
from brim.core.plan import Plan
from brim.errors import BrimError
from brim.ledger.account import Account
from brim.machine.reading import read_machine
from brim.planner.fit import Room, fit_plan
from brim.runtime.gateway import Gateway
from brim.server.app import build_app
from brim.server.guard import served_hosts
from brim.server.limits import MAX_CONNECTIONS
from brim.server.serve import HttpServer

CLOSE_WITHIN_S = 2.0
"""For responses to leave after their answers have ended; draining has taken its time before."""


async def serve_until_signal(
    plans: Sequence[Plan],
    settings: Settings,
    listener: socket.socket,
    *,
    force: bool,
    may_shrink: bool = False,
    wait_s: float = 0.0,
) -> None:
    """Serve planned models on a listening socket; returns when a signal has ended it.

    Args:
        plans: The models.
        settings: The settings.
        listener: Where to serve them.
        force: Load even what does not fit.
        may_shrink: Take a smaller KV type or context where a plan does not fit comfortably.
        wait_s: How long to wait for memory that other programs hold.

    Raises:
        BrimError: A model cannot be loaded, or the state file not be written.
    """
    gateway = Gateway(
        plans,
        settings=settings,
        account=Account(),
        read_machine=read_machine,
        book=grant_book(),
        history=forecast_history(),
        fit=fitted if may_shrink and not force else None,
        force=force,
        say=say,
    )
    app = build_app(
        gateway,
        allowed_hosts=served_hosts(
            settings.server.host, listener.getsockname()[0], settings.server.allowed_hosts
        ),
        allowed_origins=settings.server.allowed_origins,
        max_body_bytes=settings.server.max_body_bytes,
    )
    server = HttpServer(
        app,
        listener,
        finish_within_s=CLOSE_WITHIN_S,
        max_connections=_max_connections(settings.models, len(plans)),
    )
    signals = _Signals()
    with _announced(settings, listener):
        serving = asyncio.create_task(server.run(lambda url: say(f"listening on {url}")))
        try:
            if await signals.first_of(gateway.start(wait_s=wait_s)):
                _say_ready(gateway)
                if await signals.first_of(asyncio.shield(serving)):
                    raise BrimError("the HTTP server ended by itself; start brim again")
                await _drain(gateway, signals, settings.server.drain_limit_s)
        finally:
            await gateway.stop()
            server.stop()
            await serving


def fitted(wish: Plan, machine: MachineSpec, room: Room) -> Plan:
    """The wish, or what of it fits: only ever less, and the wish itself where nothing does."""
    plan = fit_plan(
        wish.model,
        machine,
        room,
        engine=wish.engine,
        objective=wish.objective,
        max_sequences=wish.max_sequences,
        calibration=usable_calibration(wish.engine, machine),
    )
    has_room = plan.memory.total_bytes <= min(room.tight_bytes, wish.memory.total_bytes)
    if not has_room or plan.context_tokens > wish.context_tokens:
        return wish
    reason = wish.reasons.get("engine")
    return plan if reason is None else with_engine_reason(plan, reason)


def _max_connections(models: ModelSettings, num_models: int) -> int:
    """Well above what can run or queue, so that only a flood meets it and not a full queue."""
    num_requests = num_models * (models.max_queued_requests + models.max_sequences)
    return max(MAX_CONNECTIONS, 4 * num_requests)


class _Signals:
    """SIGTERM and SIGINT as something to wait for, each of them once."""

    def __init__(self) -> None:
        self._arrived = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._arrived.set)

    async def first_of(self, work: Awaitable[None]) -> bool:
        """Whether `work` ended before the next signal; cancels it where it did not.

        Raises:
            Exception: What `work` raised.
        """
        working = asyncio.ensure_future(work)
        waiting = asyncio.create_task(self._arrived.wait())
        try:
            await asyncio.wait((working, waiting), return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
        if working.done():
            working.result()
            return True
        self._arrived.clear()
        working.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await working
        return False


async def _drain(gateway: Gateway, signals: _Signals, limit_s: float) -> None:
    num_running = sum(status.num_running for status in gateway.models())
    if num_running:
        say(f"{num_running} running; stopping when done, in {limit_s:.0f} s at the latest")
    await signals.first_of(gateway.drain(limit_s))


def _say_ready(gateway: Gateway) -> None:
    """One line for each model: what it takes, and a word where memory is tight."""
    grants = gateway.grants()
    for status in gateway.models():
        if status.name not in grants:
            say(f"{status.name} is not in memory: {status.reason}")
            continue
        plan, note = status.plan, room_note(grants[status.name])
        say(
            f"{status.name} is ready: {plan.engine}, context {plan.context_tokens}, "
            f"{plan.kv_type_k} KV, {gib(plan.memory.total_bytes)} planned"
            + (f"; {note}" if note else "")
        )


@contextlib.contextmanager
def _announced(settings: Settings, listener: socket.socket) -> Iterator[Path]:
    """Keep a state file while the server runs, so that `ps` and `stop` find it."""
    port = int(listener.getsockname()[1])
    path = write_state(settings.server.host, port, settings.server.drain_limit_s)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
