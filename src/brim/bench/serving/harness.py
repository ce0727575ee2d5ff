"""Runs workloads against servers in turns, and makes a report of whatever was measured.

Within a repetition the servers take turns at each workload and begin in another order at the next,
so that a machine that drifts drifts for all.  All servers that the harness starts stay up between
their turns: a server that does nothing takes memory and no processor.  A server that fails a
workload, or dies of it, has a row that says so, and is started again for the next one.
"""

import asyncio
import datetime
import os
import time
from collections.abc import Callable, Sequence

import msgspec

from brim.bench.calibrate.readiness import objections
from brim.bench.client import Endpoint
from brim.bench.serving.checks import machine_complaints, sample_complaints
from brim.bench.serving.progress import Pace
from brim.bench.serving.report import Report, Sample, ServerNote, rows
from brim.bench.serving.server import Server, ServerCommand, check_sources
from brim.bench.serving.session import Session
from brim.bench.serving.sizes import Sizes
from brim.bench.serving.texts import Texts, Wording
from brim.bench.serving.workloads import Workload
from brim.bench.workload import sentences
from brim.core.machine import Conditions
from brim.errors import BrimError, ConfigError, Unsupported
from brim.machine.interface import Machine
from brim.machine.others_load import OthersLoad

Progress = Callable[[str], None]

TURN_LIMIT_S = 900.0
"""Of one server at one workload: what takes longer hangs, or is a size that no machine is for."""

PROBE_WORDS = (20, 220)
"""Two prompts whose token counts give tokens for each word; together a second on a slow CPU."""

PATIENCE_S = 10.0
"""What a program takes that was just ended, or a file that is being written back."""

CALM_POLL_S = 1.0
"""Between readings while the machine is not calm."""

LEAST_WATCH_S = 1.0
"""Turns that are shorter tell nothing of other programs: the kernel counts in ticks of 10 ms, and
what starts and ends a turn is work of ours that it has not counted yet."""

WARM_UP_TOKENS = 4
"""Generated before a turn, uncounted: threads wake up and weights are paged in again."""


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What to measure, and how."""

    sources: tuple[Endpoint | ServerCommand, ...]
    workloads: tuple[Workload, ...]
    repetitions: int
    seed: int
    sizes: Sizes = Sizes()
    reference: str | None = None
    """Ratios are to this server; None: the first one."""
    must_be_calm: bool = True
    """Whether a busy, hot or swapping machine is refused rather than reported."""
    patience_s: float = PATIENCE_S
    """How long such a machine is waited for."""


class Comparison:
    """One run: `await measure()` gives the report, also after it was cancelled."""

    def __init__(
        self, wanted: Wanted, machine: Machine, *, progress: Progress = lambda _: None
    ) -> None:
        """Check what can be checked before anything starts.

        Raises:
            ConfigError: There are no servers, two share a name, or the reference is none of them.
        """
        check_sources(wanted.sources)
        names = [source.name for source in wanted.sources]
        self._reference = wanted.reference or names[0]
        if self._reference not in names:
            raise ConfigError(
                f"the reference '{self._reference}' is none of the servers: {', '.join(names)}"
            )
        self._wanted = wanted
        self._machine = machine
        self._progress = progress
        self._servers = [Server(source, machine) for source in wanted.sources]
        self._notes: dict[str, ServerNote] = {}
        self._samples: list[Sample] = []
        self._complaints: list[str] = []
        self._machine_complaints: list[str] = []
        self._takes_chat = True
        self._was_interrupted = False

    async def measure(self) -> Report:
        """Start, warm and measure all servers, in turns.

        Cancelling it ends the run; the report then holds what was measured until then.

        Raises:
            ConfigError: The machine is not calm, or a server cannot be reached or started.
            BrimError: A server refuses the first, short requests.
        """
        started_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        before = await self._calm(None)
        try:
            await self._open_all()
            # Again, now that they are loaded: the reading before tells whether that made it swap.
            await self._calm(before)
            first = self._servers[0]
            await self._turns(await wording_of(first, takes_chat=self._takes_chat))
        except asyncio.CancelledError:
            if not self._samples:
                raise
            self._was_interrupted = True
        finally:
            await asyncio.gather(*(server.close() for server in self._servers))
        return self._report(started_at)

    async def _calm(self, before: Conditions | None) -> Conditions:
        """A reading of a machine that does nothing else; waits a little for one that does.

        Args:
            before: An earlier reading, which tells whether the machine swaps.

        Raises:
            ConfigError: It is to be calm, and does not become so.
        """
        deadline_s = time.monotonic() + self._wanted.patience_s
        while True:
            now = await asyncio.to_thread(self._machine.read_conditions)
            found = [*objections(before or now, now), *machine_complaints(now)]
            if not found or time.monotonic() >= deadline_s:
                break
            self._progress(f"waiting for a calm machine: {'; '.join(found)}")
            await asyncio.sleep(CALM_POLL_S)
        if found and self._wanted.must_be_calm:
            raise ConfigError(
                f"this machine should not be measured now: {'; '.join(found)}; "
                "end that first, or measure anyway with --force"
            )
        self._machine_complaints = [f"the machine was not calm: {reason}" for reason in found]
        return now

    async def _open_all(self) -> None:
        for server in self._servers:
            self._progress(f"{server.name}: {'starting' if server.is_ours else 'reaching'}")
            took_s = await server.open()
            if server.is_ours:
                self._progress(f"{server.name}: answers after {took_s:.1f} s")
        targets = [server.target for server in self._servers]
        self._takes_chat = all(target.takes_chat for target in targets)
        if not self._takes_chat:
            without = next(t.endpoint.name for t in targets if not t.takes_chat)
            self._complaints.append(
                f"'{without}' answers no chats, so all servers got plain completions"
            )
        for server, source in zip(self._servers, self._wanted.sources, strict=True):
            self._notes[server.name] = ServerNote(
                name=server.name,
                command=source.command if isinstance(source, ServerCommand) else None,
                model=server.target.model,
                takes_ignore_eos=server.target.takes_ignore_eos,
            )

    async def _turns(self, wording: Wording) -> None:
        wanted = self._wanted
        turns = [
            (repetition, workload, server)
            for repetition in range(wanted.repetitions)
            for place, workload in enumerate(wanted.workloads)
            for server in rotated(self._servers, repetition + place)
        ]
        pace = Pace([(workload.name, server.name) for _, workload, server in turns])
        for number, (repetition, workload, server) in enumerate(turns):
            self._progress(
                f"{number + 1}/{len(turns)} {workload.name}: {server.name}{pace.left_in_words()}"
            )
            texts = Texts(wanted.seed, repetition, workload.name, wording)
            sample = await self._turn(server, workload, texts, repetition)
            self._samples.append(sample)
            pace.took(sample.duration_s)

    async def _turn(
        self, server: Server, workload: Workload, texts: Texts, repetition: int
    ) -> Sample:
        """One server's turn at one workload; what goes wrong in it is its result."""
        start_s = time.monotonic()
        sample = Sample(
            workload=workload.name, server=server.name, repetition=repetition, duration_s=0.0
        )
        session: Session | None = None
        load: OthersLoad | None = None
        try:
            async with asyncio.timeout(TURN_LIMIT_S):
                await server.open()
                session = self._session(server, texts)
                await _warm(session)
                session.asked.clear()
                load = OthersLoad(self._own_pids())
                figures = await workload.run(session)
            sample = msgspec.structs.replace(sample, figures=tuple(figures))
        except (BrimError, TimeoutError) as exc:
            failure = (
                exc.message
                if isinstance(exc, BrimError)
                else f"'{server.name}' was not done within {TURN_LIMIT_S:.0f} s"
            )
            self._progress(f"{workload.name}: {failure}")
            sample = msgspec.structs.replace(
                sample, failure=failure, was_skipped=isinstance(exc, Unsupported)
            )
        duration_s = time.monotonic() - start_s
        # A killed server takes its processor time with it, and would make others' of it.
        is_told = load is not None and duration_s >= LEAST_WATCH_S and workload.name != "restart"
        return msgspec.structs.replace(
            sample,
            duration_s=duration_s,
            others_busy_fraction=load.busy_fraction() if load and is_told else 0.0,
            asked=tuple(session.asked) if session else (),
        )

    def _session(self, server: Server, texts: Texts) -> Session:
        return Session(server, texts, self._wanted.sizes, takes_chat=self._takes_chat)

    def _own_pids(self) -> list[int]:
        return [os.getpid(), *(pid for server in self._servers for pid in server.own_pids())]

    def _report(self, started_at: str) -> Report:
        wanted = self._wanted
        spec = self._machine.read_machine()
        notes = tuple(self._notes.values())
        return Report(
            machine=f"{spec.chip or spec.name}, {spec.system}, "
            f"{spec.performance_cores} cores, {spec.ram_bytes / 2**30:.0f} GiB",
            started_at=started_at,
            seed=wanted.seed,
            reference=self._reference,
            servers=notes,
            sizes=wanted.sizes,
            repetitions=wanted.repetitions,
            was_interrupted=self._was_interrupted,
            complaints=(
                *self._machine_complaints,
                *self._complaints,
                *sample_complaints(self._samples, notes),
            ),
            samples=tuple(self._samples),
            rows=tuple(rows(self._samples, self._reference)),
        )


async def wording_of(server: Server, *, takes_chat: bool) -> Wording:
    """Words to a token, by a server's count of two short prompts.

    Raises:
        EngineError: It does not answer them.
    """
    probes = []
    texts = Texts(0, 0, "probe", Wording(tokens_per_word=1.0, overhead_tokens=0.0))
    session = Session(server, texts, Sizes(), takes_chat=takes_chat)
    with session.client() as client:
        for words in PROBE_WORDS:
            answer = await client.ask("probe", sentences(texts.rng(f"{words}"), words), 2)
            probes.append((words, answer.num_prompt_tokens))
    return Wording.fitted(probes[0], probes[1])


async def _warm(session: Session) -> None:
    """A short answer that nobody counts.

    Raises:
        EngineError: None came.
    """
    with session.client() as client:
        await client.ask("warm-up", session.texts.text("warm-up", 8), WARM_UP_TOKENS)


def rotated(servers: Sequence[Server], shift: int) -> list[Server]:
    """The servers, beginning with another one for each shift."""
    shift %= len(servers)
    return [*servers[shift:], *servers[:shift]]
