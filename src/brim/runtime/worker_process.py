"""One worker process as the gateway sees it: started, spoken to, and always reaped.

Owns the process and its socket.  Restarting it and the answers it owes are model_host's business.
"""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable
from typing import TypeVar

from brim.core.answer import Delta
from brim.core.plan import Plan
from brim.core.request import Request
from brim.core.stance import WorkLimits
from brim.errors import BrimError, EngineError, WorkerDied
from brim.runtime.connection import Connection
from brim.runtime.orphans import forget_worker, note_worker
from brim.runtime.worker_limits import (
    HELLO_LIMIT_S,
    hang_limit_s,
    load_limit_s,
    resize_limit_s,
)
from brim.runtime.worker_start import exit_in_words, start_process
from brim.telemetry.events import relay_event
from brim.worker import protocol

SHUTDOWN_LIMIT_S = 5.0
"""For a step to end and the backend to free its memory; then the process is killed."""

EXIT_LIMIT_S = 0.5
"""From the end of the connection to the exit code, which says how the worker died.  Clients get the
news after that long at most, a worker that still lives is killed."""

STDERR_LIMIT_S = 0.2
"""For the last of its stderr; a process that the backend started could hold the pipe open."""

NUM_HANG_SLICES = 10
"""A silence is waited for in this many parts, so that a gateway that was itself suspended takes its
own pause for one part of the worker's silence and not for all of it."""

MAX_STDERR_BYTES = 16 * 1024
"""Kept of what the backend writes, for the reason of a death: a few screens."""

MAX_QUOTED_CHARS = 200
"""Of the worker's last line in a message: a sentence, not a dump."""

Deltas = tuple[tuple[int, Delta], ...]
A = TypeVar("A")


class WorkerProcess:
    """A running worker; `spawn` makes it, and its memory is free when `wait_reaped` returns.

    Args:
        process: The child.
        plan: How its model is loaded.
        on_deltas: Called with what each `Steps` frame carries; must not block.
    """

    def __init__(
        self, process: asyncio.subprocess.Process, plan: Plan, on_deltas: Callable[[Deltas], None]
    ) -> None:
        loop = asyncio.get_running_loop()
        self._process = process
        self._plan = plan
        self._name = plan.model.name
        self._on_deltas = on_deltas
        self._connection = Connection(self._on_frame, self._on_lost)
        self._hello: asyncio.Future[protocol.Hello] = loop.create_future()
        self._loaded: asyncio.Future[protocol.Loaded] = loop.create_future()
        self._counted: dict[int, asyncio.Future[protocol.Counted]] = {}
        self._stats: list[asyncio.Future[protocol.Stats]] = []
        self._resized: list[asyncio.Future[protocol.Resized]] = []
        self._on_progress: Callable[[float], None] = _unheard
        self._lost: asyncio.Future[str | None] = loop.create_future()
        self._death: asyncio.Future[WorkerDied] = loop.create_future()
        self._stderr = bytearray()
        self._watching = loop.create_task(self._watch(), name=f"worker of {self._name}")

    @classmethod
    async def spawn(cls, plan: Plan, on_deltas: Callable[[Deltas], None]) -> "WorkerProcess":
        """Start a process and wait for its first word.

        Linux kills the worker when the thread that called this ends: call it from one that lives as
        long as the gateway.

        Raises:
            WorkerDied: It ended or stayed silent.
            EngineError: The system has no room for a process or its socket, or it speaks another
                protocol.
        """
        try:
            worker = await cls._spawn_connected(plan, on_deltas)
        except OSError as exc:
            raise EngineError(
                f"no worker process could be started for model '{plan.model.name}': {exc}"
            ) from exc
        try:
            hello = await worker._answer(worker._hello, HELLO_LIMIT_S)
            if hello.protocol_version != protocol.PROTOCOL_VERSION:
                raise EngineError(
                    f"the worker speaks protocol {hello.protocol_version}, this process "
                    f"{protocol.PROTOCOL_VERSION}; install one version of brim"
                )
        except BaseException:
            await worker.kill()
            raise
        return worker

    @classmethod
    async def _spawn_connected(
        cls, plan: Plan, on_deltas: Callable[[Deltas], None]
    ) -> "WorkerProcess":
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with contextlib.ExitStack() as undo:
            undo.enter_context(ours)
            with theirs:
                ours.setblocking(False)
                process = await start_process(plan, theirs.fileno())
            worker = cls(process, plan, on_deltas)
            try:
                await asyncio.to_thread(note_worker, process.pid)
                loop = asyncio.get_running_loop()
                await loop.create_unix_connection(lambda: worker._connection, sock=ours)
            except BaseException:
                await worker.kill()
                raise
            undo.pop_all()
        return worker

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def is_connected(self) -> bool:
        """Whether the socket still stands."""
        return not self._lost.done()

    async def load(
        self,
        plan: Plan,
        options: protocol.WorkerOptions | None = None,
        *,
        on_progress: Callable[[float], None] | None = None,
    ) -> protocol.Loaded:
        """Load the model.

        Args:
            plan: How.
            options: How the worker is to work; the protocol's defaults where None.
            on_progress: Told how far it is, 0 to 1; must not block.

        Raises:
            BrimError: What the engine said, as itself; WorkerDied where the process ended.
        """
        self._on_progress = on_progress or _unheard
        self._connection.send(protocol.Load(plan, options or protocol.WorkerOptions()))
        return await self._answer(self._loaded, load_limit_s(plan))

    async def prepare(
        self, ticket: int, request: Request, summary: str | None = None
    ) -> protocol.Counted:
        """How long the request's prompt is; the worker holds it until `start` or `cancel`.

        Has no limit of its own, since prompts wait for others: `stats`, which waits behind them,
        finds a worker that hangs.

        Raises:
            BrimError: The template or the tokenizer refused it, as itself; or WorkerDied.
        """
        future = self._counted[ticket] = self._new_future()
        try:
            self._connection.send(protocol.Prepare(ticket, request, summary))
            return await future
        finally:
            del self._counted[ticket]

    def start(self, ticket: int, max_tokens: int) -> None:
        """Generate; the deltas come to `on_deltas`.

        Raises:
            WorkerDied: It has ended, and with it the prepared prompt.
        """
        if not self.is_connected:
            raise self._died("ended")
        self._connection.send(protocol.Start(ticket, max_tokens))

    def cancel(self, ticket: int) -> None:
        """Forget a ticket, prepared or started."""
        self._connection.send(protocol.Cancel(ticket))

    async def stats(self) -> protocol.Stats:
        """The worker's counters; a worker that does not give them hangs, and is killed.

        Raises:
            WorkerDied: It ended.
        """
        future: asyncio.Future[protocol.Stats] = self._new_future()
        self._stats.append(future)
        self._connection.send(protocol.GetStats())
        return await self._unless_it_hangs(future, hang_limit_s(self._plan), "")

    def set_limits(self, limits: WorkLimits) -> None:
        """Have it work within these limits from its next step on; nothing where it has ended."""
        self._connection.send(protocol.SetLimits(limits))

    async def resize(self, kv_tokens: int) -> protocol.Resized:
        """Give its KV pool another size; a worker that does not come back from it is killed.

        Args:
            kv_tokens: Cells that are wanted; it keeps as many as running requests need.

        Raises:
            WorkerDied: It ended.
        """
        future: asyncio.Future[protocol.Resized] = self._new_future()
        self._resized.append(future)
        self._connection.send(protocol.Resize(kv_tokens))
        limit_s = resize_limit_s(self._plan)
        return await self._unless_it_hangs(future, limit_s, " while its KV pool was resized")

    async def wait_dead(self) -> WorkerDied:
        """Wait until it is certain that it gives no more answers; says how it ended."""
        return await asyncio.shield(self._death)

    async def wait_reaped(self) -> None:
        """Wait until the process and its memory are gone."""
        await asyncio.shield(self._watching)

    async def ask_to_end(self) -> bool:
        """Ask it to shut down, as SIGTERM would not; False where it is still there at the limit."""
        self._connection.send(protocol.Shutdown())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SHUTDOWN_LIMIT_S):
                await self.wait_reaped()
                return True
        return False

    async def terminate(self) -> None:
        """Ask it to shut down, and kill it where it does not."""
        await self.ask_to_end()
        await self.kill()

    async def kill(self) -> None:
        """End it at once, and reap it."""
        self._end(None)
        await self.wait_reaped()

    def _end(self, how: str | None) -> None:
        """Kill it; `how` is what to say of it, where the exit code would not tell."""
        self._kill()
        _resolve(self._lost, how)
        self._connection.abort()

    def _new_future(self) -> asyncio.Future[A]:
        if not self.is_connected:
            raise self._died("ended")
        return asyncio.get_running_loop().create_future()

    async def _unless_it_hangs(self, future: asyncio.Future[A], limit_s: float, doing: str) -> A:
        """What it answers between two steps, however long they are, up to a limit."""
        for _ in range(NUM_HANG_SLICES):
            await asyncio.wait([future], timeout=limit_s / NUM_HANG_SLICES)
            if future.done():
                return future.result()
        self._end(f"said nothing for {limit_s:.0f} s{doing}, so it hung and was killed")
        return await future

    async def _answer(self, future: asyncio.Future[A], limit_s: float) -> A:
        try:
            async with asyncio.timeout(limit_s):
                return await future
        except TimeoutError:
            raise self._died(f"gave no answer for {limit_s:.0f} s while it was starting") from None

    def _on_frame(self, frame: protocol.WorkerFrame) -> None:
        if isinstance(frame, protocol.Steps):
            deltas = frame.deltas
            if self._counted:
                deltas = tuple(pair for pair in deltas if not self._is_refusal(*pair))
            self._on_deltas(deltas)
        elif isinstance(frame, protocol.Counted):
            _resolve(self._counted.get(frame.ticket), frame)
        elif isinstance(frame, protocol.Stats):
            _resolve(self._stats.pop(0) if self._stats else None, frame)
        elif isinstance(frame, protocol.Resized):
            _resolve(self._resized.pop(0) if self._resized else None, frame)
        elif isinstance(frame, protocol.LoadProgress):
            self._on_progress(frame.fraction)
        elif isinstance(frame, protocol.Loaded):
            _resolve(self._loaded, frame)
        elif isinstance(frame, protocol.LoadFailed):
            _reject(self._loaded, frame.error.exception())
        elif isinstance(frame, protocol.Hello):
            _resolve(self._hello, frame)

    def _is_refusal(self, ticket: int, delta: Delta) -> bool:
        """Whether the delta says that a prompt could not be prepared; tells who asked."""
        future = self._counted.get(ticket)
        if future is None or delta.error is None:
            return False
        _reject(future, delta.error.exception())
        return True

    def _on_lost(self, violation: str | None) -> None:
        _resolve(self._lost, None if violation is None else f"broke the protocol: {violation}")

    async def _watch(self) -> None:
        """Follow the process to its end, however it comes, and tell everyone who waits."""
        reading = asyncio.ensure_future(self._keep_stderr())
        how = await self._lost
        exit_code = await self._exit_code()
        await asyncio.wait([reading], timeout=STDERR_LIMIT_S)
        reading.cancel()
        death = self._died((how or exit_in_words(exit_code)) + self._last_words(exit_code))
        self._death.set_result(death)
        _reject(self._hello, death)
        _reject(self._loaded, death)
        for counted in self._counted.values():
            _reject(counted, death)
        for stats in self._stats:
            _reject(stats, death)
        for resized in self._resized:
            _reject(resized, death)
        await self._process.wait()
        await asyncio.to_thread(forget_worker, self.pid)

    async def _exit_code(self) -> int | None:
        """The exit code, or None where the process takes too long to go and is killed."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(EXIT_LIMIT_S):
                return await self._process.wait()
        self._kill()
        return None

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def _keep_stderr(self) -> None:
        """Keep the last of what the worker writes; it must be read for the worker not to block.

        Events are for whoever watches the server: they are passed on, and are nobody's last words.
        """
        stderr = self._process.stderr
        assert stderr is not None
        while data := await stderr.read(MAX_STDERR_BYTES):
            *lines, rest = (self._stderr + data).split(b"\n")
            kept = [line for line in lines if not relay_event(line.decode("utf-8", "replace"))]
            self._stderr = bytearray(b"\n").join([*kept, rest])[-MAX_STDERR_BYTES:]

    def _last_words(self, exit_code: int | None) -> str:
        """The last line of its stderr, where it says something about the death."""
        lines = self._stderr.decode("utf-8", "replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        if not last or exit_code in (0, -signal.SIGKILL, -signal.SIGTERM):
            return ""
        return f" (its last words: {last[:MAX_QUOTED_CHARS]})"

    def _died(self, how: str) -> WorkerDied:
        return WorkerDied(f"the worker of model '{self._name}' {how}", retry_after_s=1.0)


def _unheard(fraction: float) -> None:
    """Nobody waits for the load."""


def _resolve(future: asyncio.Future[A] | None, value: A) -> None:
    if future is not None and not future.done():
        future.set_result(value)


def _reject(future: asyncio.Future[A], error: BrimError) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # nobody need be waiting: without this the event loop complains
