"""A server and a "browser" that share a control group too small for all of their wishes.

Three models weigh 1.8 GB each by plan, nearly all of it KV; the group has 4.5 GiB.  Two of them fit
beside the reserve, and all three do not fit at all, even where nobody else runs.
"""

import asyncio
import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from brim.machine.linux import resident_bytes
from support.cgroup import MIB, MemoryGroup, Usage, swap_file
from support.long_models import demo_variant
from support.server_process import EXACT, ServerProcess
from support.traffic import PATIENCE_S, REPLY_LIMIT_S, Errand, Reply, keep_asking

LIMIT_BYTES = 9 * 2**29
SWAP_BYTES = 1 * 2**30
NEEDED_BYTES = LIMIT_BYTES + 2**30
"""Free on the machine: the group is to meet its own limit, and never the machine's."""

CONTEXT_TOKENS = 119_808
"""With 48 layers of 272 bytes a cell: a pool of 1.56 GB, 1.80 GB with scratch and the process."""

REFERENCE_CONTEXT_TOKENS = 4_096

REAL_LAYERS = {"six": 6, "five": 5, "four": 4}
"""Model -> layers that say something; each says something else."""

NUM_LAYERS = 48

BROWSER_MIB_PER_S = 100
"""As fast as a browser opens heavy pages; the group would be full of it within a minute."""

GIB = 2**30
MODEST_BYTES = GIB // 10
BROWSER_COURSE = ((0.0, 0.1), (0.1, 1.4), (0.4, 0.3), (0.55, 1.8), (0.9, 0.1))
"""(fraction of the run, GiB): twice too much for two models beside it, and twice back."""

SAMPLE_PERIOD_S = 0.25

_BROWSER = """
import mmap, os, select, sys, time
block, chunks, wanted, at_s = os.urandom(2**20), [], 0, 0.0
while True:
    if select.select([sys.stdin], [], [], max(0.0, at_s - time.monotonic()))[0]:
        line = sys.stdin.readline()
        if not line:
            break
        wanted = int(line) // {chunk}
    if time.monotonic() < at_s:
        continue
    at_s = time.monotonic() + {chunk} / {rate}
    if len(chunks) < wanted:
        chunk = mmap.mmap(-1, {chunk} * 2**20)
        for number in range({chunk}):
            chunk[number * 2**20 : (number + 1) * 2**20] = block
        chunks.append(chunk)
    elif len(chunks) > wanted:
        chunks.pop().close()
    if chunks:  # all of it is looked at every few seconds, as open pages are
        chunks.append(chunks.pop(0))
        for chunk in chunks[-4:]:
            view = memoryview(chunk)
            sum(view[::4096])
            view.release()
"""


class Browser:
    """A process that holds as much memory as it is told to; it grows and shrinks at a pace.

    Args:
        group: Whose memory it takes.
        mib_per_s: How fast it grows and shrinks.
    """

    def __init__(self, group: MemoryGroup, *, mib_per_s: int = BROWSER_MIB_PER_S) -> None:
        code = _BROWSER.format(chunk=16, rate=mib_per_s)
        self._process = subprocess.Popen(
            group.command([sys.executable, "-c", code]), stdin=subprocess.PIPE, text=True
        )
        self.wanted_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.kill()
        self._process.communicate()

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    @property
    def resident_bytes(self) -> int:
        """What it holds in memory now; 0 where it is dead."""
        found = resident_bytes(self._process.pid) if self.is_alive else None
        return found or 0

    def follow(self, course: Sequence[tuple[float, float]], fraction: float) -> None:
        """Hold what a course, as BROWSER_COURSE, says for a moment of it."""
        wanted = int([gib for start, gib in course if start <= fraction][-1] * GIB)
        if wanted != self.wanted_bytes:
            self.hold(wanted)

    def hold(self, num_bytes: int) -> None:
        """Grow or shrink to that size; returns at once."""
        self.wanted_bytes = num_bytes
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the kernel has killed it
            self._process.stdin.write(f"{num_bytes // MIB}\n")
            self._process.stdin.flush()


class Sample(NamedTuple):
    """The group at one moment."""

    at_unix_s: float
    usage: Usage
    browser_bytes: int
    """As far as it is: what it was told to hold is further."""


class Sampler(threading.Thread):
    """Looks at a group a few times a second until it is closed, and calls whoever moves with time.

    Args:
        group: The group.
        browser: Who is in it beside the server.
        on_sample: Told of the seconds since the start with each look.
    """

    def __init__(
        self,
        group: MemoryGroup,
        browser: Browser,
        on_sample: Callable[[float], None] = lambda _: None,
    ) -> None:
        super().__init__(name="sampler")
        self._browser = browser
        self.samples: list[Sample] = []
        self._group = group
        self._on_sample = on_sample
        self._has_ended = threading.Event()

    def run(self) -> None:
        start_s = time.monotonic()
        while not self._has_ended.wait(SAMPLE_PERIOD_S):
            usage, browser_bytes = self._group.usage(), self._browser.resident_bytes
            self.samples.append(Sample(time.time(), usage, browser_bytes))
            self._on_sample(time.monotonic() - start_s)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._has_ended.set()
        self.join()


def most_major_faults_per_s(samples: Sequence[Sample], *, window_s: float = 5.0) -> float:
    """The worst rate over any window: pages that processes had to wait for."""
    worst, first = 0.0, 0
    for last, sample in enumerate(samples):
        while sample.at_unix_s - samples[first].at_unix_s > window_s:
            first += 1
        if last > first and sample.at_unix_s - samples[first].at_unix_s > window_s / 2:
            num = sample.usage.num_major_faults - samples[first].usage.num_major_faults
            worst = max(worst, num / (sample.at_unix_s - samples[first].at_unix_s))
    return worst


def model_arguments(context_tokens: int) -> list[str]:
    """`-m` for each model and the window, for `brim serve`."""
    arguments = ["--ctx", str(context_tokens)]
    for name, real in REAL_LAYERS.items():
        path = demo_variant(
            name,
            real_layers=real,
            silent_layers=NUM_LAYERS - real,
            context_tokens=CONTEXT_TOKENS,
        )
        arguments += ["-m", f"{name}={path}"]
    return arguments


@contextlib.contextmanager
def pressed_server(
    directory: Path, group: MemoryGroup, *, is_governed: bool
) -> Iterator[ServerProcess]:
    """A server of the three models, in a group; ready to be asked.

    Args:
        directory: For all that it keeps.
        group: Where it runs.
        is_governed: Whether it may refuse, evict and give back: otherwise all is loaded by force.
    """
    settings = EXACT | {"governor.enabled": is_governed, "server.drain_limit_s": 5}
    arguments = model_arguments(CONTEXT_TOKENS)
    if not is_governed:
        arguments.append("--force")
    starter = group.command([])
    with ServerProcess(directory, *arguments, settings=settings, starter=starter) as server:
        yield server


@contextlib.contextmanager
def roomy_server(directory: Path) -> Iterator[ServerProcess]:
    """A server of the same models without any limit: for reference answers.

    Their windows are short, which changes no answer, and so they are loaded in no time.
    """
    arguments = model_arguments(REFERENCE_CONTEXT_TOKENS)
    with ServerProcess(directory, *arguments, settings=EXACT) as server:
        yield server


class Pressed(NamedTuple):
    """What came of a run under pressure."""

    replies: list[Reply]
    samples: list[Sample]
    before: Usage
    """When the server was ready and nobody had asked it yet."""
    idle_major_faults_per_s: float
    after: Usage
    events: list[dict[str, Any]]
    """What the server did, from its own log; empty where it can no longer say."""
    is_browser_alive: bool
    stderr: str

    @property
    def num_oom_kills(self) -> int:
        return self.after.num_oom_kills

    @property
    def worst_major_faults_per_s(self) -> float:
        return most_major_faults_per_s(self.samples)

    @property
    def accepted(self) -> list[Reply]:
        """Those that the server took on: it owes each of them one whole answer."""
        return [reply for reply in self.replies if reply.status == 200]

    def faults(self, references: dict[tuple[str, str], str]) -> list[str]:
        """What is wrong with accepted ones, and who was not even answered with a refusal."""
        found = [(reply, reply.fault(references)) for reply in self.replies]
        return [
            f"{reply.errand.model} {reply.errand.name}: {fault}"
            for reply, fault in found
            if fault and (reply.status in (0, 200) or "in the stream" in fault)
        ]


def run_pressed(
    directory: Path,
    errands: Sequence[Errand],
    *,
    is_governed: bool,
    seconds: float,
    num_clients: int,
    swap_bytes: int = SWAP_BYTES,
    course: Sequence[tuple[float, float]] = BROWSER_COURSE,
    browser_mib_per_s: int = BROWSER_MIB_PER_S,
    idle_s: float = 2.0,
    patience_s: float = PATIENCE_S,
    reply_limit_s: float = REPLY_LIMIT_S,
) -> Pressed:
    """Mixed traffic for a while on a server that shares a small group with a browser.

    Args:
        directory: For all that the server keeps, and the swap file.
        errands: What is asked for.
        is_governed: See `pressed_server`.
        seconds: How long clients begin new requests.
        num_clients: How many, each with one request at a time.
        swap_bytes: That the group may use; 0 for none.
        course: Of the browser.
        browser_mib_per_s: How fast it grows.
        idle_s: How long the ready server is watched before anybody asks.
        patience_s: How long clients come again.
        reply_limit_s: After which a reply counts as lost.
    """
    with contextlib.ExitStack() as stack:
        if swap_bytes:
            stack.enter_context(swap_file(swap_bytes))
        group = stack.enter_context(MemoryGroup(LIMIT_BYTES, swap_bytes=swap_bytes))
        browser = stack.enter_context(Browser(group, mib_per_s=browser_mib_per_s))
        browser.hold(MODEST_BYTES)
        server = stack.enter_context(pressed_server(directory, group, is_governed=is_governed))
        before = group.usage()
        time.sleep(idle_s)
        idle_faults = group.usage().num_major_faults - before.num_major_faults
        with Sampler(
            group, browser, lambda at_s: browser.follow(course, at_s / seconds)
        ) as sampler:
            replies = asyncio.run(
                keep_asking(
                    server.url,
                    errands,
                    num_clients=num_clients,
                    seconds=seconds,
                    patience_s=patience_s,
                    reply_limit_s=reply_limit_s,
                )
            )
        after, is_browser_alive = group.usage(), browser.is_alive
        told = server.brim("events", "--json")
        server.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.stderr += server.process.communicate(timeout=15)[1]
    return Pressed(
        replies=replies,
        samples=sampler.samples,
        before=before,
        idle_major_faults_per_s=idle_faults / idle_s,
        after=after,
        events=json.loads(told.stdout) if told.returncode == 0 else [],
        is_browser_alive=is_browser_alive,
        stderr=server.stderr,
    )
