"""One server's life: listening, loading, ready, drained, gone.

HTTP answers from the first moment, so that /health can say that models are loading.  The first
SIGTERM or SIGINT drains: running answers finish within the limit, new requests get 503.  A second
one ends at once.
"""

import asyncio
import contextlib
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path

from brim.apps.registry import FILE_NAME as APPS_FILE
from brim.apps.registry import Registry
from brim.cli.errors import say
from brim.cli.governing import governed, in_background
from brim.cli.neighbours import forecast_history, grant_book
from brim.cli.output import gib
from brim.cli.planning import room_note, with_engine_reason
from brim.cli.records import Records, open_records
from brim.cli.simulation import Simulation
from brim.cli.speed_sources import usable_calibration
from brim.cli.state import new_operator_token, write_state
from brim.config.places import state_directory, state_path
from brim.config.tree import ModelSettings, Settings
from brim.core.machine import MachineSpec
from brim.core.plan import Plan
from brim.errors import BrimError
from brim.governor.actuator import Actuator
from brim.ledger.account import Account
from brim.machine.energy import EnergyMeter
from brim.machine.reading import machine_at_hand, read_machine
from brim.planner.fit import Room, fit_plan
from brim.runtime.gateway import Gateway
from brim.server.app import build_app
from brim.server.auth import Doorkeeper, check_exposed, requires_keys
from brim.server.guard import served_hosts
from brim.server.limits import MAX_CONNECTIONS
from brim.server.serve import HttpServer

CLOSE_WITHIN_S = 2.0
"""For responses to leave after their answers have ended; draining has taken its time before."""


async def serve_until_signal(
    plans: Sequence[Plan],
    settings: Settings,
    listener: socket.socket,
    apps: Registry,
    *,
    force: bool,
    may_shrink: bool = False,
    wait_s: float = 0.0,
    simulation: Simulation | None = None,
) -> None:
    """Serve planned models on a listening socket; returns when a signal has ended it.

    Args:
        plans: The models.
        settings: The settings.
        listener: Where to serve them.
        apps: Who may use them; closed when this returns.
        force: Load even what does not fit.
        may_shrink: Take a smaller KV type or context where a plan does not fit comfortably.
        wait_s: How long to wait for memory that other programs hold.
        simulation: The machine that they are served on, where it is not this one.

    Raises:
        BrimError: A model cannot be loaded, or the state file not be written.
    """
    is_simulated = simulation is not None
    operator_token = new_operator_token()
    with contextlib.ExitStack() as stack:
        stack.callback(apps.close)
        records = stack.enter_context(
            open_records(state_directory(settings), apps, is_simulated=is_simulated)
        )
        gateway = _gateway(plans, settings, apps, records, simulation, force, may_shrink)
        server = _http_server(gateway, settings, listener, apps, records, operator_token)
        signals = _Signals()
        stack.enter_context(_announced(settings, listener, operator_token))
        serving = asyncio.create_task(server.run(lambda url: say(f"listening on {url}")))
        try:
            if await signals.first_of(gateway.start(wait_s=wait_s)):
                _say_ready(gateway, say if simulation is None else simulation.say)
                async with _governed(gateway, settings, plans, simulation):
                    if await signals.first_of(asyncio.shield(serving)):
                        raise BrimError("the HTTP server ended by itself; start brim again")
                    await _drain(gateway, signals, settings.server.drain_limit_s)
        finally:
            await gateway.stop()
            server.stop()
            await serving


def _gateway(
    plans: Sequence[Plan],
    settings: Settings,
    apps: Registry,
    records: Records,
    simulation: Simulation | None,
    force: bool,
    may_shrink: bool,
) -> Gateway:
    """The gateway, on this machine or on a simulated one.

    Other processes are told nothing of a simulated machine's grants, no forecast is learnt from
    it, and plans stay as the real machine, which runs them, wants them.
    """

    def pinned() -> set[str]:
        names = {plan.model.name for plan in plans}
        kept = [app for app in apps.apps() if app.keep_loaded]
        return {name for name in names if any(app.may_use(name) for app in kept)}

    is_real = simulation is None
    return Gateway(
        plans,
        settings=settings,
        account=Account(),
        read_machine=read_machine if simulation is None else simulation.machine.read_machine,
        book=grant_book() if is_real else None,
        history=forecast_history() if is_real else None,
        fit=fitted if may_shrink and not force and is_real else None,
        force=force,
        say=say if simulation is None else simulation.say,
        events=records.events,
        meter=records.meter,
        pinned_by_apps=pinned,
        read_joules=EnergyMeter().read_j if is_real else None,
    )


def _http_server(
    gateway: Gateway,
    settings: Settings,
    listener: socket.socket,
    apps: Registry,
    records: Records,
    operator_token: str,
) -> HttpServer:
    address = listener.getsockname()[0]
    app = build_app(
        gateway,
        doorkeeper=Doorkeeper(
            apps.authenticate,
            requires_key=requires_keys(address, settings.server.require_keys),
            operator_token=operator_token,
        ),
        usage=records.meter,
        allowed_hosts=served_hosts(settings.server.host, address, settings.server.allowed_hosts),
        allowed_origins=settings.server.allowed_origins,
        max_body_bytes=settings.server.max_body_bytes,
    )
    return HttpServer(
        app,
        listener,
        finish_within_s=CLOSE_WITHIN_S,
        max_connections=_max_connections(settings.models, len(gateway.models())),
    )


@contextlib.asynccontextmanager
async def _governed(
    gateway: Gateway, settings: Settings, plans: Sequence[Plan], simulation: Simulation | None
) -> AsyncIterator[None]:
    """Have the gateway governed meanwhile, by what its machine feels."""
    machine = machine_at_hand() if simulation is None else simulation.machine
    spec = await asyncio.to_thread(machine.read_machine)
    async with contextlib.AsyncExitStack() as stack:
        actuator: Actuator = gateway.actuator
        speed, clock = 1.0, time.monotonic
        if simulation is not None:
            simulation.begin()
            actuator, speed = simulation.staged(gateway.actuator), simulation.speed
            clock = simulation.now_s
            asking = in_background(simulation.ask(gateway, plans), "asking for the scenario")
            await stack.enter_async_context(asking)
        await stack.enter_async_context(
            governed(
                machine.read_signals,
                actuator,
                gateway.event_log,
                settings.governor,
                ram_bytes=spec.ram_bytes,
                speed=speed,
                clock=clock,
                is_simulated=simulation is not None,
            )
        )
        yield


def known_apps(settings: Settings, listener: socket.socket) -> Registry:
    """The apps that may use a server that listens here.

    Raises:
        ConfigError: None is known, and other machines reach it; or what is kept of them is damaged.
    """
    apps = Registry(state_path(settings) / APPS_FILE)
    check_exposed(listener.getsockname()[0], bool(apps.apps()))
    return apps


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


def _say_ready(gateway: Gateway, say: Callable[[str], None]) -> None:
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
def _announced(settings: Settings, listener: socket.socket, operator_token: str) -> Iterator[Path]:
    """Keep a state file while the server runs, so that `ps` and `stop` find it."""
    path = write_state(
        settings.server.host,
        int(listener.getsockname()[1]),
        settings.server.drain_limit_s,
        operator_token=operator_token,
        directory=state_path(settings),
    )
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
